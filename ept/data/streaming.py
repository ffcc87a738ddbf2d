"""Training rows that are read while the model trains, so that a data set of any size takes the same memory.

The rows come in blocks of `shuffle_buffer`, each shuffled; within a block batches hold rows of similar length. The
order depends on the seed alone, so that a run that goes on skips what it has seen, and every process reads the same.
"""

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, load_dataset
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from ept.data.columns import Columns, labels_in, split_cell, split_labels
from ept.data.labels import LabelCounts, Labels
from ept.data.rows import checked_path, read_rows

__all__ = ["RowStream", "StreamError", "TokenStream"]

MEGABATCH = 50  # batches that are sorted by length together, as transformers' LengthGroupedSampler has it
DISTINCT = 10_000  # label values that are kept to tell classes from numbers; more classes than that are an error


class StreamError(ValueError):
    """A row that cannot be trained on, met while training."""


class RowStream:
    """The rows of a csv, tsv, jsonl or parquet file, or of a hub data set's split, from the start each time.

    What is wrong with a row is a StreamError that names it. Columns of csv and tsv are strings, as in `read_file`.

    Args:
        source: the file; of a hub data set, what errors call it.
        header: whether a csv or tsv file has one.
        hub: name, configuration and split of a hub data set, in place of a file.
    """

    def __init__(self, source: str, *, header: bool = True, hub: tuple[str, str | None, str] | None = None):
        self.source, self.header, self.hub = source, header, hub
        if hub is None:
            checked_path(source, header=header)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.hub is not None:
            yield from self._hub_rows(*self.hub)
            return
        try:
            yield from read_rows(Path(self.source), header=self.header)
        except ValueError as error:
            raise StreamError(str(error)) from error

    def head(self, rows: int) -> Dataset:
        """Returns the first rows as a table."""
        first = list(itertools.islice(self, rows))
        if not first:
            raise ValueError(f"{self.source} holds no rows: add some")
        return Dataset.from_list(first)

    def label_counts(self, columns: Columns) -> LabelCounts:
        """Counts the label column's labels in one pass over all rows; ValueError names a row that has none."""
        column, several = columns.chosen_label, False
        counts, number = Counter[str](), 0
        for number, row in enumerate(self, start=1):
            cell, at = split_cell(row[column], columns.label_separator), f"{self.source}, row {number}"
            several |= isinstance(cell, list)
            if not several and (cell is None or cell == ""):
                raise ValueError(f"{at}: the label ({column!r}) is missing")
            for label in labels_in(cell, at, column) if several else [str(cell)]:
                if label in counts or len(counts) < DISTINCT:
                    counts[label] += 1
        return LabelCounts.merged(counts, lists=number if several else None)

    def _hub_rows(self, name: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
        try:
            table = load_dataset(name, config, split=split, streaming=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"data set {name}: {error}") from error
        features = {name: getattr(feature, "feature", feature) for name, feature in (table.features or {}).items()}
        classes = {name: feature for name, feature in features.items() if isinstance(feature, ClassLabel)}
        for row in table:
            yield row | {name: _names_of(row[name], feature) for name, feature in classes.items()}


class TokenStream(IterableDataset):
    """A RowStream's rows as tokens and labels, without end: after the last row come the first ones in another order.

    Args:
        labels: None where the label column holds text to write.
        batch: rows of one update over all processes, which are sorted by length together.
        encode: makes token rows of some rows with their numbers, with a ValueError for one that is wrong; by default texts
            are tokenised, and labels as `labels` says.
        shortest: texts of fewer tokens are refused (a prompt that stands inside the text needs them).
    """

    def __init__(
        self, rows: RowStream, columns: Columns, labels: Labels | None, tokenizer: PreTrainedTokenizerBase,
        *, max_length: int | None, max_target_length: int, batch: int, shuffle_buffer: int, seed: int, shortest: int = 0,
        encode: Callable[[list[tuple[int, dict[str, Any]]]], list[dict[str, Any]]] | None = None,
    ):  # fmt: skip
        self.rows, self.columns, self.labels, self.tokenizer = rows, columns, labels, tokenizer
        self.max_length, self.max_target_length, self.batch = max_length, max_target_length, batch
        self.shuffle_buffer = max(1, shuffle_buffer // batch) * batch  # whole batches
        self.seed, self.shortest = seed, shortest
        self.encode = self._tokenise if encode is None else encode

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
        try:
            token_rows = self.encode(numbered)
        except StreamError:
            raise
        except ValueError as error:
            raise StreamError(str(error)) from error
        for (number, _), row in zip(numbered, token_rows, strict=True):
            if len(row["input_ids"]) < self.shortest:
                raise StreamError(
                    f"{self.rows.source}, row {number}: {len(row['input_ids'])} tokens are too few for a prompt that stands "
                    f"at column {self.shortest} (`prompt_start`): lower it, or leave the row out"
                )
        return token_rows

    def _tokenise(self, numbered: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
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
        return [
            dict(zip((*encoded, "labels"), values, strict=True))
            for values in zip(*encoded.values(), labels, strict=True)
        ]

    def _labels(self, numbered: list[tuple[int, dict[str, Any]]], labels: Labels) -> list[Any]:
        column = self.columns.chosen_label
        table = Dataset.from_dict({column: [row.get(column) for _, row in numbered]})
        try:
            return labels.encode(split_labels(table, self.columns), self.rows.source, column)
        except ValueError as error:  # it counts the rows of this table
            message = re.sub(r"row (\d+)", lambda match: f"row {numbered[int(match[1]) - 1][0]}", str(error), count=1)
            raise StreamError(message) from error

    def _texts(self, numbered: list[tuple[int, dict[str, Any]]], column: str) -> list[str]:
        for number, row in numbered:
            if not isinstance(row.get(column), str):
                raise StreamError(f"{self.rows.source}, row {number}: the text ({column!r}) is missing or not text")
        return [row[column] for _, row in numbered]


def _names_of(value: Any, classes: ClassLabel) -> Any:
    """Names a class number or a list of them; what is missing stays so."""
    if isinstance(value, list):
        return [_names_of(number, classes) for number in value]
    return value if value is None or value < 0 else classes.int2str(value)
