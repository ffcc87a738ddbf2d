"""A column of labels: classes and their numbers, several classes a row, or values."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from datasets import ClassLabel, Dataset

from ept.data.columns import (
    NAMES_NOT_MARKS,
    Columns,
    element_of,
    holds_lists,
    label_lists,
    label_strings,
    tags_of,
)
from ept.data.rows import listed

__all__ = ["LabelCounts", "Labels"]

FEW_VALUES = 50  # numbers that repeat and are no more than these may be codes of classes as well as values
SHOWN = 20  # classes that a line names


@dataclass(frozen=True)
class LabelCounts:
    """The labels of a column and how many rows have each.

    Attributes:
        rows: the number of rows by label.
        several: whether a row may have several labels.
        unit: what has a label, in the plural.
        alike: whether every row has all of several labels.
    """

    rows: dict[str, int]
    several: bool = False
    unit: str = "rows"
    alike: bool = False

    @classmethod
    def of(cls, table: Dataset, source: str, column: str) -> "LabelCounts":
        """Counts a table's labels; ValueError names the first row that has none."""
        if holds_lists(table, column):
            lists = label_lists(table, source, column)
            return cls.merged(Counter(label for labels in lists for label in labels), lists=len(lists))
        return cls.merged(Counter(label_strings(table, source, column)))

    @classmethod
    def of_words(cls, table: Dataset, source: str, columns: Columns) -> "LabelCounts":
        """Counts the labels of a table's words; ValueError names the first row where they are not one a word."""
        return cls(Counter(tag for tags in tags_of(table, source, columns) for tag in tags), unit="words")

    @classmethod
    def merged(cls, rows: Mapping[str, int], *, lists: int | None = None) -> "LabelCounts":
        """Counts by label, where whole numbers that are written as floats are one with those that are not.

        Args:
            lists: how many rows there are, if each may have several labels.
        """
        is_whole, merged = cls(dict(rows)).is_whole, Counter[str]()
        for label, number in rows.items():
            merged[_without_decimals(label) if is_whole else label] += number
        alike = len(merged) > 1 and all(number == lists for number in merged.values())
        return cls(dict(merged), several=lists is not None, alike=alike)

    @property
    def is_whole(self) -> bool:
        """Whether all labels are whole numbers."""
        return all((number := _number(label)) is not None and number.is_integer() for label in self.rows)

    @property
    def is_finite(self) -> bool:
        """Whether all labels are finite numbers."""
        return all((number := _number(label)) is not None and math.isfinite(number) for label in self.rows)

    @property
    def could_be_either(self) -> bool:
        """Whether the labels are numbers that could be classes as well as values."""
        labels, rows = len(self.rows), sum(self.rows.values())
        repeats = rows >= 2 * labels
        if self.is_whole:
            return labels > FEW_VALUES and not repeats
        return self.is_finite and labels <= FEW_VALUES and repeats

    def are_values(self, kind: str | None) -> bool:
        """Whether the labels are numbers to regress on, as `kind` says or, where it is None, as they are written."""
        if kind is not None or self.several:
            return kind == "regression" and not self.several
        return not self.is_whole and all(_number(label) is not None for label in self.rows)

    def _count(self, name: str) -> str:
        return f"1 {self.unit[:-1]}" if self.rows[name] == 1 else f"{self.rows[name]} {self.unit}"

    def lines(self) -> list[str]:
        """Describes the classes with their rows, and warns of those that look like slips."""
        by_size = sorted(self.rows, key=lambda name: (-self.rows[name], name))
        lines = [f"{len(by_size)} classes: " + _first(f"{_shown(name)} ({self._count(name)})" for name in by_size)]
        alike = defaultdict(list)
        for name in by_size:
            alike[name.strip().casefold()].append(name)
        for names in alike.values():
            if len(names) > 1:
                lines.append(
                    f"warning: the classes {_first(map(repr, names))} differ in capitals or in spaces at their ends "
                    "alone: give them one name if they are one"
                )
        single = [name for name in by_size if self.rows[name] == 1]
        if len(single) == len(by_size) and self.unit == "rows":
            lines.append("warning: every class has one row: is the column text to be written, or a row's name?")
        elif single:
            lines.append(f"warning: classes with one {self.unit[:-1]} alone: {_first(map(_shown, single))}")
        return lines


