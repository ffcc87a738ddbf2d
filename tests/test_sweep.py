"""`ept sweep` and `ept report`: the grid, its resumption, one line a run, and the table of the runs."""

import importlib.util
import json
import shutil

import pytest
import transformers as hf

from ept.cli import main
from ept.compare import fit as fitting
from ept.compare.methods import METHODS
from ept.compare.report import table
from ept.compare.results import KEY, finished
from tiny_text import reviews, save_model, write_csv


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("sweep")
    save_model(place / "bert", pooling=True, max_position_embeddings=256)
    save_model(place / "t5", "t5", hf.AutoModelForSeq2SeqLM, eos_token_id=4)
    save_model(place / "llama", "llama", hf.AutoModelForCausalLM, max_position_embeddings=256)
    (place / "reviews").mkdir()
    for split, n in (("train", 32), ("dev", 16), ("test", 16)):
        write_csv(place / "reviews" / f"{split}.csv", reviews(n, seed=n))
    shutil.copytree(place / "reviews", place / "other" / "reviews")
    return place


def sweep(place, results, *more, model="bert") -> int:
    command = ["sweep", "--model_name_or_path", place / model, "--tasks", place / "reviews", "--results", results,
        "--max_steps", 2, "--batch_size", 4, "--max_seq_length", 32, *more]  # fmt: skip
    return main(list(map(str, command)))


def first_rate(method):
    return METHODS[method].learning_rates[1]


