"""The results file of a sweep: one JSON line for each finished run."""

import json
from pathlib import Path
from typing import Any

__all__ = ["KEY", "append", "finished", "key_of"]

# What tells one run from another; a results file may hold any number of sweeps.
KEY = (
    "model", "task", "data", "method", "learning_rate", "seed", "steps", "batch_size", "max_seq_length", "budget",
    "dtype",
)  # fmt: skip


def key_of(record: dict[str, Any]) -> str:
    """Returns what tells a run, finished or not, from others."""
    return json.dumps([record.get(name) for name in KEY])


def finished(path: Path) -> list[dict[str, Any]]:
    """Reads the runs in a results file; a last line that a kill cut short is left out."""
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


def append(path: Path, record: dict[str, Any]) -> None:
    """Adds a finished run to a results file, over a last line that a kill cut short."""
    text = path.read_bytes() if path.is_file() else b""
    if text and not text.endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
