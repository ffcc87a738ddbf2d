"""The rows of `ept predict`: lines of text, or a table's."""

import codecs
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ept.data.chats import checked_chat
from ept.data.columns import LABEL_NAMES, ROW_NUMBER_NAMES, Columns, words_in
from ept.data.rows import SUFFIXES, checked_path, listed, read_rows
from ept.tasks.kind import TaskKind

__all__ = ["InputRow", "Lines", "TableRows", "is_table"]

QUESTIONS = ("prompt", "messages")  # columns that are found by themselves where a model answers


class InputRow(NamedTuple):
    """A row to predict for: its id as JSON holds it, or its number from 1; and its texts, two in a task on pairs."""

    id: Any
    texts: tuple[Any, ...]


def _in_json(id: Any) -> Any:
    """Returns an id as JSON holds it: not-a-number and infinity as null, a date as ISO 8601, other objects as text."""
    if isinstance(id, float) and not math.isfinite(id):
        return None
    return json.loads(json.dumps(id, default=lambda value: getattr(value, "isoformat", value.__str__)()))


def is_table(path: str) -> bool:
    """Tells whether a file is read as a table, by its extension."""
    return Path(path).suffix.lower() in SUFFIXES


@dataclass(frozen=True)
class Lines:
    """The rows of a file with a text a line, or of standard input (`path` is None); in pairs with a tab between."""

    path: str | None
    pairs: bool

    def __post_init__(self) -> None:
        if self.path is not None and not Path(self.path).is_file():
            raise ValueError(f"{self.path}: no such file")

    def __iter__(self) -> Iterator[InputRow]:
        if self.path is None:
            yield from self._rows(sys.stdin.buffer, "standard input")
            return
        with open(self.path, "rb") as file:
            yield from self._rows(file, self.path)

    def _rows(self, lines: Iterable[bytes], source: str) -> Iterator[InputRow]:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                text = line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{source}, line {number}: not UTF-8 (byte {line[error.start]:#04x})") from error
            texts = tuple(text.split("\t", 1)) if self.pairs else (text,)
            if self.pairs and len(texts) != 2:
                raise ValueError(
                    f"{source}, line {number}: the adapter labels pairs: write two texts with a tab between"
                )
            yield InputRow(number, texts)


@dataclass(frozen=True)
class TableRows:
    """The rows of a csv, tsv, jsonl or parquet file.

    Attributes:
        wanted: the columns that the user named.
        recorded: those that the adapter was trained on; a file without them has to be told otherwise.
        pairs: whether the adapter reads two texts.
        id_column: by default the first of id, idx and index that there is; rows without have their number.
    """

    path: str
    kind: TaskKind
    wanted: Columns
    recorded: Columns
    pairs: bool
    id_column: str | None
    header: bool

    def __iter__(self) -> Iterator[InputRow]:
        columns: tuple[str, ...] | None = None
        id_column: str | None = None
        for number, row in enumerate(
            read_rows(checked_path(self.path, header=self.header), header=self.header), start=1
        ):
            if columns is None:
                columns, id_column = self._text_columns(list(row)), self._id_column(list(row))
            texts = tuple(self._text(row, column, number) for column in columns)
            yield InputRow(number if id_column is None else _in_json(row[id_column]), texts)
        if columns is None:
            raise ValueError(f"{self.path} holds no rows: add some")

    def _text(self, row: dict[str, Any], column: str, number: int) -> Any:
        value, place = row[column], f"{self.path}, row {number}"
        if isinstance(value, str):
            return value
        if isinstance(value, list) and self.kind.reads_one_text:
            return checked_chat(value, f"{place}: {column!r}")
        if isinstance(value, list) and self.kind.reads_words:
            return words_in(value, place, column)
        problem = "missing" if value is None else f"{type(value).__name__} {value!r}, not text"
        raise ValueError(f"{place}: the text ({column!r}) is {problem}")

    def _id_column(self, names: list[str]) -> str | None:
        if self.id_column is not None and self.id_column not in names:
            raise ValueError(f"{self.path} has no column {self.id_column!r} (--id_column); it has: {listed(names)}")
        return self.id_column or next((name for name in ROW_NUMBER_NAMES if name and name in names), None)

    def _text_columns(self, names: list[str]) -> tuple[str, ...]:
        """Finds the columns with the texts; ValueError where they are missing or cannot be told."""
        there = f"it has: {listed(names)}"
        for field, name in (("text", self.wanted.text), ("text_pair", self.wanted.text_pair)):
            if name is not None and name not in names:
                raise ValueError(f"{self.path} has no column {name!r} (`Columns.{field}`); {there}")
        text = self.wanted.text or self._guessed_text(names)
        if text is None:
            raise ValueError(f"{self.path}: say which column is the text with `Columns.text`; {there}")
        if not self.pairs:
            return (text,)
        pair = self.wanted.text_pair or self.recorded.text_pair
        if pair not in names:
            raise ValueError(
                f"{self.path}: the adapter labels pairs: say which column is the second text with `Columns.text_pair`; "
                f"{there}"
            )
        return (text, str(pair))

    def _guessed_text(self, names: list[str]) -> str | None:
        questions = QUESTIONS if self.kind.reads_one_text else ()
        for name in (self.recorded.text, *questions):
            if name in names:
                return name
        others = (self.recorded.label, self.recorded.text_pair, self.id_column, *ROW_NUMBER_NAMES, *LABEL_NAMES)
        rest = [name for name in names if name not in others]
        return rest[0] if len(rest) == 1 else None
