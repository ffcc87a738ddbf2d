"""Reads the rows of csv, tsv, jsonl and parquet files one after the other, for whole tables and for streams alike.

Every error is a ValueError of one or two lines that names the file, the line and what to do.
"""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

__all__ = ["SUFFIXES", "checked_path", "has_optional_header", "json_objects", "listed", "read_rows", "text_lines"]

Row = dict[str, Any]

csv.field_size_limit(2**31 - 1)  # the default refuses texts of more than 131,072 characters


def checked_path(path: str | os.PathLike, *, header: bool = True) -> Path:
    """Checks that a file can be read, and returns its path. ValueError if it is missing, empty or of an unknown kind."""
    path = Path(path)
    if path.suffix.lower() not in _READERS:
        raise ValueError(
            f"{path}: unknown extension {path.suffix!r}: give a .csv, .tsv, .jsonl, .json or .parquet file"
        )
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: give a file with at least one row")
    if not header and not has_optional_header(path):
        raise ValueError(f"{path}: `header=False` is for csv and tsv; the columns of {path.suffix} have names")
    return path


def has_optional_header(path: Path) -> bool:
    """Tells whether a file's kind may lack a header."""
    return _READERS[path.suffix.lower()] is _csv_rows


def read_rows(path: Path, *, header: bool = True) -> Iterator[Row]:
    """Yields the rows of a file that passed `checked_path`. Columns of a file without a header are "0", "1", ….

    csv follows RFC 4180; where its header has no comma but semicolons or tabs, these stand between the fields. In tsv a
    quotation mark is a character like any other, as in GLUE's files. Both give strings.
    """
    return _READERS[path.suffix.lower()](path, header)


def text_lines(path: str | os.PathLike, newline: str) -> Iterator[str]:
    """Yields the lines of a UTF-8 file with their ends; `newline` as in `open`."""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            yield from file
    except UnicodeDecodeError:
        _name_the_line_that_is_not_utf8(path)
        raise


def json_objects(path: Path, hint: str) -> Iterator[tuple[int, Row]]:
    """Yields the objects of a jsonl file with the numbers of their lines; an error about another value ends with `hint`."""
    for number, line in enumerate(text_lines(path, newline="\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error}): one object per line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not an object: {hint}")
        yield number, row


def listed(names: Any) -> str:
    """Joins names with commas."""
    return ", ".join(map(str, names))


def _csv_rows(path: Path, header: bool) -> Iterator[Row]:
    tsv = path.suffix.lower() == ".tsv"
    form: dict[str, Any] = (
        dict(delimiter="\t", quoting=csv.QUOTE_NONE) if tsv else dict(delimiter=_delimiter(path, header), strict=True)
    )
    reader = csv.reader(text_lines(path, newline=""), **form)
    names: list[str] | None = None
    try:
        for fields in reader:
            if not fields:
                continue  # a blank line
            if names is None:
                names = [name.strip() for name in fields] if header else [str(i) for i in range(len(fields))]
                if len(set(names)) < len(names):
                    raise ValueError(f"{path}: the header names a column twice: {listed(names)}")
                if header:
                    continue
            if len(fields) != len(names):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields where the first line has {len(names)}: "
                    + ("a tab inside a text?" if tsv else 'a text with a comma must stand in "quotes"')
                )
            yield dict(zip(names, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not valid csv ({error})") from error


def _delimiter(path: Path, header: bool) -> str:
    """Finds what stands between the fields of a csv file: a comma, or what alone divides its header.

    Raises:
        ValueError: the first line of a file without a header has no comma but another sign, which may be text.
    """
    line = next(text_lines(path, newline=""), "")
    for delimiter in (",", ";", "\t"):
        if len(next(csv.reader([line], delimiter=delimiter), [])) > 1:
            if not header and delimiter != ",":
                raise ValueError(
                    f"{path}: its first line has {delimiter!r} and no comma: write commas between the fields, or give "
                    'the file a header; a text with that sign must stand in "quotes"'
                )
            return delimiter
    return ","


def _json_rows(path: Path, header: bool) -> Iterator[Row]:
    first: Row | None = None
    for number, row in json_objects(path, 'write {"text": …, "label": …} on every line'):
        first = row if first is None else first
        if row.keys() != first.keys():
            raise ValueError(
                f"{path}, line {number}: its keys {listed(row)} are not those of the first row, {listed(first)}"
            )
        yield row


def _parquet_rows(path: Path, header: bool) -> Iterator[Row]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a parquet file or is damaged ({error})") from error


def _name_the_line_that_is_not_utf8(path: str | os.PathLike) -> None:
    """Raises a ValueError that names a file's first line that is not UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: byte {line[error.start]:#04x} is not UTF-8: save the file as UTF-8"
                ) from error


_READERS = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
}
SUFFIXES = tuple(_READERS)
