"""The example of a server under load: every answer is its own adapter's, and a broken request harms no other."""

import importlib.util
import json
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers as hf

import tiny_text
from ept import EPTConfig
from tiny_models import backbone, shake, wrapped

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
import uvicorn

EXAMPLE = Path(__file__).parents[1] / "examples/serve_many.py"
CLIENTS, ADAPTERS, REQUESTS = 32, 8, 96
TEXTS = ["the film", "a very lovely story", "then the plot", "the music with a dull scene"]


@pytest.fixture(scope="module")
def model():
    """A seeded model with eight adapters whose answers differ."""
    causal_lm = backbone("llama", hf.AutoModelForCausalLM, initializer_range=0.4, eos_token_id=None)
    settings = dict(rank=0, num_spaces=0, token_rank=2)
    model = wrapped(causal_lm, EPTConfig(prompt_length=1, **settings))
    for number in range(1, ADAPTERS):
        model.add_adapter(f"adapter{number}", EPTConfig(prompt_length=1 + number % 3, **settings))
        model.set_adapter(f"adapter{number}")
        shake(model, std=0.5, seed=number)
    return model.eval()


@pytest.fixture(scope="module")
def address(model):
    spec = importlib.util.spec_from_file_location("serve_many", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    tokenizer = tiny_text.tokenizer("t5")
    server = uvicorn.Server(uvicorn.Config(example.serve(model, tokenizer), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while thread.is_alive() and not server.started:
        thread.join(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def call(address: str, path: str, body: bytes | None, method: str = "POST") -> tuple[int, dict | None]:
    """Status and answer of a request."""
    headers = {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(address + path, body, headers, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ask(address: str, **body) -> tuple[int, dict | None]:
    return call(address, "/generate", json.dumps(body).encode())


def requests(names: list[str]) -> list[dict]:
    return [
        dict(text=TEXTS[i // len(names) % len(TEXTS)], adapter=names[i % len(names)], max_new_tokens=4)
        for i in range(REQUESTS)
    ]


def test_32_clients_of_8_adapters_get_the_answers_that_they_get_alone_while_others_are_refused(
    model, address, tmp_path
):
    sent = requests(model.list_adapters())
    alone = {tuple(each.items()): ask(address, **each) for each in sent}
    assert len({answer["text"] for status, answer in alone.values()}) > ADAPTERS
    broken = [
        (lambda: ask(address, text="the film", adapter="nobody"), 400),
        (lambda: ask(address, text="the " * 80, adapter="adapter1"), 400),
        (lambda: ask(address, text="the film"), 422),
        (lambda: call(address, "/generate", b"{"), 422),
    ]
    work = [(lambda each=each: ask(address, **each), alone[tuple(each.items())]) for each in sent]
    work = [*work, *broken * 4]
    torch.manual_seed(0)
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(lambda number: work[number][0](), torch.randperm(len(work)).tolist()))
    torch.manual_seed(0)
    for number, answer in zip(torch.randperm(len(work)).tolist(), answers, strict=True):
        expected = work[number][1]
        assert answer == expected or answer[0] == expected, (work[number], answer)


def test_adapters_come_and_go_while_others_are_asked(model, address, tmp_path):
    model.save_pretrained(tmp_path, adapter_name="adapter1")
    known = ask(address, text=TEXTS[0], adapter="adapter1")
    with ThreadPoolExecutor(8) as clients:
        others = [clients.submit(ask, address, text=TEXTS[0], adapter="adapter1") for _ in range(16)]
        assert call(address, f"/adapters/late?directory={tmp_path}", None, "PUT")[0] == 200
        assert ask(address, text=TEXTS[0], adapter="late") == known
        assert call(address, "/adapters/late", None, "DELETE")[0] == 200
        assert [other.result() for other in others] == [known] * 16
    assert ask(address, text=TEXTS[0], adapter="late")[0] == 400
    assert call(address, f"/adapters/bad?directory={tmp_path}/nothing", None, "PUT")[0] == 400
