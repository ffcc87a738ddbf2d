"""Where `ept predict` writes: lines on standard output or in a file, or objects in a jsonl file; it goes on with a file
that an interrupted run began. What that run was stands in a file beside it, which goes when the last row is written."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ept.cli.predict_input import InputRow
from ept.data.rows import json_objects, listed
from ept.tasks.kind import TaskKind, one_line

__all__ = ["Output"]


class Output:
    """The predictions' place.

    Args:
        path: None: standard output; a name in .jsonl: an object a row with its id; any other: a line a row.
        origin: what the lines depend on, by the names that an error gives it: the adapter, the input, options. None where
            that cannot be said before the rows are read, so that no other run may go on with the file.
        all_probabilities: whether all classes' probabilities are written.
        overwrite: whether what the file holds is done again.

    Attributes:
        done: how many rows the file holds already.

    Raises:
        ValueError: the file cannot be written, or holds what no interrupted run of the same origin left.
    """

    def __init__(self, path: str | None, origin: dict[str, Any] | None, *, all_probabilities: bool, overwrite: bool):
        self.path, self.origin, self.all_probabilities = path, origin, all_probabilities
        self.in_json = path is not None and Path(path).suffix.lower() == ".jsonl"
        self.done, self._size, self._begun = 0, 0, False
        if path is None:
            return
        if not Path(path).absolute().parent.is_dir():
            raise ValueError(f"--output_file {path}: there is no such directory")
        if Path(path).is_dir():
            raise ValueError(f"--output_file {path} is a directory: give a file")
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError(
                f"--output_file {path} is a device or a pipe, which no run could go on with: leave it out, and lead standard "
                "output there (> or |)"
            )
        if Path(path).is_file() and Path(path).stat().st_size and not overwrite:
            self._check_origin()
            self.done, self._size = _whole_lines(path)

    def skip_done(self, rows: Iterator[InputRow]) -> None:
        """Passes over the rows that the file holds; ValueError if it holds others."""
        there: Iterator[tuple[int, dict[str, Any]]] | None = None
        if self.path is not None and self.in_json and self.done:
            there = json_objects(Path(self.path), "it was not written by ept predict")
        for number in range(1, self.done + 1):
            row = next(rows, None)
            if row is None:
                raise ValueError(f"{self._other()}: it has {self.done} lines, and the input {number - 1} rows")
            if there is not None:
                _, written = next(there, (number, {}))
                if written.get("id") != row.id:
                    raise ValueError(f"{self._other()}: line {number} has the id {written.get('id')!r}, not {row.id!r}")

    def write(self, rows: list[InputRow], kind: TaskKind, predictions: Any) -> None:
        """Writes the predictions of some rows, whole lines at once."""
        lines = list(kind.lines(predictions))
        if self.in_json or self.all_probabilities:
            lines = [
                self._json(row, record) if self.in_json else _with_probabilities(line, record)
                for row, line, record in zip(rows, lines, kind.records(predictions), strict=True)
            ]
        text = "".join(f"{line}\n" for line in lines)
        if self.path is None:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        if not self._begun:
            self._begin(self.path)
        with open(self.path, "ab") as file:
            file.write(text.encode("utf-8"))

    def finish(self) -> None:
        """Marks the file as finished: no run goes on with it."""
        if self.path is not None:
            _origin_file(self.path).unlink(missing_ok=True)

    def _begin(self, path: str) -> None:
        """Removes what a kill cut short, or what is written over, and only then says whose the file is."""
        with open(path, "ab") as file:
            file.truncate(self._size)
        if self.origin is None:
            _origin_file(path).unlink(missing_ok=True)
        else:
            _origin_file(path).write_text(json.dumps(self.origin) + "\n", encoding="utf-8")
        self._begun = True

    def _check_origin(self) -> None:
        """Raises ValueError where the file is not what an interrupted run of the same origin left."""
        remedy = "give another name, or --overwrite_output_file, which writes over it"
        file = _origin_file(str(self.path))
        if not file.is_file():
            raise ValueError(
                f"--output_file {self.path} exists, and no interrupted ept predict left it ({file.name} is not beside it): "
                f"{remedy}"
            )
        if self.origin is None:
            raise ValueError(
                f"--output_file {self.path} was left by an interrupted run, which standard input cannot go on with: {remedy}"
            )
        try:
            begun = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file} is damaged ({error}), so that {self.path} cannot be gone on with: {remedy}"
            ) from error
        others = [name for name in begun | self.origin if begun.get(name) != self.origin.get(name)]
        if others:
            raise ValueError(
                f"--output_file {self.path} was left by an interrupted run with another {listed(others)}: {remedy}"
            )

    def _json(self, row: InputRow, record: dict[str, Any]) -> str:
        if not self.all_probabilities:
            record.pop("probabilities", None)
        return json.dumps({"id": row.id} | record, ensure_ascii=False)

    def _other(self) -> str:
        return f"--output_file {self.path} holds predictions of another input (--overwrite_output_file writes over it)"


def _with_probabilities(line: str, record: dict[str, Any]) -> str:
    return "\t".join([line, *(f"{one_line(name)}={value:.6f}" for name, value in record["probabilities"].items())])


def _origin_file(path: str) -> Path:
    return Path(f"{path}.partial.json")


def _whole_lines(path: str) -> tuple[int, int]:
    """Counts a file's whole lines, and their bytes; a kill may have cut one short after them."""
    lines = size = 0
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                lines, size = lines + 1, size + len(line)
    return lines, size
