"""A sweep: tasks × methods × learning rates × seeds, each run one JSON line in a results file.

A run whose settings stand in the file is not repeated, so a sweep that was killed goes on where it was. Runs follow
one another in this process, or lie side by side on the devices and machines of a Ray cluster.
"""

import functools
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ept.backbone.embeddings import weight_of
from ept.backbone.loading import load_tokenizer, pad_like_tokenizer
from ept.compare.fit import fit
from ept.compare.methods import ABLATIONS, METHODS, adapt
from ept.compare.results import append
from ept.console import say
from ept.data.columns import Columns
from ept.data.rows import SUFFIXES
from ept.data.tables import read_file
from ept.machine import describe
from ept.model.start_values import token_counts
from ept.tasks.glue import BenchmarkTask, Rows, benchmark_task
from ept.tasks.glue_files import read_benchmark, read_task
from ept.tasks.kinds import default_kind
from ept.tasks.predicting import predict
from ept.tasks.task import Split, Task
from ept.version import __version__

__all__ = ["Unfit", "grid", "keep", "name_of_run", "read_tasks", "run_job", "run_on_ray"]

TARGET_LENGTH = 32  # the longest label word of a benchmark has 6 tokens in T5
STEMS = {"train": ("train",), "validation": ("validation", "dev", "val"), "test": ("test",)}  # of own files, by split

Job = dict[str, Any]


class Unfit(ValueError):
    """A method that the model cannot have; the message says why."""


def grid(options: Any) -> list[Job]:
    """Lists the runs' settings, the seeds outermost, so that a sweep that is cut short has all methods on some seeds.

    Args:
        options: with the attributes of `ept.cli.sweep.SweepArguments`.

    Raises:
        ValueError: there is no such method, task or directory, or one thing twice.
    """
    methods = METHODS | ABLATIONS
    for name in options.methods:
        if name not in methods:
            raise ValueError(f"unknown method {name!r}: choose one of {', '.join(methods)}")
    config = transformers.AutoConfig.from_pretrained(options.model_name_or_path)
    budget = options.budget or 100 * config.get_text_config().hidden_size
    for what, given in (
        ("method", options.methods), ("seed", options.seeds), ("learning rate", options.learning_rates)
    ):  # fmt: skip
        for value in given:
            if given.count(value) > 1:
                raise ValueError(f"the {what} {value} is given twice: leave one out")
    jobs = []
    for seed, (task, data), name in itertools.product(options.seeds, _named_tasks(options), options.methods):
        method = methods[name]
        of_method = method.learning_rates[1:2] if options.middle_rate else method.learning_rates
        for rate in options.learning_rates or of_method:
            jobs.append({
                "model": options.model_name_or_path, "task": task, "data": data,
                "method": name, "learning_rate": rate, "seed": seed, "steps": options.max_steps,
                "batch_size": options.batch_size, "max_seq_length": options.max_seq_length, "budget": budget,
                "dtype": "float32" if method.trains_backbone else options.dtype,
            })  # fmt: skip
    return jobs


def read_tasks(jobs: list[Job]) -> None:
    """Reads and encodes every task's rows once. ValueError says which cannot be read, or trained and judged on."""
    tasks = {(job["model"], job["task"], job["data"], job["max_seq_length"]): None for job in jobs}
    for task in reversed(tasks):  # the first run's is kept
        _splits(*task)


def name_of_run(job: Job) -> str:
    """Names a run by what it does not share with all others."""
    return f"{job['task']}, {job['method']}, rate {job['learning_rate']:g}, seed {job['seed']}"


