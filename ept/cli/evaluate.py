"""`ept eval`: an adapter's metrics on labelled rows."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from ept.backbone.loading import input_limit
from ept.cli.errors import bad_input_is_one_line
from ept.cli.options import DATA_DIR_HELP, TASK_HELP, THRESHOLD_HELP, AdapterDirArguments, ColumnArguments
from ept.cli.parser import OptionParser, option
from ept.cli.shared import check_prompt_start
from ept.data.columns import Columns
from ept.data.labels import Labels
from ept.data.tables import read_file, read_hub
from ept.pretrained import SavedAdapter
from ept.tasks.glue import Rows, benchmark_task
from ept.tasks.glue_files import read_benchmark
from ept.tasks.kind import TaskKind
from ept.tasks.predicting import predict
from ept.tasks.task import Task

__all__ = ["TestDataArguments", "run"]


@dataclass
class TestDataArguments:
    _argument_group_name = "data: a csv, tsv, jsonl or parquet file, or a data set of the hub"

    test_file: str | None = option("Rows to evaluate on.")
    dataset_name: str | None = option("Hub data set in place of the file.")
    dataset_config_name: str | None = option("Configuration of the hub data set.")
    dataset_split: str | None = option("Split of the hub data set or the task; by default test, for a task validation.")
    task_name: str | None = option(TASK_HELP)
    data_dir: str | None = option(DATA_DIR_HELP)
    threshold: float | None = option(THRESHOLD_HELP)
    per_device_eval_batch_size: int = option("Rows at a time.", 32, aliases=["--batch_size"])


def run(argv: list[str]) -> None:
    """`ept eval`: the metrics of an adapter on labelled rows, as JSON on the last line."""
    with bad_input_is_one_line("eval"):
        parser = OptionParser(
            "eval",
            "Evaluates an adapter on labelled text; the last line printed is the metrics as JSON.",
            AdapterDirArguments,
            TestDataArguments,
            ColumnArguments,
        )
        place, data, columns = parser.parse(argv)
        saved_adapter = SavedAdapter.open(place.adapter, revision=place.revision)
        tables, chosen = _read_tables(data, columns, saved_adapter.record, type(saved_adapter.kind()))
        model, tokenizer, kind = saved_adapter.load(place.model_name_or_path, dtype=place.dtype)
        if data.threshold is not None:
            kind = kind.with_threshold(data.threshold)
        task = _task(kind, data.task_name, chosen)
        max_length = columns.max_seq_length or saved_adapter.max_length
        max_length = input_limit(model.base_model, tokenizer, model.ept_config.prompt_length, max_length)
        splits = {
            name: task.encode(table, source, tokenizer, max_length, columns.max_target_length)
            for name, (table, source) in tables.items()
        }
        for split in splits.values():
            check_prompt_start(model, split.data, split.source)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        model.gate_weights()  # an implementation that cannot run here says so
    predictor = kind.predictor(model, tokenizer, kind.target_limit(max_length, columns.max_target_length))
    metrics: dict[str, Any] = {}
    for split in splits.values():
        predictions = predict(predictor, split.data, data.per_device_eval_batch_size, "Evaluating")
        suffix = "_mismatched" if metrics else ""  # MNLI's second part, after the one that the paper reports
        metrics |= {metric + suffix: value for metric, value in task.metrics(predictions, split).items()}
        own = task.benchmark is None  # a benchmark's task has its published metrics alone
        loss = kind.loss(model, tokenizer, split.data, data.per_device_eval_batch_size) if own else None
        if loss is not None:
            metrics["loss" + suffix] = loss
    print(json.dumps(metrics | {"rows": sum(len(split.data) for split in splits.values())}))


def _read_tables(
    data: TestDataArguments, columns: ColumnArguments, record: dict[str, Any], kind: type[TaskKind]
) -> tuple[dict[str, tuple[Dataset | Rows, str]], Columns]:
    """Reads the rows to evaluate on; returns them and their source by split, and their columns (of own files)."""
    if data.task_name is not None:
        return dict(_read_benchmark(data)), Columns()
    if data.data_dir is not None:
        raise ValueError("--data_dir holds a benchmark's task: say which with --task_name")
    split = data.dataset_split or "test"
    if data.test_file is not None:
        source = data.test_file
        table = read_file(source, header=not (columns.no_header or record.get("no_header", False)))
    elif data.dataset_name is not None:
        source = f"{data.dataset_name} ({split})"
        table = read_hub(data.dataset_name, data.dataset_config_name, split)
        if table is None:
            raise ValueError(f"{data.dataset_name} has no split {split!r}: give --dataset_split")
    else:
        raise ValueError("say what to evaluate on with --test_file (or --dataset_name, or --task_name)")
    trained_on = record.get("columns", {})
    wanted = Columns(
        columns.text_column or trained_on.get("text"),
        columns.text_pair_column or trained_on.get("text_pair"),
        columns.label_column or trained_on.get("label"),
        columns.label_separator or trained_on.get("label_separator"),
    )
    return {split: (table, source)}, kind.choose_columns(table, source, wanted)


def _read_benchmark(data: TestDataArguments) -> dict[str, tuple[Rows, str]]:
    """Reads the rows of a benchmark's task, of MNLI's validation both parts."""
    if data.test_file or data.dataset_name:
        raise ValueError("--task_name brings its own rows: give --data_dir (or nothing, for the hub's), no other data")
    task, split = benchmark_task(str(data.task_name)), data.dataset_split or "validation"
    if split not in ("train", "validation", "test"):
        raise ValueError(f"--dataset_split {split}: a task has train, validation and test")
    also = ("validation_mismatched",) if split == "validation" and task.name == "mnli" else ()
    return read_benchmark(task, data.data_dir, (split, *also))


def _task(kind: TaskKind, task_name: str | None, columns: Columns) -> Task:
    """Returns the task that an adapter learned, on these columns or on a benchmark's task of this name."""
    if task_name is None:
        return Task(kind, columns)
    task = Task.of_benchmark(benchmark_task(task_name), kind.name)
    names, of_task = kind.label_names or (), task.kind.label_names or ()
    # An adapter of another library has numbered labels: its classes have the benchmark's order, the hub's too.
    is_numbered = Labels(names).unnamed and len(names) == len(of_task)
    if names != of_task and not is_numbered:
        raise ValueError(
            f"the adapter knows the labels {', '.join(names)}, not those of {task_name}, {', '.join(of_task)}: "
            "evaluate it on the task that it was trained on"
        )
    return task
