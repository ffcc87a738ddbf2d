"""Labelled text from local files or the hub: read, checked, and tokenised for training. Needs the extra `train`.

Every error is a ValueError of one or two lines that names the file and says what to do.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
from datasets import ClassLabel, Dataset, concatenate_datasets, load_dataset

__all__ = ["Columns", "choose_columns", "decode", "json_lines", "read_file", "read_hub", "read_parquet_files"]  # fmt: skip

READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}

# What is guessed: a label column by these names, and, once it and a row number are set aside, a lone text column or
# one of these pairs. Whatever else a file holds must be said.
LABEL_NAMES = ("label", "labels")
ROW_NUMBER_NAMES = ("idx", "id", "index")
PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("text1", "text2"),
)  # fmt: skip

csv.field_size_limit(2**31 - 1)  # the default refuses texts of more than 131,072 characters


# ---------------------------------------------------------------------- reading


def read_file(path: str | os.PathLike, *, header: bool = True) -> Dataset:
    """The rows of a csv, tsv, jsonl (json lines) or parquet file. Columns of a file without a header are "0", "1", ….

    csv follows RFC 4180; in tsv a quotation mark is a character like any other, as in GLUE's files. Both give strings.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path}: unknown extension {path.suffix!r}: give a .csv, .tsv, .jsonl, .json or .parquet file"
        )
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: give a file with at least one row")
    if not header and reader != "csv":
        raise ValueError(f"{path}: --no_header is for csv and tsv; the columns of {path.suffix} have names")
    if reader == "parquet":
        table = read_parquet_files([path])
    elif reader == "jsonl":
        table = _read_jsonl(path)
    else:
        table = _read_csv(path, header)
    if len(table) == 0:
        raise ValueError(f"{path} holds no rows" + (", only a header" if reader == "csv" else "") + ": add some")
    return table


def read_hub(name: str, config: str | None, split: str) -> Dataset | None:
    """A split of a data set by its hub name, or None if it has no such split."""
    try:
        splits = load_dataset(name, config)
    except (OSError, ValueError) as error:
        raise ValueError(f"data set {name}: {error}") from error
    return splits.get(split)


def decode(path: Path) -> str:
    """A file's text; ValueError names the first line that is not UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8: save the file as UTF-8"
        ) from error


def _read_csv(path: Path, header: bool) -> Dataset:
    tsv = path.suffix.lower() == ".tsv"
    form: dict[str, Any] = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if tsv else dict(delimiter=",", strict=True)
    reader = csv.reader(io.StringIO(decode(path), newline=""), **form)
    names, rows = None, []
    try:
        for row in reader:
            if not row:
                continue  # a blank line
            if names is None:
                names = row if header else [str(i) for i in range(len(row))]
                if len(set(names)) < len(names):
                    raise ValueError(f"{path}: the header names a column twice: {_listed(names)}")
                if header:
                    continue
            if len(row) != len(names):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(row)} fields where the first line has {len(names)}: "
                    + ("a tab inside a text?" if tsv else 'a text with a comma must stand in "quotes"')
                )
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not valid csv ({error})") from error
    columns = list(zip(*rows, strict=True)) or [()] * len(names or [])
    return Dataset.from_dict({name: list(column) for name, column in zip(names or [], columns, strict=True)})


def _read_jsonl(path: Path) -> Dataset:
    rows: list[dict[str, Any]] = []
    for number, row in json_lines(path, 'write {"text": …, "label": …} on every line'):
        if rows and set(row) != set(rows[0]):
            raise ValueError(
                f"{path}, line {number}: its keys {_listed(row)} are not those of the first row, {_listed(rows[0])}"
            )
        rows.append(row)
    try:
        return Dataset.from_dict({name: [row[name] for row in rows] for name in (rows[0] if rows else [])})
    except (pyarrow.ArrowException, OverflowError) as error:
        raise ValueError(f"{path}: a column holds values of different types or too large ({error})") from error


def json_lines(path: Path, hint: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a jsonl file with the numbers of their lines; `hint` says what to write in place of another value."""
    for number, line in enumerate(decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error}): one object per line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not an object: {hint}")
        yield number, row


def read_parquet_files(paths: list[Path]) -> Dataset:
    """The rows of parquet files of the same columns, one after the other."""
    import pyarrow.parquet

    tables = []
    for path in paths:
        try:
            tables.append(Dataset(pyarrow.parquet.read_table(path)))
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a parquet file or is damaged ({error})") from error
    return tables[0] if len(tables) == 1 else concatenate_datasets(tables)


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names))


# ---------------------------------------------------------------------- columns


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; None: not given (text, label) or not there (text_pair)."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None

    @property
    def chosen_label(self) -> str:
        """The label's column; ValueError while none is chosen."""
        if self.label is None:
            raise ValueError("no column is chosen as the label: see choose_columns")
        return self.label


def choose_columns(table: Dataset, source: str, wanted: Columns) -> Columns:
    """The columns to read: those wanted, and for what was left open those that only one choice is possible for."""
    names = table.column_names
    for option, name in (("text", wanted.text), ("text_pair", wanted.text_pair), ("label", wanted.label)):
        if name is not None and name not in names:
            raise ValueError(f"{source} has no column {name!r} (--{option}_column); it has: {_listed(names)}")
    label = wanted.label
    if label is None:
        found = [name for name in names if name in LABEL_NAMES]
        if len(found) != 1:
            raise ValueError(f"{source}: say which column is the label with --label_column; it has: {_listed(names)}")
        label = found[0]
    for option, name in (("text", wanted.text), ("text_pair", wanted.text_pair)):
        if name == label:
            raise ValueError(
                f"{source}: column {name!r} cannot be both the label and the text: give another --label_column or "
                f"--{option}_column; it has: {_listed(names)}"
            )
    if wanted.text is not None:
        return replace(wanted, label=label)
    rest = [name for name in names if name not in (label, wanted.text_pair, *ROW_NUMBER_NAMES, *LABEL_NAMES)]
    if len(rest) == 1:
        return replace(wanted, text=rest[0], label=label)
    for text, pair in PAIRS:
        if wanted.text_pair is None and set(rest) == {text, pair}:
            return Columns(text, pair, label)
    raise ValueError(
        f"{source}: say which column is the text with --text_column (and the second with --text_pair_column); "
        f"it has: {_listed(names)}"
    )


# ---------------------------------------------------------------------- labels


def _strings(table: Dataset, source: str, column: str) -> list[str]:
    feature, values = table.features[column], []
    for row, value in enumerate(table[column], start=1):
        if value is None or value == "":
            raise ValueError(f"{source}, row {row}: the label ({column!r}) is missing")
        named = isinstance(feature, ClassLabel) and value >= 0
        values.append(feature.int2str(value) if named else str(value))
    return values


# ---------------------------------------------------------------------- tokens


def _texts(table: Dataset, source: str, column: str) -> list[str]:
    texts = list(table[column])
    for row, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            kind = "missing" if text is None else f"{type(text).__name__} {text!r}, not text"
            raise ValueError(f"{source}, row {row}: the text ({column!r}) is {kind}")
    return texts
