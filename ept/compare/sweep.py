"""`ept sweep`: tasks × methods × learning rates × seeds, each run one JSON line in a results file.

A run whose settings stand in the file is not repeated, so a sweep that was killed goes on where it was. Runs follow
one another in this process, or lie side by side on the devices and machines of a Ray cluster.
"""

import functools
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import transformers

from ept.compare.methods import ABLATIONS, METHODS, TRAIN_THE_BACKBONE
from ept.console import say
from ept.machine import describe
from ept.model.start_values import token_counts
from ept.tasks.glue import BenchmarkTask, benchmark_task
from ept.version import __version__

__all__ = ["finished", "run_job"]

# What tells one run from another; a results file may hold any number of sweeps.
KEY = (
    "model", "task", "data", "method", "learning_rate", "seed", "steps", "batch_size", "max_seq_length", "budget",
    "dtype",
)  # fmt: skip
ENGINES = ("process", "ray")
TARGET_LENGTH = 32  # the longest label word of a benchmark has 6 tokens in T5
OWN_SPLITS = {"train": ("train",), "validation": ("validation", "dev", "val"), "test": ("test",)}


class Unfit(ValueError):
    """A method that the model cannot have; the message says why."""


def _grid(options: Any) -> list[dict[str, Any]]:
    """The runs' settings, the seeds outermost, so that a sweep that is cut short has all methods on some seeds."""
    known = METHODS | ABLATIONS
    for method in options.methods:
        if method not in known:
            raise ValueError(f"unknown method {method!r}: choose one of {', '.join(known)}")
    config = transformers.AutoConfig.from_pretrained(options.model_name_or_path)
    budget = options.budget or 100 * config.get_text_config().hidden_size
    return [
        {
            "model": options.model_name_or_path, "task": _name(task), "data": _data(task, options.data_dir),
            "method": method, "learning_rate": rate, "seed": seed, "steps": options.max_steps,
            "batch_size": options.batch_size, "max_seq_length": options.max_seq_length, "budget": budget,
            "dtype": "float32" if method in TRAIN_THE_BACKBONE else options.dtype,
        }
        for seed, task, method in itertools.product(options.seeds, options.tasks, options.methods)
        for rate in options.learning_rates or (known[method][1][1:2] if options.middle_rate else known[method][1])
    ]  # fmt: skip


def _benchmark(task: str) -> BenchmarkTask | None:
    """The benchmarks' task of a name or of a directory with its name; None for a directory of own files."""
    if not Path(task).is_dir():
        return benchmark_task(task)
    try:
        return benchmark_task(Path(task).resolve().name)
    except ValueError:
        return None


def _name(task: str) -> str:
    found = _benchmark(task)
    return Path(task).resolve().name if found is None else found.name


def _data(task: str, data_dir: str | None) -> str | None:
    """The directory with a task's files, or None for the hub's."""
    if Path(task).is_dir():
        return task
    if data_dir is None:
        return None
    found = benchmark_task(task)
    names = [name.lower() for name in (*found.folders, found.name)]
    below = [path for path in sorted(Path(data_dir).glob("*")) if path.is_dir() and path.name.lower() in names]
    if not below:
        raise ValueError(f"--data_dir {data_dir} has no directory {' or '.join(found.folders)}")
    return str(below[0])


def _key(record: dict[str, Any]) -> str:
    return json.dumps([record.get(name) for name in KEY])


