"""torch.compile traces a whole pass behind EPT as one graph, without asking the device, and gives what eager mode gives."""

import dataclasses
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from ept import EPTConfig
from ept.cli import train
from tiny_models import backbone, ids, padded, shake, wrapped
from tiny_text import reviews, save_model, write_csv

MODELS = {
    "bert": hf.AutoModelForSequenceClassification,
    "llama": hf.AutoModelForCausalLM,
    "t5": hf.AutoModelForSeq2SeqLM,
}
PRESETS = {
    "default": EPTConfig(),
    "input": EPTConfig.input_only(token_dropout=0.0),
    "paper": EPTConfig.paper(prompt_length=4, rank=3, max_text_length=16),
}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batch_of(name, lengths=(9, 4), side="right"):
    """Rows of these lengths, padded on a side; for T5 the decoder's input, too."""
    text, mask = padded([ids(1, length, seed=i) for i, length in enumerate(lengths)], side)
    decoder = {"decoder_input_ids": ids(len(lengths), 3)} if name == "t5" else {}
    return dict(input_ids=text, attention_mask=mask, **decoder)


def compiled(model):
    """The model compiled as one graph by a backend that runs it as it is, and what counts the graphs."""
    counter = CompileCounter()
    return torch.compile(model, fullgraph=True, backend=counter, dynamic=True), counter


def check(model, batch):
    with torch.no_grad():
        want = model(**batch).logits
        fast, counter = compiled(model)
        torch.testing.assert_close(fast(**batch).logits, want, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


KINDS = ("live", "folded", "mixed", "training")
PADDING = (None, "left", "right")
SHORT = [("t5", "default", "mixed", None), ("bert", "default", "folded and mixed", None)]
CASES = [
    *(pytest.param(*case, True) for case in SHORT),
    *(pytest.param(*case, None, marks=pytest.mark.full) for case in itertools.product(MODELS, PRESETS, KINDS, PADDING)),
]


def changing_batches(name, kind, padding):
    """Four batches of other sizes and lengths, with labels for training and numbers of adapters for mixed rows."""
    for turn, lengths in enumerate([(9, 4), (5, 7, 2), (12, 3), (6, 11, 3, 8)]):
        rows, width, target = len(lengths), max(lengths), 3 + turn
        batch = batch_of(name, lengths, padding or "right")
        if padding is None:
            batch = dict(input_ids=ids(rows, width, seed=turn))
        if name == "t5":
            batch["decoder_input_ids"] = ids(rows, target, seed=turn)
        if "mixed" in kind:
            batch["adapter_ids"] = torch.arange(turn, turn + rows) % 3
        if kind == "training":
            batch["labels"] = torch.arange(rows) % 2 if name == "bert" else ids(rows, target if name == "t5" else width)
        yield batch


def model_of(name, preset, kind):
    """The wrapped model; where rows are mixed, with two other adapters of other sizes."""
    config = PRESETS[preset]
    smaller = {"num_decoder_layers": 1} if name == "t5" else {}
    model = wrapped(backbone(name, MODELS[name], **smaller), config)
    if "mixed" in kind:
        model.add_adapter("longer", dataclasses.replace(config, prompt_length=5))
        model.add_adapter("as long", config)
        for number, adapter in enumerate(model.inactive_adapters):
            shake(SimpleNamespace(ept=adapter.layer), seed=3 + number)
    if "folded" in kind:
        for other in model.list_adapters():
            model.set_adapter(other)
            model.fold()
    return model.train(kind == "training")


def results_of(run, model, batch):
    """Logits; in a training pass loss and gradients, by name."""
    if "labels" not in batch:
        with torch.no_grad():
            return {"logits": run(**batch).logits}
    model.zero_grad()
    loss = run(**batch).loss
    loss.backward()
    trained = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in trained.values())
    return {"loss": loss.detach()} | {key: grad.clone() for key, grad in trained.items()}


@pytest.mark.parametrize(("name", "preset", "kind", "padding", "dynamic"), CASES)
def test_changing_batches_take_two_compilations_at_most_and_give_eager_modes_results(
    name, preset, kind, padding, dynamic
):
    """`dynamic=True` saves the first trace, of fixed sizes."""
    model, counter = model_of(name, preset, kind), CompileCounter()
    fast = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic)
    for batch in changing_batches(name, kind, padding):
        want, got = results_of(model, model, batch), results_of(fast, model, batch)
        for key in want:
            assert torch.equal(got[key], want[key]), key  # the backend runs the same operations
    assert 1 <= counter.frame_count <= 2