@dataclass(frozen=True)
class Labels:
    """What the labels are: class names in the order of the classes' numbers, or None for numbers to regress on.

    `several` says whether a row may have several classes, or none.
    """

    names: tuple[str, ...] | None
    several: bool = False

    @property
    def unnamed(self) -> bool:
        """Whether they are transformers' numbered names, which stand for the numbers."""
        return self.names is not None and self.names == tuple(f"LABEL_{i}" for i in range(len(self.names)))

    @classmethod
    def of(cls, table: Dataset, source: str, column: str, kind: str | None = None) -> "Labels":
        """Reads the labels of a training file, see `of_counts`.

        nan and infinity count as floats, which `encode` refuses: one bad score must not make classes of all.
        """
        feature = table.features[column]
        if isinstance(feature, ClassLabel) and kind not in ("regression", "multi_label"):
            return cls(tuple(feature.names))
        if kind == "multi_label":
            label_lists(table, source, column)  # names the row that has none
        counts = LabelCounts.of(table, source, column)
        if counts.are_values(kind):
            cls(None).encode(table, source, column)  # names the row that is no value
        return cls.of_counts(counts, source, column, kind)

    @classmethod
    def of_words(cls, table: Dataset, source: str, columns: Columns) -> "Labels":
        """Reads the labels of a training file's words: the names that the table has, or those that occur."""
        feature = element_of(table.features[columns.chosen_label])
        if isinstance(feature, ClassLabel):
            return cls(tuple(feature.names))
        return cls.of_counts(
            LabelCounts.of_words(table, source, columns), source, columns.chosen_label, "classification"
        )

    @classmethod
    def of_counts(cls, counts: LabelCounts, source: str, column: str, kind: str | None = None) -> "Labels":
        """Reads counted labels: lists are several classes a row, decimal numbers are regressed on, the rest is classified,
        unless `kind` says ("classification", "regression" or "multi_label").

        Raises:
            ValueError: there is nothing to tell apart, the labels could be classes as well as values, or they are
                not what `kind` says.
        """
        if counts.several and kind not in (None, "multi_label"):
            raise ValueError(
                f"{source}: the labels ({column!r}) are lists, of which {kind} makes nothing: leave `kind` out, or "
                'give `kind="multi_label"`'
            )
        names = list(counts.rows)
        if not counts.several and kind is None:
            if all(name.startswith("[") and name.endswith("]") for name in names):
                raise ValueError(
                    f"{source}: the labels ({column!r}) look like lists that are written as text, such as {names[0]}: "
                    "write lists in jsonl or parquet, or labels with a sign between them (`Columns.label_separator`); "
                    'if each is one class, `kind="classification"`'
                )
            if counts.could_be_either:
                raise ValueError(
                    f"{source}: {column!r} holds {len(names)} different numbers in {sum(counts.rows.values())} rows, "
                    f'such as {listed(names[:3])}: say whether they are classes (`kind="classification"`) or values '
                    '(`kind="regression"`)'
                )
        if counts.are_values(kind):
            for name in names:
                _finite(name, source)
            return cls(None)
        names.sort(key=(lambda name: (float(name), name)) if counts.is_whole else None)
        if counts.several and not names:
            raise ValueError(f"{source}: no row of {column!r} has a label: there is nothing to learn")
        if counts.alike:
            hint = f": {NAMES_NOT_MARKS}" if names == ["0", "1"] else ""
            raise ValueError(
                f"{source}: every row of {column!r} has the labels {_first(map(_shown, names))}, so that there is nothing to "
                f"tell apart{hint}"
            )
        if len(names) < 2 and not counts.several:
            raise ValueError(
                f"{source}: every {counts.unit[:-1]} of {column!r} has the label {names[0]!r}: there is nothing to tell apart"
            )
        return cls(tuple(names), counts.several)

    def encode(self, table: Dataset, source: str, column: str) -> list[int] | list[float] | list[list[float]]:
        """Returns the rows' labels as class numbers, as floats, or (`several`) as a 0.0 or 1.0 for each class.

        Raises:
            ValueError: the first row that has another label, with its number.
        """
        if self.several:
            number_of = self._numbers()
            rows = []
            for row, labels in enumerate(label_lists(table, source, column), start=1):
                numbers = {self._number_of(label, number_of, f"{source}, row {row}") for label in labels}
                rows.append([float(number in numbers) for number in range(len(self.names or ()))])
            return rows
        feature = table.features[column]
        if isinstance(feature, ClassLabel) and self.names == tuple(feature.names) and min(table[column]) >= 0:
            return list(table[column])
        values = label_strings(table, source, column)
        if self.names is None:
            return [_finite(value, f"{source}, row {row}") for row, value in enumerate(values, start=1)]
        number_of = self._numbers()
        return [self._number_of(value, number_of, f"{source}, row {row}") for row, value in enumerate(values, start=1)]

    def encode_words(self, table: Dataset, source: str, columns: Columns) -> list[list[int]]:
        """Returns the class number of each word of each row; ValueError names the first row that has another label."""
        number_of = self._numbers()
        return [
            [self._number_of(tag, number_of, f"{source}, row {row}") for tag in tags]
            for row, tags in enumerate(tags_of(table, source, columns), start=1)
        ]

    def _numbers(self) -> dict[str, int]:
        """Returns the class numbers by name."""
        numbers = {name: i for i, name in enumerate(self.names or ())}
        return numbers | {str(i): i for i in range(len(numbers))} if self.unnamed else numbers

    def _number_of(self, label: str, numbers: dict[str, int], at: str) -> int:
        number = numbers.get(label, numbers.get(_without_decimals(label)))
        if number is None:
            raise ValueError(
                f"{at}: label {label!r} is not among the known labels {_first(map(_shown, self.names or ()))}"
            )
        return number


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _finite(value: str, at: str) -> float:
    number = _number(value)
    if number is None or not math.isfinite(number):
        raise ValueError(
            f"{at}: label {value!r} is not a finite number, which regression needs: "
            'correct or remove the row, or classify with `kind="classification"`'
        )
    return number


def _without_decimals(label: str) -> str:
    """Returns a whole number that is written as a float as one: 2.0 is 2."""
    match = re.fullmatch(r"([+-]?\d+)\.0*", label)
    return label if match is None else match[1]


def _shown(name: str) -> str:
    """Returns a class's name, in quotation marks where it would be misread without."""
    return repr(name) if name != name.strip() or not name else name


def _first(words: Iterable[str]) -> str:
    """Lists the first of many words, with commas between."""
    words = list(words)
    return listed(words[:SHOWN]) + (", …" if len(words) > SHOWN else "")
