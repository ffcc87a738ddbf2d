"""Reads the published files of GLUE and SuperGLUE."""

import re
from pathlib import Path
from typing import Any

from ept.console import say
from ept.data.rows import json_objects, text_lines
from ept.data.tables import read_hub, read_parquet_files
from ept.tasks.glue import BenchmarkTask, Rows

__all__ = ["read_benchmark", "read_task"]

SPLITS = {
    "train": ("train", "msr_paraphrase_train"),
    "validation": ("dev", "val", "validation", "dev_matched", "validation_matched"),
    "validation_mismatched": ("dev_mismatched", "validation_mismatched"),
    "validation_out_of_domain": ("out_of_domain_dev",),
    "test": ("test", "test_matched", "msr_paraphrase_test"),
    "test_mismatched": ("test_mismatched",),
}

# What CoLA's files have where others have a header: their columns, by number.
COLA_COLUMNS = ["source", "label", "mark", "sentence"]


def read_benchmark(task: BenchmarkTask, data_dir: str | None, splits: tuple[str, ...]) -> dict[str, tuple[Rows, str]]:
    """Reads the splits that there are: rows and source by split. ValueError if the first split is missing."""
    rows_by_split = {split: read_task(task, split, data_dir) for split in splits}
    if rows_by_split[splits[0]] is None:
        raise ValueError(
            f"{data_dir or task.hub} holds no {splits[0]} file of {task.name}: GLUE has train.tsv and dev.tsv, "
            "SuperGLUE train.jsonl and val.jsonl"
        )
    return {split: rows for split, rows in rows_by_split.items() if rows is not None}


def read_task(task: BenchmarkTask, split: str, data_dir: str | None = None) -> tuple[Rows, str] | None:
    """Reads a split; returns its rows and where they are from, or None where there is no such split.

    Args:
        split: "train", "validation", "validation_mismatched" (MNLI), "validation_out_of_domain" (CoLA) or "test".
        data_dir: the directory with the task's files, or the one that holds it under the benchmark's own name; None
            asks the hub.

    Raises:
        ValueError: the directory, a file or a row is not the task's, with the file and the row.
    """
    if data_dir is None:
        hub = {"validation": "validation_matched"}.get(split, split) if task.name == "mnli" else split
        # SuperGLUE's "wsc.fixed" has the span indices corrected.
        table = read_hub(f"nyu-mll/{task.hub}" if task.hub == "glue" else f"aps/{task.hub}",
                         "wsc.fixed" if task.name == "wsc" else task.name, hub)  # fmt: skip
        source = f"{task.hub}/{task.name} ({hub})"
        return None if table is None else (_rows(task, list(enumerate(table.to_list(), start=1)), source), source)
    files = _files(task, split, Path(data_dir))
    if not files:
        return None
    suffix, source = files[0].suffix.lower(), str(files[0])
    if suffix == ".parquet":
        numbered = list(enumerate(read_parquet_files(files).to_list(), start=1))
    elif suffix in (".jsonl", ".json"):
        numbered = list(json_objects(files[0], "one object per line"))
    else:
        numbered = _tsv(task, files[0])
    rows = _rows(task, numbered, source)
    if not len(rows):
        raise ValueError(f"{source} holds no rows")
    return rows, source