def test_a_thread_may_begin_with_a_compiled_call():
    """Its second call of the same sizes compiles nothing."""
    model, batch = wrapped(backbone("bert", MODELS["bert"]), PRESETS["default"]), batch_of("bert")
    fast, counter = compiled(model)
    with ThreadPoolExecutor(1) as fresh, torch.no_grad():
        logits = [fresh.submit(lambda: fast(**batch).logits).result() for _ in range(2)]
        torch.testing.assert_close(logits, [model(**batch).logits] * 2, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", MODELS)
def test_a_training_pass_is_one_graph_with_eager_modes_loss_and_gradients(name):
    model = wrapped(backbone(name, MODELS[name]), EPTConfig.deep()).train()
    batch = batch_of(name, side="left" if name == "llama" else "right")
    batch["labels"] = torch.tensor([0, 1]) if name == "bert" else ids(2, 9 if name == "llama" else 3)
    fast, counter = compiled(model)
    results = []
    for run in (model, fast):
        model.zero_grad()
        loss = run(**batch).loss
        loss.backward()
        results.append({"loss": loss.detach()} | {key: p.grad.clone() for key, p in model.ept.named_parameters()})
    for key, want in results[0].items():
        torch.testing.assert_close(
            results[1][key], want, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize("preset", ["input", "paper"])
def test_a_pass_of_the_other_presets_is_one_graph(preset):
    check(wrapped(backbone("llama", MODELS["llama"]), PRESETS[preset]), batch_of("llama", side="left"))


def test_a_pass_of_several_adapters_is_one_graph():
    model = wrapped(backbone("bert", MODELS["bert"]), EPTConfig.deep())
    model.add_adapter("other", EPTConfig.deep(token_rank=3, prompt_length=5))
    check(model, batch_of("bert") | {"adapter_ids": ["other", "default"]})


def test_other_rows_of_other_adapters_need_one_more_compilation_at_most_where_they_are_numbers():
    model = wrapped(backbone("bert", MODELS["bert"]), EPTConfig.deep())
    model.add_adapter("other", EPTConfig.deep(token_rank=3, prompt_length=5), num_labels=4)
    fast, counter = compiled(model)
    with torch.no_grad():
        for lengths, numbers in (((9, 4), [1, 0]), ((5, 7, 2), [0, 1, 0]), ((12, 3), [1, 1])):
            batch = batch_of("bert", lengths)
            logits = fast(**batch, adapter_ids=torch.tensor(numbers)).logits
            want = model(**batch, adapter_ids=[model.list_adapters()[number] for number in numbers]).logits
            torch.testing.assert_close(logits[:, : want.shape[1]], want, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


def test_a_pass_of_a_folded_adapter_is_one_graph():
    check(wrapped(backbone("llama", MODELS["llama"]), EPTConfig.deep()).fold(), batch_of("llama"))


def test_other_batches_and_lengths_need_one_more_compilation_at_most():
    model = wrapped(backbone("llama", MODELS["llama"]), EPTConfig.deep())
    fast, counter = compiled(model)
    with torch.no_grad():
        for lengths in ((9, 4), (5, 7, 2), (12, 3)):
            batch = batch_of("llama", lengths, "left")
            torch.testing.assert_close(fast(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


def test_a_compiled_model_without_fullgraph_gives_the_same_loss():
    model = wrapped(backbone("bert", hf.AutoModelForSequenceClassification)).train()
    batch = dict(input_ids=ids(2, 6), labels=torch.tensor([0, 1]))
    torch.testing.assert_close(torch.compile(model, backend="eager")(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize(
    "words",
    [
        ["--torch_compile_backend", "eager"],
        pytest.param(["--torch_compile", "true", "--torch_compile_mode", "reduce-overhead"], marks=pytest.mark.full),
    ],
)
def test_the_command_line_trains_a_compiled_model_to_eager_modes_losses(words, tmp_path, capsys):
    """Batches of several lengths and a smaller one at the end of the epoch, in two compilations at most."""
    save_model(tmp_path / "bert", pooling=True)  # a head without dropout
    rows = [(text * (1 + i % 4), label) for i, (text, label) in enumerate(reviews(18))]
    write_csv(tmp_path / "train.csv", rows)
    losses = []
    for name, more in (("eager", []), ("compiled", words)):
        train.run([str(word) for word in (
            "--model_name_or_path", tmp_path / "bert", "--train_file", tmp_path / "train.csv", "--output_dir", tmp_path / name,
            "--num_train_epochs", 1, "--per_device_train_batch_size", 4, "--logging_steps", 1, "--use_cpu", "--disable_tqdm",
            "true", "--save_strategy", "no", *more,
        )])  # fmt: skip
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]
    printed = "".join(capsys.readouterr())
    assert "padded to multiples of 31 tokens" in printed  # 62, which the prompt's 2 rows leave of 64


def test_a_compiled_forward_writes_eager_modes_tokens_into_a_static_cache():
    model = wrapped(backbone("llama", MODELS["llama"], num_hidden_layers=3), PRESETS["default"])
    model.base_model.generation_config.eos_token_id = None
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    text, mask = padded([ids(1, 5, seed=1), ids(1, 3, seed=2)], "left")
    want = model.generate(text, mask, **settings)
    counter = CompileCounter()
    model.base_model.forward = torch.compile(model.base_model.forward, backend=counter, dynamic=True)
    got = model.generate(text, mask, cache_implementation="static", **settings)
    assert torch.equal(got, want)
    assert 1 <= counter.frame_count <= 2  # the text, and each new token
