"""Training rows that are read while the model trains, so that a data set of any size takes the same memory.

The rows come in blocks of `shuffle_buffer`, each shuffled; within a block batches hold rows of similar length. The
order depends on the seed alone, so that a run that goes on skips what it has seen, and every process reads the same.
"""

import csv
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Dataset, load_dataset
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from ept.data.labels import Labels
from ept.data.tables import READERS, Columns

__all__ = ["RowStream", "StreamError", "TokenStream"]

MEGABATCH = 50  # batches that are sorted by length together, as transformers' LengthGroupedSampler has it
DISTINCT = 10_000  # label values that are kept to tell classes from numbers; more classes than that are an error


class StreamError(ValueError):
    """A row that cannot be trained on, met while training."""


class RowStream:
    """The rows of a csv, tsv, jsonl or parquet file, or of a hub data set's split, from the start each time.

    What is wrong with a row is a StreamError that names it. Columns of csv and tsv are strings, as in `read_file`.
    """

    def __init__(self, source: str, *, header: bool = True, hub: tuple[str, str | None, str] | None = None):
        self.source, self.header, self.hub = source, header, hub
        if hub is None:
            reader = READERS.get(Path(source).suffix.lower())
            if reader is None:
                raise ValueError(f"{source}: unknown extension: give a .csv, .tsv, .jsonl, .json or .parquet file")
            if not Path(source).is_file():
                raise ValueError(f"{source}: no such file")
            if not header and reader != "csv":
                raise ValueError(f"{source}: --no_header is for csv and tsv")
            self.reader = reader

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.hub is not None:
            return self._hub_rows(*self.hub)
        return {"csv": self._csv_rows, "jsonl": self._json_rows, "parquet": self._parquet_rows}[self.reader]()

    def head(self, rows: int) -> Dataset:
        """The first rows as a table."""
        found = list(itertools.islice(self, rows))
        if not found:
            raise ValueError(f"{self.source} holds no rows: add some")
        return Dataset.from_list(found)

    def distinct(self, column: str) -> Dataset:
        """A table with each of a column's values once, from one pass over all rows; missing values are an error."""
        seen: dict[str, None] = {}
        for number, row in enumerate(self, start=1):
            value = row[column]
            if value is None or value == "":
                raise ValueError(f"{self.source}, row {number}: the label ({column!r}) is missing")
            if len(seen) < DISTINCT:
                seen[str(value)] = None
        return Dataset.from_dict({column: list(seen)})

    def _csv_rows(self) -> Iterator[dict[str, Any]]:
        tsv = Path(self.source).suffix.lower() == ".tsv"
        form: dict[str, Any] = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if tsv else dict(delimiter=",", strict=True)
        with open(self.source, newline="", encoding="utf-8-sig") as file:
            reader, names = csv.reader(file, **form), None
            try:
                for row in reader:
                    if not row:
                        continue  # a blank line
                    if names is None:
                        names = row if self.header else [str(i) for i in range(len(row))]
                        if self.header:
                            continue
                    if len(row) != len(names):
                        raise StreamError(
                            f"{self.source}, line {reader.line_num}: {len(row)} fields where the first line has {len(names)}"
                        )
                    yield dict(zip(names, row, strict=True))
            except (csv.Error, UnicodeDecodeError) as error:
                raise StreamError(f"{self.source}, line {reader.line_num + 1}: {error}") from error

    def _json_rows(self) -> Iterator[dict[str, Any]]:
        names = None
        with open(self.source, encoding="utf-8-sig", errors="strict") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise StreamError(f"{self.source}, line {number}: not valid JSON ({error})") from error
                names = names or (set(row) if isinstance(row, dict) else None)
                if not isinstance(row, dict) or set(row) != names:
                    raise StreamError(f"{self.source}, line {number}: not an object with the first line's keys")
                yield row

    def _parquet_rows(self) -> Iterator[dict[str, Any]]:
        try:
            with pyarrow.parquet.ParquetFile(self.source) as file:
                for batch in file.iter_batches(batch_size=1024):
                    yield from batch.to_pylist()
        except pyarrow.ArrowException as error:
            raise StreamError(f"{self.source} is not a parquet file or is damaged ({error})") from error

    def _hub_rows(self, name: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
        try:
            table = load_dataset(name, config, split=split, streaming=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"data set {name}: {error}") from error
        named = {k: f for k, f in (table.features or {}).items() if isinstance(f, ClassLabel)}
        for row in table:
            yield row | {k: f.int2str(row[k]) for k, f in named.items() if row[k] is not None and row[k] >= 0}


class TokenStream(IterableDataset):
    """A RowStream's rows as tokens and labels, without end: after the last row come the first ones in another order.

    Args:
        labels: None where the label column holds text to write.
        batch: rows of one update over all processes, which are sorted by length together.
        shortest: texts of fewer tokens are refused (a prompt that stands inside the text needs them).
    """

    def __init__(
        self, rows: RowStream, columns: Columns, labels: Labels | None, tokenizer: PreTrainedTokenizerBase,
        *, max_length: int | None, max_target_length: int, batch: int, shuffle_buffer: int, seed: int, shortest: int = 0,
    ):  # fmt: skip
        self.rows, self.columns, self.labels, self.tokenizer = rows, columns, labels, tokenizer
        self.max_length, self.max_target_length, self.batch = max_length, max_target_length, batch
        self.shuffle_buffer = max(1, shuffle_buffer // batch) * batch  # whole batches
        self.seed, self.shortest = seed, shortest

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            draw = random.Random(f"{self.seed} {number}")
            rows, first = iter(self.rows), 1
            while block := list(itertools.islice(rows, self.shuffle_buffer)):
                numbered = list(enumerate(block, start=first))
                first += len(block)
                draw.shuffle(numbered)
                for start in range(0, len(numbered), MEGABATCH * self.batch):
                    yield from self._by_length(numbered[start : start + MEGABATCH * self.batch], draw)
            if first == 1:
                raise StreamError(f"{self.rows.source} holds no rows: add some")

    def _by_length(self, numbered: list[tuple[int, dict[str, Any]]], draw: random.Random) -> Iterator[dict[str, Any]]:
        encoded = sorted(self._encode(numbered), key=lambda row: len(row["input_ids"]), reverse=True)
        batches = [encoded[i : i + self.batch] for i in range(0, len(encoded), self.batch)]
        if len(batches[-1]) == self.batch:  # a smaller one stays last, so that the others stay whole
            draw.shuffle(batches)
        else:
            rest = batches.pop()
            draw.shuffle(batches)
            batches.append(rest)
        for batch in batches:
            yield from batch

    def _encode(self, numbered: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
        texts = [
            self._texts(numbered, name) for name in (self.columns.text, self.columns.text_pair) if name is not None
        ]
        cut = {} if self.max_length is None else {"truncation": True, "max_length": self.max_length}
        encoded = self.tokenizer(*texts, **cut)
        if self.labels is None:
            targets = self._texts(numbered, self.columns.chosen_label)
            labels = self.tokenizer(text_target=targets, truncation=True, max_length=self.max_target_length)[
                "input_ids"
            ]
        else:
            labels = self._labels(numbered, self.labels)
        made = [
            dict(zip((*encoded, "labels"), values, strict=True))
            for values in zip(*encoded.values(), labels, strict=True)
        ]
        for (number, _), row in zip(numbered, made, strict=True):
            if len(row["input_ids"]) < self.shortest:
                raise StreamError(
                    f"{self.rows.source}, row {number}: {len(row['input_ids'])} tokens are too few for a prompt that stands "
                    f"at column {self.shortest} (--prompt_start): lower it, or leave the row out"
                )
        return made

    def _labels(self, numbered: list[tuple[int, dict[str, Any]]], labels: Labels) -> list[int] | list[float]:
        column = self.columns.chosen_label
        table = Dataset.from_dict({column: [row.get(column) for _, row in numbered]})
        try:
            return labels.encode(table, self.rows.source, column)
        except ValueError as error:  # it counts the rows of this table
            said = re.sub(r"row (\d+)", lambda found: f"row {numbered[int(found[1]) - 1][0]}", str(error), count=1)
            raise StreamError(said) from error

    def _texts(self, numbered: list[tuple[int, dict[str, Any]]], column: str) -> list[str]:
        for number, row in numbered:
            if not isinstance(row.get(column), str):
                raise StreamError(f"{self.rows.source}, row {number}: the text ({column!r}) is missing or not text")
        return [row[column] for _, row in numbered]
