"""What `ept inspect` says is what is in the adapter; `ept doctor` finds what is wrong."""

import json
import re

import pytest
import torch
import transformers as hf

import tiny_text
from ept import EPTConfig
from ept.cli import main
from ept.inspect import self_test
from ept.inspect.findings import examine
from ept.inspect.text import method_of
from tiny_models import all_parts, wrapped

AUTO = hf.AutoModelForSequenceClassification


@pytest.fixture
def adapter(tmp_path):
    """The directory of an adapter with every part, with the record of a run; and the model."""
    tiny_text.save_model(tmp_path / "model", "bert", AUTO)
    model = wrapped(AUTO.from_pretrained(tmp_path / "model"), all_parts(fusion=True))
    model.save_pretrained(tmp_path / "adapter")
    tiny_text.tokenizer().save_pretrained(tmp_path / "adapter")
    record = {
        "task": "classification",
        "steps": 7,
        "seed": 3,
        "metrics": {"eval_accuracy": 0.8125, "eval_runtime": 9.0},
    }
    (tmp_path / "adapter" / "run.json").write_text(json.dumps(record))
    return tmp_path / "adapter", model


@torch.no_grad()
def test_what_is_found_agrees_with_the_model(adapter):
    directory, model = adapter
    found = examine(str(directory))
    torch.testing.assert_close(found.prompt, model.ept.reconstruct()[0])
    torch.testing.assert_close(found.gate, model.gate_weights())
    c = model.ept_config.scale * model.ept.lowrank_a.double() @ model.ept.lowrank_b.double()
    torch.testing.assert_close(found.singular_values, torch.linalg.svdvals(c)[:3])
    attention = torch.softmax(model.ept.prompt.double() @ c.T / 32**0.5, 1)
    torch.testing.assert_close(found.attention, attention)
    table = model.base_model.get_input_embeddings().weight
    cosines = torch.nn.functional.cosine_similarity(found.prompt[2:3], table)
    word = tiny_text.tokenizer().decode([cosines.argmax()]) or f"#{cosines.argmax()}"  # a number where it has no word
    assert found.words[2][0] == (word, pytest.approx(cosines.max().item()))


def test_ept_inspect_prints_every_part_and_draws_it(adapter, tmp_path, capsys):
    directory, model = adapter
    assert main(["inspect", str(directory), "--output_dir", str(tmp_path / "page")]) == 0
    said = capsys.readouterr().out
    parts = model.ept_config.parameters_by_part(32)
    for name, count in (parts | {"together": sum(parts.values())}).items():
        assert re.search(rf"^{name} +{count:,} ", said, re.M), name
    assert "EPT: short prompt, low-rank update, fusion, spaces, token-conditioned update" in said
    assert "BertForSequenceClassification" in said and "eval_accuracy  0.8125" in said and "runtime" not in said
    for title in ("gate:", "singular values of C", "attention of the fusion", "nearest words"):
        assert title in said
    assert sorted(p.name for p in (tmp_path / "page").iterdir()) == [
        "attention.png", "gates.png", "inspect.html", "singular_values.png",
    ]  # fmt: skip
    page = (tmp_path / "page" / "inspect.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "http" not in page


def test_a_folded_adapter_and_one_without_its_backbone_are_inspected_too(adapter, tmp_path, capsys):
    directory, _ = adapter
    folded = tmp_path / "folded"
    assert main(["fold", "--adapter", str(directory), "--output_dir", str(folded)]) == 0
    live = examine(str(directory), nearest=0)
    found = examine(str(folded), nearest=0)
    torch.testing.assert_close(found.singular_values, live.singular_values, rtol=1e-4, atol=1e-5)
    assert found.folded and found.gate is None and found.attention is None and found.words is None
    for path in (tmp_path / "model").iterdir():
        path.unlink()
    capsys.readouterr()
    assert main(["inspect", str(directory)]) == 0
    said = capsys.readouterr()
    assert "no nearest words" in said.err and "nearest words" not in said.out
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(tmp_path / "nothing")])
    assert stopped.value.code == 2 and "holds no adapter_config.json" in capsys.readouterr().err


def test_the_method_is_named_by_its_parts():
    off = dict(rank=0, num_spaces=0, token_rank=0)
    assert method_of(EPTConfig(**off)).startswith("prompt tuning")
    assert method_of(EPTConfig(**off | dict(rank=2, fusion=False))) == "DePT: short prompt, low-rank update"
    assert method_of(EPTConfig.input_only()) == "EPT: short prompt, spaces, token-conditioned update"


def test_the_doctor_says_which_implementation_runs_and_why(capsys, monkeypatch):
    monkeypatch.setattr(
        self_test, "_in_the_interpreter", lambda: {"result": (0.0, 1.0)}
    )  # by tests/test_triton_interpreter.py
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert 'impl="auto" takes torch: the tensors are on cpu' in said or "takes triton" in said
    assert "torch on cpu: right, forward and backward" in said and "nothing is wrong" in said
    assert "bfloat16 instructions: weights that were saved in bfloat16 are loaded in" in said
    assert f"torch {torch.__version__.split('+')[0]}" in said and f"transformers {hf.__version__}" in said


def test_a_wrong_implementation_is_found_and_the_exit_code_is_1(capsys, monkeypatch):
    monkeypatch.setattr(self_test, "_in_the_interpreter", lambda: {"result": (0.0, 1.0)})
    right = self_test.ept_kernels.prompt_embed
    monkeypatch.setattr(
        self_test.ept_kernels,
        "prompt_embed",
        lambda *a, impl, **k: right(*a, impl=impl, **k) * (1 + 1e-5 * (impl == "torch")),
    )
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    said = capsys.readouterr().out
    assert stopped.value.code == 1 and "PROBLEM: torch on cpu is wrong: result is off by" in said


def test_an_installed_version_below_the_declared_one_is_a_problem(capsys, monkeypatch):
    monkeypatch.setattr(self_test, "self_tests", lambda problems: [])
    monkeypatch.setattr(self_test.importlib.metadata, "requires", lambda name: ["torch>=99", "numpy>=1"])
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert (
        "PROBLEM: torch" in (said := capsys.readouterr().out) and "is not >=99" in said and "PROBLEM: numpy" not in said
    )
