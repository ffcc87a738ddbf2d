"""vLLM's server with adapters by name, as docs/vllm.md says it, asked by several clients at once."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test-vllm", allow_module_level=True)

import tiny_text
from in_vllm.served_models import Served, slots, texts

PATIENCE = 600  # seconds until the server is up; a safety net alone


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    served = Served.make("llama", tmp_path_factory.mktemp("llama"))
    tiny_text.tokenizer("t5").save_pretrained(served.directory / "backbone")
    return served


@pytest.fixture(scope="module")
def address(served):
    """Of a server with two adapters and room for more."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(served.directory / "backbone"),
        "--served-model-name", "backbone", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--max-model-len", "128", "--kv-cache-memory-bytes", str(2**27), "--enable-lora", "--max-loras", "2",
        "--lora-modules", *(f"{name}={served.adapters[name]}" for name in ("default", "all")),
    ]  # fmt: skip
    environment = slots() | {
        "VLLM_CPU_CI_ENV": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
    }  # fmt: skip
    log = served.directory / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env=os.environ | environment, stdout=output, stderr=output, start_new_session=True,
            cwd=served.directory,
        )  # fmt: skip
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
        while not is_up(url):
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(log.read_text(errors="replace")[-6000:])
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)  # its engine and worker as well
            server.wait()


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


def post(url: str, path: str, **body) -> tuple[int, dict | str]:
    """Status and answer of a request."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


def complete(url: str, model: str, ids: list[int]) -> list[int] | int:
    """The new tokens, or the status of an error."""
    body = dict(model=model, prompt=ids, max_tokens=16, temperature=0, ignore_eos=True, return_token_ids=True)
    status, answer = post(url, "/v1/completions", **body)
    return answer["choices"][0]["token_ids"] if status == 200 else status


def test_clients_name_their_adapters_and_an_unknown_name_is_an_error_to_its_request_alone(served, address):
    names = ["default", "all", "backbone", "nobody"] * 4
    asked = [(name, texts(5 + i)[0]) for i, name in enumerate(names)]
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda each: complete(address, *each), asked))
    for (name, ids), answer in zip(asked, answers, strict=True):
        if name == "nobody":
            assert answer == 404
        else:
            assert answer == served.tokens(None if name == "backbone" else name, ids), name


def test_adapters_are_loaded_and_unloaded_while_it_runs(served, address):
    ids = texts(40)[0]
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    with ThreadPoolExecutor(4) as clients:
        others = [clients.submit(complete, address, "default", ids) for _ in range(8)]
        assert complete(address, "late", ids) == 404
        for name in ("shallow", "long"):  # the same name twice: no block of the first is the second's
            assert post(address, load, lora_name="late", lora_path=served.adapters[name])[0] == 200
            assert complete(address, "late", ids) == served.tokens(name, ids)
            assert post(address, unload, lora_name="late")[0] == 200
        assert complete(address, "late", ids) == 404
        assert post(address, load, lora_name="bad", lora_path=str(served.directory / "nothing"))[0] >= 400
        assert post(address, load, lora_name="bad", lora_path=str(served.directory / "all/trained"))[0] >= 400
        assert [other.result() for other in others] == [served.tokens("default", ids)] * 8
    assert complete(address, "bad", ids) == 404


def test_texts_are_tokenised_as_without_an_adapter(served, address):
    text = "the film with a great cast"
    ids = tiny_text.tokenizer("t5")(text).input_ids
    assert complete(address, "all", text) == served.tokens("all", ids)