def test_a_sweep_that_was_cut_short_goes_on_repeats_nothing_and_shows_its_progress(
    place, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(fitting, "LINE_SECONDS", 0)
    results = tmp_path / "runs.jsonl"
    grid = ["--methods", "EPT", "head only", "--seeds", "0", "1", "--middle_rate"]
    assert sweep(place, results, *grid) == 0
    whole = results.read_text()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 4 and {(r["method"], r["seed"]) for r in finished(results)} == {
        ("EPT", 0), ("EPT", 1), ("head only", 0), ("head only", 1)}  # fmt: skip
    results.write_text("".join(lines[:3]) + lines[3][:40])  # killed while it wrote the last line
    assert len(finished(results)) == 3
    capsys.readouterr()
    assert sweep(place, results, *grid) == 0
    said = capsys.readouterr().err.splitlines()
    assert "4 runs, 3 of them finished" in said[0]
    name = f"reviews, head only, rate {first_rate('head only'):g}, seed 1"
    steps = [f"{name}: step {n} of 2" for n in (1, 2)]
    assert (
        f"run 1 of 1: {name}, 2 steps" in said and [line[: len(steps[0])] for line in said if ": step" in line] == steps
    )
    assert sum(line.startswith(f"{name}: test ") for line in said) == 1
    again = results.read_text().splitlines(keepends=True)
    assert again[:3] == lines[:3] and len(again) == 4
    last, first = json.loads(again[3]), json.loads(lines[3])
    assert last["metrics"] == first["metrics"] and list(first["metrics"]) == ["validation", "test"]
    assert first["machine"]["torch"] and first["trained_parameters"] > 0


@pytest.mark.parametrize("model, methods", [
    ("t5", ["EPT", "LoRA", "prompt tuning 20"]), ("llama", ["EPT", "LoRA", "prompt tuning 20"]),
])  # fmt: skip
def test_every_kind_of_model_runs_its_methods(model, methods, place, tmp_path):
    assert sweep(place, tmp_path / "runs", "--methods", *methods, "--seeds", 0, "--middle_rate", model=model) == 0
    metric = "exact_match" if model == "t5" else "accuracy"
    assert [next(iter(record["metrics"]["test"])) for record in finished(tmp_path / "runs")] == [metric] * 3


def test_frozen_weights_in_half_precision_are_not_those_of_methods_that_train_them(place, tmp_path):
    methods = ["EPT", "LoRA", "prompt tuning 20", "head only", "BitFit"]
    grid = ["--methods", *methods, "--seeds", 0, "--middle_rate", "--dtype", "bfloat16"]
    assert sweep(place, tmp_path / "runs", *grid) == 0
    kinds = [record["dtype"] for record in finished(tmp_path / "runs")]
    assert kinds == ["bfloat16"] * 4 + ["float32"]


def test_a_directory_of_own_files_may_be_called_like_a_benchmarks_task(place, tmp_path):
    rows = [{"text": text, "label": label} for text, label in reviews(16)]
    for name, written in (
        ("own/RTE", rows),
        ("glue/SST-2", [{"sentence": r["text"], "label": 1, "idx": 0} for r in rows]),
    ):
        (tmp_path / name).mkdir(parents=True)
        for split in ("train", "validation"):
            text = "".join(json.dumps(row) + "\n" for row in written)
            (tmp_path / name / f"{split}.jsonl").write_text(text)
    tasks = ["--tasks", tmp_path / "own" / "RTE", tmp_path / "glue" / "SST-2"]
    assert sweep(place, tmp_path / "runs", *tasks, "--methods", "head only", "--seeds", 0, "--middle_rate") == 0
    records = finished(tmp_path / "runs")
    assert [record["task"] for record in records] == ["own/RTE", "sst2"]
    assert "f1" in records[0]["metrics"]["validation"] and "f1" not in records[1]["metrics"]["validation"]


@pytest.mark.parametrize("options, said", [
    (["--methods", "EPT2"], "unknown method 'EPT2'"), (["--tasks", "nowhere"], "unknown task 'nowhere'"),
    (["--tasks", "{place}"], "has no train file"),
    (["--tasks", "{place}/reviews", "{place}/other/reviews"], "would both be reviews in the results"),
    (["--seeds", "1", "0", "1"], "the seed 1 is given twice"),
    (["--methods", "EPT", "EPT"], "the method EPT is given twice"),
    (["--learning_rates", "1", "1.0"], "the learning rate 1.0 is given twice"),
    (["--learning_rates", "1", "-1"], "--learning_rates 1.0 -1.0 must be finite and at least 0"),
    (["--results", "{place}"], "is a directory: give a file"),
])  # fmt: skip
def test_a_grid_that_cannot_run_is_one_line(options, said, place, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sweep(place, tmp_path / "runs", *(word.format(place=place) for word in options))
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and said in errors[0]


def test_a_row_that_cannot_be_judged_is_said_before_the_first_run(place, tmp_path, capsys):
    shutil.copytree(place / "reviews", tmp_path / "bad")
    write_csv(tmp_path / "bad" / "dev.csv", [("the film", "other")])
    grid = ["--tasks", place / "reviews", tmp_path / "bad", "--methods", "head only", "--seeds", 0, "--middle_rate"]
    with pytest.raises(SystemExit):
        sweep(place, tmp_path / "runs", *grid)
    assert "dev.csv, row 1: label 'other' is not among" in (said := capsys.readouterr().err) and "run 1 of" not in said
    assert finished(tmp_path / "runs") == []


def test_a_method_that_the_model_cannot_have_leaves_the_others_to_run(place, tmp_path, capsys):
    save_model(place / "flat", pooling=True, num_hidden_layers=1)
    grid = ["--methods", "EPT deep", "head only", "--seeds", 0, 1, "--middle_rate"]
    with pytest.raises(SystemExit):
        sweep(place, tmp_path / "runs", *grid, model="flat")
    assert "EPT deep: " in (said := capsys.readouterr().err) and "no layers after the first" in said
    assert [record["method"] for record in finished(tmp_path / "runs")] == ["head only"] * 2


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_error_says_what_to_install(place, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sweep(place, tmp_path / "runs", "--methods", "EPT", "--engine", "ray")
    assert "pip install 'ept[sweep]'" in capsys.readouterr().err


def test_ray_tune_gives_the_same_lines(place, tmp_path):
    pytest.importorskip("ray")
    assert sweep(place, tmp_path / "runs", "--methods", "EPT", "--seeds", 0, "--middle_rate", "--engine", "ray") == 0
    assert len(finished(tmp_path / "runs")) == 1


def record(method, rate, seed, validation, test, task="rte"):
    return dict.fromkeys(KEY, 1) | {
        "method": method, "learning_rate": rate, "seed": seed, "task": task, "trained_parameters": 5,
        "metrics": {"validation": {"accuracy": validation}, "test": {"accuracy": test}}, "machine": {"device": "a CPU"},
    }  # fmt: skip


def test_the_report_takes_the_rate_that_validates_best_and_compares_averages(tmp_path, capsys):
    records = [record("EPT", 1.0, 0, 0.8, 0.7), record("EPT", 1.0, 1, 0.8, 0.9), record("EPT", 2.0, 0, 0.7, 1.0),
        record("EPT", 2.0, 1, 0.7, 1.0), record("EPT", 3.0, 0, 0.9, 0.1), record("LoRA", 0.1, 0, 0.9, 0.5)]  # fmt: skip
    cell = table(records)["EPT"]["rte"]
    assert cell.rate == 1.0 and cell.mean == pytest.approx(0.8) and cell.spread == pytest.approx(0.02**0.5)
    (tmp_path / "runs").write_text("".join(json.dumps(r) + "\n" for r in records))
    command = ["report", "--results", tmp_path / "runs", "--picture", tmp_path / "table.png"]
    assert main(list(map(str, command))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| method | trained parameters | rte (accuracy) | average | EPT over it |"
    assert lines[2] == "| EPT | 5 | 0.800 ± 0.141 | 0.800 |  |"
    assert lines[3] == "| LoRA | 5 | 0.500 ± 0.000 (1) | 0.500 | +60.0% |"
    assert "Machine: device a CPU" in lines and (tmp_path / "table.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="differ in steps"):
        table([records[0], records[0] | {"steps": 7}])


def test_a_report_does_not_mix_two_directories_of_one_name():
    of_a, of_b = (record("EPT", 1.0, 0, 0.8, 0.7, task="movies") | {"data": name} for name in ("a/movies", "b/movies"))
    with pytest.raises(ValueError, match="runs of movies differ in data \\(a/movies, b/movies\\): report them apart"):
        table([of_a, of_b])
    from_hub, from_disk = (
        record("EPT", 1.0, seed, 0.8, 0.7) | {"data": data} for seed, data in ((0, None), (1, "rte"))
    )
    assert len(table([from_hub, from_disk])["EPT"]["rte"].scores) == 2