def finished(path: Path) -> list[dict[str, Any]]:
    """The runs that stand in a results file; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError as error:
            if number == len(lines):
                continue
            raise ValueError(f"{path}, line {number}: not valid JSON ({error}): remove the line") from error
        if record is not None and not (isinstance(record, dict) and set(KEY) <= record.keys()):
            raise ValueError(f"{path}, line {number}: not a run of ept sweep: give another file, or remove the line")
        records += [] if record is None else [record]
    return records


def _keep(path: Path, record: dict[str, Any]) -> None:
    """Appends a finished run to the results file, and says it."""
    text = path.read_bytes() if path.is_file() else b""
    if text and not text.endswith(b"\n"):  # a kill cut the last line short
        path.write_bytes(text[: text.rfind(b"\n") + 1])
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    part, metrics = list(record["metrics"].items())[-1]
    name, value = next(iter(metrics.items()))
    say(
        f"{record['task']}, {record['method']}, rate {record['learning_rate']:g}, seed {record['seed']}: "
        f"{part} {name} {value:.3f} in {record['seconds']:.0f} s"
    )


# ---------------------------------------------------------------------- one run


@functools.lru_cache(maxsize=4)
def _problem(model: str, task: str, data: str | None) -> tuple[Any, dict[str, tuple[Any, str]]]:
    """What a task is for a kind of model, and its rows by split."""
    from ept.backbone.loading import is_causal, is_text_to_text
    from ept.data.tables import READERS, Columns, read_file
    from ept.tasks.glue_files import read_benchmark
    from ept.tasks.task import Problem

    kind = "text2text" if is_text_to_text(model) else "continuation" if is_causal(model) else None
    found = _benchmark(task if data is None else data)
    if found is not None:
        return Problem.of_benchmark(found, kind), read_benchmark(found, data, ("train", "validation"))
    tables, directory = {}, Path(task if data is None else data)
    for split, stems in OWN_SPLITS.items():
        files = [path for stem in stems for suffix in READERS if (path := directory / (stem + suffix)).is_file()]
        if files:
            tables[split] = (read_file(files[0]), str(files[0]))
    for split in ("train", "validation"):
        if split not in tables:
            raise ValueError(f"{data} has no {' or '.join(OWN_SPLITS[split])} file ({', '.join(READERS)})")
    return Problem.of_table(*tables["train"], Columns(), kind), tables


@functools.lru_cache(maxsize=1)
def _splits(model: str, task: str, data: str | None, max_seq_length: int) -> tuple[Any, Any, dict[str, Any]]:
    """A task's problem, the model's tokenizer, and its splits as tokens."""
    from ept.backbone.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    problem, tables = _problem(model, task, data)
    return problem, tokenizer, {
        split: problem.encode(table, source, tokenizer, max_seq_length, TARGET_LENGTH)
        for split, (table, source) in tables.items()
    }  # fmt: skip


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """One run of the grid: the job with its metrics by split, its parameters and seconds, and the machine."""
    from ept.backbone.embeddings import weight_of
    from ept.backbone.loading import load_backbone
    from ept.compare.fit import fit
    from ept.compare.methods import adapt
    from ept.tasks.predicting import predict_split

    started = time.perf_counter()
    problem, tokenizer, splits = _splits(job["model"], job["task"], job["data"], job["max_seq_length"])
    transformers.set_seed(job["seed"])
    base = load_backbone(
        job["model"], problem.kind, problem.label_names and list(problem.label_names), dtype=job["dtype"]
    )
    if base.config.pad_token_id is None:
        base.config.pad_token_id = tokenizer.pad_token_id
    rows = splits["train"].data.to_list()
    counts = token_counts([row["input_ids"] for row in rows], len(weight_of(base.get_input_embeddings())))
    try:
        model, groups = adapt(
            job["method"],
            base,
            budget=job["budget"],
            rate=job["learning_rate"],
            tokenizer=tokenizer,
            token_counts=counts,
        )
    except (ValueError, TypeError) as error:
        raise Unfit(str(error)) from error
    headed = problem.kind in ("classification", "regression")
    trace = fit(
        model, groups, rows, tokenizer, steps=job["steps"], batch_size=job["batch_size"], seed=job["seed"],
        collate=None if headed else problem.collator(tokenizer),
    )  # fmt: skip
    metrics = {
        name: problem.metrics(predict_split(model, problem, split, tokenizer, 64, TARGET_LENGTH, None), split)
        for name, split in splits.items()
        if name != "train"
    }
    return job | {
        "metrics": metrics,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "train_loss": statistics.mean(trace.losses[-5:]),
        "step_seconds": statistics.median(trace.step_seconds),
        "seconds": time.perf_counter() - started,
        "machine": describe() | {"ept": __version__},
    }


# ---------------------------------------------------------------------- side by side


def _with_ray(jobs: list[dict[str, Any]], options: Any, path: Path) -> None:
    """Runs the jobs as trials of Ray Tune, each on its share of a device, and keeps each record as it comes.

    A worker loads data and model itself, so their paths must hold on every machine.
    """
    try:
        from ray import tune
    except ImportError as error:
        raise ImportError("--engine ray needs Ray Tune: pip install 'ept[sweep]', or leave it out") from error

    class Keep(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            _keep(path, trial.last_result["record"])

    def trial(config: dict[str, Any]) -> dict[str, Any]:
        return {"record": run_job(config["job"])}

    share = {"cpu": options.cpus_per_run, "gpu": options.gpus_per_run}
    results = tune.Tuner(
        tune.with_resources(trial, share),
        param_space={"job": tune.grid_search(jobs)},
        run_config=tune.RunConfig(callbacks=[Keep()]),
    ).fit()
    if results.errors:
        raise RuntimeError(f"{len(results.errors)} of {len(jobs)} runs failed, the first with: {results.errors[0]}")
