"""The benchmarks' own promises: checked downloads, fixed parts, nothing overwritten in silence, ratios in turn,
a floor that is fair, a script for a GPU that runs as it stands."""

import contextlib
import dataclasses
import io
import json
import re
import sys
import time

import pytest
import torch

from bench import gpu
from bench.__main__ import main
from bench.accuracy import demo
from bench.accuracy.compare import run_all
from bench.kernels import costs
from bench.steps import step
from bench.steps import training as training_steps
from bench.steps.clock import interleaved, quartiles
from bench.steps.methods import bare, build
from bench.steps.shapes import SMALL_SHAPES, backbone, batch_of
from bench.steps.step import floor_of_shape, floor_step, training_step
from bench.tables import records
from bench.text import real_text
from ept import EPTConfig
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


def test_the_demo_shows_the_accuracies_of_the_committed_table():
    for arm in demo.ARMS_ON_RECORD.values():
        assert re.fullmatch(r"0\.\d{3} ± 0\.\d{3}( \(\d\))?", demo.on_record(arm, "movies"))
    assert demo.on_record("EPT, deep", "movies") != demo.on_record("EPT, deep", "news")


def test_the_demos_budget_gives_the_default_sizes():
    budget = demo.METHODS_SHOWN[demo.METHOD][1]
    assert EPTConfig.for_budget(budget, 384, preset="deep", deep_layers=5) == EPTConfig(deep_layers=5)  # MiniLM's sizes


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
    groups = parameter_groups(model)
    steps = {
        "EPT": training_step(model, groups, [batch]),
        "floor": floor_step(model.base_model, groups, torch.randn(2, 11, 32), batch["labels"]),
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


def test_the_floor_differs_from_ept_by_ept_alone(monkeypatch):
    """Both train tensors of the same sizes in the same groups, the floor's head its own, and neither turns dropout on."""
    shape, chosen = SMALL_SHAPES[0], []
    real = step._update
    monkeypatch.setattr(step, "_update", lambda groups: chosen.append(groups) or real(groups))
    base, batch = backbone(shape, "cpu"), batch_of(shape, "cpu")
    model, groups = build("EPT", shape, base)
    floor = bare(base)
    for once in (training_step(model, groups, [batch]), floor_of_shape(shape, floor, model, groups, batch)):
        once()
    of_ept, of_floor = ([[p.shape for p in group["params"]] for group in groups] for groups in chosen)
    assert of_ept == of_floor and sum(map(len, of_floor)) > 2
    heads = [p for group in chosen[1] for p in group["params"] if any(p is own for own in floor.parameters())]
    assert len(heads) == 2 and not any(p is own for p in heads for own in model.parameters())
    assert not any(m.training for m in floor.modules() if isinstance(m, torch.nn.Dropout))


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """The directory, the exit code and the lines of a whole run of the GPU's script, on the CPU at tiny sizes."""
    directory = tmp_path_factory.mktemp("gpu")
    lines = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(lines):
        patch.setitem(costs.COPIED, "cpu", 2**20)
        code = main(["gpu", "--device", "cpu", "--small", "--output_dir", str(directory)])
    return directory, code, lines.getvalue()


def test_the_gpus_script_measures_everything_and_ends_with_a_short_table(small_run):
    directory, code, lines = small_run
    assert code == 0
    tables = records.tables(directory)
    assert {row["stem"] for row in tables["micro"]} == {"prompt_embed", "layer_update", "embedding_step"}
    assert {row["ran"] for row in tables["micro"] if row["impl"] == "auto"} == {"torch"}
    steps = {(row["shape"], row["method"], row["way"]) for row in tables["end_to_end"]}
    methods = ("floor", "EPT", "floor of EPT deep", "EPT deep", "prompt tuning 100", "LoRA")
    assert steps == {(s.name, m, way) for s in SMALL_SHAPES for m in methods for way in ("", "captured")}
    ratios = {(row["method"], row["over"], row["way"]) for row in tables["ratios"]}
    for over in ("floor of EPT deep", "prompt tuning 100", "LoRA"):
        assert {("EPT deep", over, ""), ("EPT deep", over, "captured")} <= ratios
    assert {f"mixed batch of {count} adapters" for count in (8, 32)} <= {method for method, _, _ in ratios}
    assert {(row["method"], row["batch"]) for row in tables["decoding"]} == {
        (method, rows)
        for method in ("backbone", "EPT", "EPT folded", "EPT deep", "EPT deep folded")
        for rows in ("1", "32")
    }  # fmt: skip
    for words in (
        "a large copy",
        "auto: torch",
        "tiny T5, EPT deep",
        "mixed batch of 32",
        "decoding tiny Llama, batch 32",
    ):
        assert words in lines.split("done")[-1]


def test_a_run_that_is_cut_off_has_written_the_first_rounds_of_every_method(tmp_path, monkeypatch):
    shape, rounds = dataclasses.replace(SMALL_SHAPES[0], rounds=9), []

    def interrupted(steps, count, **settings):
        rounds.append(count)
        if len(rounds) == 2:
            raise KeyboardInterrupt
        return {name: [1.0 + number for number in range(count)] for name in steps}

    monkeypatch.setattr(training_steps, "interleaved", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu._steps(gpu.Run("cpu", True, tmp_path, {"clock": "wall"}), shape)
    tables = records.tables(tmp_path)
    assert rounds == [3, 6] and {row["rounds"] for row in tables["end_to_end"]} == {"3"}
    assert {"floor of EPT deep", "EPT deep", "LoRA"} < {row["method"] for row in tables["end_to_end"]}
    assert ("EPT deep", "LoRA") in {(row["method"], row["over"]) for row in tables["ratios"]}


def test_the_figures_of_the_gpus_tables_are_drawn(small_run, tmp_path):
    assert main(["plot", str(small_run[0]), "--output_dir", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*/*.png")} == {"end_to_end.png", "ratios.png"}


def test_a_part_that_takes_too_long_is_ended_and_one_that_fails_is_told():
    assert gpu.limited(time.sleep, (60,), 1) == "ended after 1 s"
    assert "exit code 3" in gpu.limited(sys.exit, (3,), 60)


def test_rows_that_measured_the_same_take_the_place_of_the_old_ones(tmp_path):
    row = {"stem": "x", "unit": "ms", "median": 1.0, "low": 1.0, "high": 1.0}
    records.update(tmp_path / "micro.csv", [row, row | {"way": "forward", "median": 2.0}])
    records.update(tmp_path / "micro.csv", [row | {"median": 3.0, "rounds": 2}])
    assert [r["median"] for r in records.read(tmp_path / "micro.csv")] == [2.0, 3.0]