def run_job(job: Job, description: str | None = None) -> dict[str, Any]:
    """Runs one job of the grid; returns it with its metrics by split, its parameters and seconds, and the machine.

    Args:
        description: what its progress is shown under; None shows none.
    """
    started = time.perf_counter()
    task, tokenizer, splits = _splits(job["model"], job["task"], job["data"], job["max_seq_length"])
    transformers.set_seed(job["seed"])
    base = task.kind.load_backbone(job["model"], dtype=job["dtype"])
    pad_like_tokenizer(base, tokenizer)
    rows = splits["train"].data.to_list()
    counts = token_counts([row["input_ids"] for row in rows], len(weight_of(base.get_input_embeddings())))
    try:
        model, groups = adapt(
            job["method"], base, budget=job["budget"], rate=job["learning_rate"], tokenizer=tokenizer,
            token_counts=counts,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise Unfit(str(error)) from error
    trace = fit(
        model, groups, rows, tokenizer, steps=job["steps"], batch_size=job["batch_size"], seed=job["seed"],
        description=description, collate=task.kind.collator(tokenizer, model),
    )  # fmt: skip
    predictor = task.kind.predictor(model, tokenizer, TARGET_LENGTH)
    metrics = {
        name: task.metrics(predict(predictor, split.data, batch_size=64), split)
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


def keep(path: Path, record: dict[str, Any]) -> None:
    """Appends a finished run to the results file, and says it."""
    append(path, record)
    part, metrics = list(record["metrics"].items())[-1]
    name, value = next(iter(metrics.items()))
    say(f"{name_of_run(record)}: {part} {name} {value:.3f} in {record['seconds']:.0f} s")


def run_on_ray(jobs: list[Job], path: Path, *, cpus_per_run: float, gpus_per_run: float) -> None:
    """Runs the jobs as trials of Ray Tune, each on its share of a device, and keeps each record as it comes.

    A worker loads data and model itself, so their paths must hold on every machine.
    """
    try:
        from ray import tune
    except ImportError as error:
        raise ImportError("Ray Tune is not installed: pip install 'ept[sweep]', or run in this process") from error

    class Keep(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            keep(path, trial.last_result["record"])

    def trial(config: dict[str, Any]) -> dict[str, Any]:
        return {"record": run_job(config["job"])}

    results = tune.Tuner(
        tune.with_resources(trial, {"cpu": cpus_per_run, "gpu": gpus_per_run}),
        param_space={"job": tune.grid_search(jobs)},
        run_config=tune.RunConfig(callbacks=[Keep()]),
    ).fit()
    if results.errors:
        raise RuntimeError(f"{len(results.errors)} of {len(jobs)} runs failed, the first with: {results.errors[0]}")


# ---------------------------------------------------------------------- tasks


def _named_benchmark(name: str) -> BenchmarkTask | None:
    """Finds the benchmarks' task of a name; None where there is none."""
    try:
        return benchmark_task(name)
    except ValueError:
        return None


def _named_tasks(options: Any) -> list[tuple[str, str | None]]:
    """Returns each task's name in the results, and the directory with its files; ValueError where two have one name."""
    given_as: dict[str, str] = {}
    for task in options.tasks:
        name = _name_of(task)
        if name in given_as:
            raise ValueError(
                f"the tasks {given_as[name]} and {task} would both be {name} in the results: leave one out, or rename a "
                "directory"
            )
        given_as[name] = task
    return [(name, _files_of(task, options.data_dir)) for name, task in given_as.items()]


def _name_of(task: str) -> str:
    """Names a task in the results: a benchmark's by its name, a directory of own files by the directory's.

    One that is called like a benchmark's task is own/rte, so that it is not taken for that.
    """
    if not Path(task).is_dir():
        return benchmark_task(task).name
    directory = Path(task).resolve()
    benchmark = _named_benchmark(directory.name)
    if benchmark is None:
        return directory.name
    return benchmark.name if _is_published(benchmark, directory) else f"{directory.parent.name}/{directory.name}"


def _is_published(benchmark: BenchmarkTask, directory: Path) -> bool:
    """Tells whether the train file in a directory is the benchmark's; says why, where there is one that is not."""
    try:
        return read_task(benchmark, "train", str(directory)) is not None
    except ValueError as error:
        say(f"{directory} is read as files of your own, since its train file is none of {benchmark.name}'s: {error}")
        return False


def _files_of(task: str, data_dir: str | None) -> str | None:
    """Returns the directory with a task's files, or None for the hub's."""
    if Path(task).is_dir():
        return task
    if data_dir is None:
        return None
    benchmark = benchmark_task(task)
    names = [name.lower() for name in (*benchmark.folders, benchmark.name)]
    below = [path for path in sorted(Path(data_dir).glob("*")) if path.is_dir() and path.name.lower() in names]
    if not below:
        raise ValueError(f"`data_dir={data_dir}` has no directory {' or '.join(benchmark.folders)}")
    return str(below[0])


@functools.lru_cache(maxsize=4)
def _read_task(model: str, task: str, data: str | None) -> tuple[Task, dict[str, tuple[Dataset | Rows, str]]]:
    """Reads what a task is for a kind of model, and its rows by split."""
    kind = default_kind(model, causal_continues=True)
    benchmark = _named_benchmark(task)
    if benchmark is not None:
        return Task.of_benchmark(benchmark, kind), dict(read_benchmark(benchmark, data, ("train", "validation")))
    tables, directory = {}, Path(task if data is None else data)
    for split, stems in STEMS.items():
        files = [path for stem in stems for suffix in SUFFIXES if (path := directory / (stem + suffix)).is_file()]
        if files:
            tables[split] = (read_file(files[0]), str(files[0]))
    for split in ("train", "validation"):
        if split not in tables:
            raise ValueError(f"{data} has no {' or '.join(STEMS[split])} file ({', '.join(SUFFIXES)})")
    return Task.of_table(*tables["train"], Columns(), kind), dict(tables)


@functools.lru_cache(maxsize=1)
def _splits(
    model: str, task_name: str, data: str | None, max_length: int
) -> tuple[Task, PreTrainedTokenizerBase, dict[str, Split]]:
    """Returns a task, the model's tokenizer, and the task's splits as tokens."""
    tokenizer = load_tokenizer(model)
    task, tables = _read_task(model, task_name, data)
    return task, tokenizer, {
        split: task.encode(table, source, tokenizer, max_length, TARGET_LENGTH)
        for split, (table, source) in tables.items()
    }  # fmt: skip
