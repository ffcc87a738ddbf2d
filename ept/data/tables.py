"""Whole tables from local files or the hub. Needs the extra `train`."""

import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, concatenate_datasets, load_dataset

from ept.data.rows import checked_path, has_optional_header, read_rows

__all__ = ["read_file", "read_hub", "read_parquet_files"]


def read_file(path: str | os.PathLike, *, header: bool = True) -> Dataset:
    """Reads a csv, tsv, jsonl (json lines) or parquet file as a table, the rows as in `read_rows`; parquet keeps its types.

    Raises:
        ValueError: the file is missing, empty, damaged or of an unknown kind, or `header=False` does not go with it.
    """
    path = checked_path(path, header=header)
    if path.suffix.lower() == ".parquet":
        table = read_parquet_files([path])
    else:
        rows = list(read_rows(path, header=header))
        try:
            table = Dataset.from_dict({name: [row[name] for row in rows] for name in (rows[0] if rows else [])})
        except (pyarrow.ArrowException, OverflowError) as error:
            raise ValueError(
                f"{path}: {_mixture(rows) or f'a column holds values that are too large ({error})'}"
            ) from error
    if len(table) == 0:
        raise ValueError(f"{path} holds no rows{', only a header' if has_optional_header(path) else ''}: add some")
    return table


def _mixture(rows: list[dict[str, Any]]) -> str | None:
    """Says which column holds values of two types, and where; None where none does."""
    for name in rows[0]:
        first: tuple[int, Any] | None = None
        for number, row in enumerate(rows, start=1):
            value = row[name]
            if value is None:
                continue
            if first is None:
                first = number, value
            elif _type_of(value) is not _type_of(first[1]):
                return (
                    f"the column {name!r} holds values of different types, {first[1]!r} (row {first[0]}) and {value!r} (row "
                    f"{number}): write all as words, or all as numbers"
                )
    return None


def _type_of(value: Any) -> type:
    return float if type(value) is int else type(value)


def read_hub(name: str, config: str | None, split: str) -> Dataset | None:
    """Reads a split of a data set by its hub name; None if it has no such split."""
    try:
        splits = load_dataset(name, config)
    except (OSError, ValueError) as error:
        raise ValueError(f"data set {name}: {error}") from error
    return splits.get(split)


def read_parquet_files(paths: list[Path]) -> Dataset:
    """Reads parquet files of the same columns as one table."""
    tables = []
    for path in paths:
        try:
            tables.append(Dataset(pyarrow.parquet.read_table(path)))
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a parquet file or is damaged ({error})") from error
    return tables[0] if len(tables) == 1 else concatenate_datasets(tables)
