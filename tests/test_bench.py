"""The benchmarks' own promises: checked downloads, fixed parts, nothing overwritten in silence, ratios in turn."""

import json

import pytest
import torch

from bench import demo, real_text
from bench.compare import run_all
from bench.step_time import floor_step, interleaved, quartiles, training_step
from ept.training.rates import parameter_groups
from tiny_models import ids, mean_pooling, wrapped


def test_a_damaged_download_is_an_error_that_says_what_to_delete(tmp_path, monkeypatch):
    monkeypatch.setenv("EPT_CACHE", str(tmp_path))
    (tmp_path / "vaderSentiment-3.3.2.tar.gz").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"is damaged .* delete"):
        real_text.load_task("movies")


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="choose one of movies, rating, tweets, news, authors"):
        real_text.load_task("movie")


def test_the_parts_of_a_task_are_fixed_and_disjoint():
    task = real_text.load_task("movies")
    assert {part: len(texts) for part, texts in task.texts.items()} == {"test": 1000, "dev": 500, "train": 8860}
    again = real_text.load_task("movies")
    assert again.texts == task.texts and again.labels == task.labels
    assert set(task.labels["test"]) == {0, 1}
    news = real_text.load_task("news")
    assert not set(news.texts["train"]) & set(news.texts["test"])


def test_the_demo_moves_another_run_aside_and_says_so(tmp_path, capsys):
    directory, settings = tmp_path / "demo", {"steps": 5}
    demo.claim_output_dir(directory, settings)
    directory.mkdir()
    (directory / "metrics.json").write_text(json.dumps({"settings": settings}))
    demo.claim_output_dir(directory, settings)
    assert directory.exists() and not capsys.readouterr().out
    demo.claim_output_dir(directory, {"steps": 6})
    assert "it is now" in capsys.readouterr().out
    directory.mkdir()
    (directory / "metrics.json").write_text("{")
    demo.claim_output_dir(directory, settings)
    assert not directory.exists()
    assert json.loads((tmp_path / "demo-1" / "metrics.json").read_text()) == {"settings": settings}


def test_a_step_that_is_timed_leaves_the_model_as_it_is():
    model = wrapped(mean_pooling())
    before = {name: p.clone() for name, p in model.named_parameters()}
    batch = {
        "input_ids": ids(2, 6),
        "attention_mask": torch.ones(2, 6, dtype=torch.int64),
        "labels": torch.tensor([0, 1]),
    }
    steps = {
        "EPT": training_step(model, parameter_groups(model), [batch]),
        "floor": floor_step(model.base_model, torch.randn(2, 11, 32), batch["labels"]),
    }
    seconds = interleaved(steps, rounds=3)
    assert {name: len(s) for name, s in seconds.items()} == {"EPT": 3, "floor": 3}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_quartiles_are_taken_over_the_ratios_within_rounds():
    assert quartiles([2.0, 3.0, 8.0], [1.0, 1.0, 2.0])[1] == 3.0


def test_runs_that_stand_in_the_file_are_not_repeated(tmp_path):
    job = {"stage": "final", "task": "movies", "method": "EPT", "rate": 1.0, "seed": 0, "steps": 5}
    (tmp_path / "runs.jsonl").write_text(json.dumps(job | {"score": 0.5}) + "\n")
    assert run_all([job], tmp_path / "runs.jsonl", 1, "final")[0]["score"] == 0.5