def _files(task: BenchmarkTask, split: str, directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise ValueError(f"`data_dir={directory}` is no directory: give the one that holds {task.name}'s files")
    names = (*task.folders, task.name)
    below = [
        path for path in sorted(directory.iterdir()) if path.is_dir() and path.name.lower() in map(str.lower, names)
    ]
    for place in (directory, *below):
        for stem in SPLITS[split]:
            for suffix in (".tsv", ".jsonl", ".json", ".txt", ".parquet"):
                if (place / (stem + suffix)).is_file():
                    return [place / (stem + suffix)]
            shards = sorted(
                p for p in place.glob(f"{stem}-*.parquet") if re.fullmatch(r"\d+-of-\d+", p.stem[len(stem) + 1 :])
            )
            if shards:
                return shards
    return []


def _tsv(task: BenchmarkTask, path: Path) -> list[tuple[int, dict[str, Any]]]:
    """GLUE's tsv: a quotation mark is a character like any other; CoLA's labelled files have no header. Lines with
    fewer fields than the columns that are read are left out, as some of QQP's, and counted."""
    lines = [
        (n, line.removesuffix("\n").removesuffix("\r").split("\t"))
        for n, line in enumerate(text_lines(path, newline="\n"), start=1)
        if line.strip()
    ]
    if not lines:
        raise ValueError(f"{path} is empty: give a file with at least one row")
    header = lines[0][1]
    if task.name == "cola" and "sentence" not in header:
        if len(header) != len(COLA_COLUMNS):
            raise ValueError(f"{path}, line 1: {len(header)} fields where CoLA has {', '.join(COLA_COLUMNS)}")
        header = COLA_COLUMNS
    else:
        lines = lines[1:]
    wanted = [name for names in (*task.columns.values(), task.label_columns) for name in names if name in header]
    places = {name: header.index(name) for name in dict.fromkeys(wanted)}
    last = max(places.values(), default=0)
    rows = [(n, {name: fields[at] for name, at in places.items()}) for n, fields in lines if len(fields) > last]
    longer = [n for n, fields in lines if len(fields) > len(header)]
    if longer:
        say(
            f"{path}: {len(longer)} lines have more fields than the header (a tab inside a text?), the first is line {longer[0]}"
        )
    if len(rows) < len(lines):
        short = next(n for n, fields in lines if len(fields) <= last)
        say(f"{path}: {len(lines) - len(rows)} lines with too few fields are left out, the first is line {short}")
    return rows


def _flat(task: BenchmarkTask, row: dict[str, Any]) -> list[dict[str, Any]]:
    """A published object as rows of the hub's form: MultiRC's passage with questions with answers as one row for each
    answer, WSC's target beside its text; what has that form already as it is."""
    passage = row.get("passage")
    if task.name == "wsc":
        return [row | (row.get("target") or {})]
    if task.name != "multirc" or not isinstance(passage, dict):
        return [row]
    return [
        {
            "paragraph": passage["text"], "question": question["question"], "answer": answer["text"],
            "label": answer.get("label"), "idx": {"paragraph": row["idx"], "question": question["idx"]},
        }
        for question in passage["questions"] for answer in question["answers"]
    ]  # fmt: skip


def _rows(task: BenchmarkTask, numbered: list[tuple[int, dict[str, Any]]], source: str) -> Rows:
    """Makes Rows of numbered lines (or table rows). ValueError names the first line that is no row of the task."""
    fields, labels, groups = [], [], []
    for number, published in numbered:
        try:
            for row in _flat(task, published):
                values = {name: _column(row, names) for name, names in task.columns.items()}
                values = task.prepare(values) if task.prepare else values
                fields.append({name: _text(value, name) for name, value in values.items()})
                labels.append(_label(task, row))
                if task.name == "multirc":
                    groups.append((int(row["idx"]["paragraph"]), int(row["idx"]["question"])))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{source}, line {number}: not a row of {task.name} ({error!r})") from error
        except ValueError as error:
            raise ValueError(f"{source}, line {number}: {error}") from error
    return Rows(fields, labels, groups if task.name == "multirc" else None)


def _column(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"it has no {' or '.join(names)}, only {', '.join(map(str, row))}")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}, not text")
    return value


def _label(task: BenchmarkTask, row: dict[str, Any]) -> int | float | None:
    """Returns a class number or score from a word, a number, True or False; None where it is missing (also "-" and -1)."""
    value = next((row[name] for name in task.label_columns if row.get(name) is not None), None)
    if value is None or str(value).strip() in ("", "-", "-1", "-1.0"):
        return None
    word = str(value).strip()
    if task.is_regression:
        try:
            score = float(word)
        except ValueError:
            score = -1.0
        if not 0 <= score <= 5:
            raise ValueError(f"the score {word!r} is not a number from 0 to 5")
        return score
    if word.lower() in ("true", "false"):
        word = word.capitalize()
    if word in task.labels:
        return task.labels.index(word)
    if word.isdecimal() and int(word) < len(task.labels):
        return int(word)
    raise ValueError(f"the label {word!r} is not one of {', '.join(task.labels)}")
