"""The examples run as they stand, with fewer steps where the steps are what takes long."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(request, tmp_path, monkeypatch) -> ModuleType:
    """The module of an example, in an empty current directory."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(request.param, EXAMPLES / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("example", ["sentiment"], indirect=True)
def test_the_sentiment_example_trains_saves_loads_and_judges(example, tmp_path, capsys):
    example.main(steps=2)
    out = capsys.readouterr().out
    before, after = map(float, re.search(r"before training ([\d.]+), after 2 steps ([\d.]+)", out).groups())
    assert 0.3 < before < 0.7 and 0.3 < after <= 1
    assert len(re.findall(r"^[01]\.\d\d positive: ", out, re.M)) == len(example.SENTENCES)
    assert (tmp_path / "runs" / "sentiment" / "adapter_model.safetensors").stat().st_size < 100_000


@pytest.mark.parametrize("example", ["many_adapters"], indirect=True)
def test_the_example_of_many_adapters_gets_from_eight_threads_what_it_gets_from_one(example, capsys):
    example.main(steps=2)
    out = capsys.readouterr().out
    assert re.search(r"one batch, two adapters: \d+ of 40 right", out)
    assert "eight threads at once and one after another agree: True" in out


@pytest.mark.parametrize("example", ["causal_lm"], indirect=True)
def test_the_causal_example_learns_its_answers(example, capsys):
    example.main(steps=120)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "the film is funny. go? yes",
        "the music is weak. go? no",
    ]
