"""`ept eval`: an adapter's metrics on labelled rows."""

import json
from typing import Any

import torch

from ept.cli.shared import _check_prompt_start, _label_names, _label_words
from ept.console import bad_input_is_one_line
from ept.files.run_record import _read_record
from ept.model.model import EPTModel

__all__ = ["evaluate"]


def evaluate(argv: list[str]) -> None:
    """`ept eval`: the metrics of an adapter on labelled rows, as JSON on the last line."""
    with bad_input_is_one_line("eval"):
        from ept.backbone.loading import input_limit
        from ept.cli.options import eval_parser
        from ept.pretrained import load_adapter
        from ept.tasks.predicting import predict_split

        where, files, given = eval_parser().parse(argv)
        record = _read_record(where.adapter)
        tables, columns = _read_evaluated(files, given, record)
        model, tokenizer, kind = load_adapter(where.adapter, where.model_name_or_path, dtype=where.dtype)
        problem = _evaluated_problem(model, kind, files, columns, record)
        limit = given.max_seq_length or record.get("max_seq_length")
        limit = input_limit(model.base_model, tokenizer, model.ept_config.prompt_length, limit)
        splits = {
            name: problem.encode(table, source, tokenizer, limit, given.max_target_length)
            for name, (table, source) in tables.items()
        }
        for split in splits.values():
            _check_prompt_start(model, split.data, split.source)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        model.gate_weights()  # an implementation that cannot run here says so
    metrics: dict[str, Any] = {}
    for split in splits.values():
        predictions = predict_split(model, problem, split, tokenizer, files.batch_size, given.max_target_length)
        suffix = "_mismatched" if metrics else ""  # MNLI's second part, after the one that the paper reports
        metrics |= {metric + suffix: value for metric, value in problem.metrics(predictions, split).items()}
    print(json.dumps(metrics | {"rows": sum(len(split.data) for split in splits.values())}))


def _read_evaluated(files: Any, given: Any, record: dict[str, Any]) -> tuple[dict[str, tuple[Any, str]], Any]:
    """The rows to evaluate on and their source, by split, and their columns (None for a benchmark's task)."""
    from ept.data.tables import Columns, choose_columns, read_file, read_hub
    from ept.tasks.glue import benchmark_task
    from ept.tasks.glue_files import read_benchmark

    if files.task_name is not None:
        if files.test_file or files.dataset_name:
            raise ValueError(
                "--task_name brings its own rows: give --data_dir (or nothing, for the hub's), no other data"
            )
        task, split = benchmark_task(files.task_name), files.dataset_split or "validation"
        if split not in ("train", "validation", "test"):
            raise ValueError(f"--dataset_split {split}: a task has train, validation and test")
        also = ("validation_mismatched",) if split == "validation" and task.name == "mnli" else ()
        return read_benchmark(task, files.data_dir, (split, *also)), None
    if files.data_dir is not None:
        raise ValueError("--data_dir holds a benchmark's task: say which with --task_name")
    split = files.dataset_split or "test"
    if files.test_file is not None:
        source = files.test_file
        table = read_file(source, header=not (given.no_header or record.get("no_header", False)))
    elif files.dataset_name is not None:
        source = f"{files.dataset_name} ({split})"
        table = read_hub(files.dataset_name, files.dataset_config_name, split)
        if table is None:
            raise ValueError(f"{files.dataset_name} has no split {split!r}: give --dataset_split")
    else:
        raise ValueError("say what to evaluate on with --test_file (or --dataset_name, or --task_name)")
    trained_on = record.get("columns", {})
    wanted = Columns(**{k: getattr(given, f"{k}_column") or trained_on.get(k) for k in ("text", "text_pair", "label")})
    return {split: (table, source)}, choose_columns(table, source, wanted)


def _evaluated_problem(model: EPTModel, kind: str, files: Any, columns: Any, record: dict[str, Any]) -> Any:
    """The problem that an adapter learned, on these columns or this task."""
    from ept.data.labels import Labels
    from ept.data.tables import Columns
    from ept.tasks.glue import benchmark_task
    from ept.tasks.task import Problem

    names = None
    if kind == "classification":
        names = tuple(_label_names(model))
    elif kind == "continuation":
        names = _label_words(record, model)
    if files.task_name is None:
        return Problem(kind, names, columns)
    task = benchmark_task(files.task_name)
    own = Problem.of_benchmark(task, kind)
    if names is not None and Labels(names).unnamed and len(names) == len(own.label_names or ()):
        names = own.label_names  # an adapter of another library: its classes have the benchmark's order, the hub's too
    if names != own.label_names:
        raise ValueError(
            f"the adapter knows the labels {', '.join(names or ())}, not {task.name}'s {', '.join(own.label_names or ())}: "
            "evaluate it on the task that it was trained on"
        )
    return Problem(kind, names, Columns(), task)
