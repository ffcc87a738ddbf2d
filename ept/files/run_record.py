"""run.json: what `ept train` notes beside the adapter."""

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["RUN_NAME", "read_record", "write_record"]

RUN_NAME = "run.json"


def write_record(output_dir: str | os.PathLike, record: dict[str, Any]) -> None:
    """Writes the record of a run into a directory; a kill leaves the old one or the new one."""
    path = Path(output_dir) / RUN_NAME
    path.with_suffix(".new").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(path.with_suffix(".new"), path)


def read_record(directory: str | os.PathLike) -> dict[str, Any]:
    """Reads what `ept train` wrote beside an adapter; empty for an adapter that was saved from Python.

    Raises:
        ValueError: the file is damaged, or what is read from it has another type.
    """
    path = Path(directory) / RUN_NAME
    if not path.is_file():
        return {}
    hint = "the file is damaged, copy it again, or remove it and name the columns"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): {hint}") from error
    columns = record.get("columns", {}) if isinstance(record, dict) else None
    if not isinstance(columns, dict) or not all(isinstance(name, str | None) for name in columns.values()):
        raise ValueError(f"{path} holds no run with its columns: {hint}")
    if not isinstance(record.get("task_name"), str | None):
        raise ValueError(f"{path}: task_name is {record['task_name']!r}, not a task's name: {hint}")
    limit = record.get("max_seq_length")
    if limit is not None and not (type(limit) is int and limit > 0):
        raise ValueError(f"{path}: max_seq_length is {limit!r}, not a number of tokens: {hint}")
    return record
