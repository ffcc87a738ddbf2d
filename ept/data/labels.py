"""A column of labels: classes and their numbers, or values."""

import math
from dataclasses import dataclass

from datasets import ClassLabel, Dataset

from ept.data.columns import label_strings
from ept.data.rows import listed

__all__ = ["Labels"]


@dataclass(frozen=True)
class Labels:
    """What the labels are: class names in the order of the classes' numbers, or None for numbers to regress on."""

    names: tuple[str, ...] | None

    @property
    def unnamed(self) -> bool:
        """Whether they are transformers' numbered names, which stand for the numbers."""
        return self.names is not None and self.names == tuple(f"LABEL_{i}" for i in range(len(self.names)))

    @classmethod
    def of(cls, table: Dataset, source: str, column: str, kind: str | None = None) -> "Labels":
        """Reads what the labels of a training file are: values where they are floats, else classes, unless `kind` says.

        nan and infinity count as floats, which `encode` refuses: one bad score must not make classes of all.
        """
        feature = table.features[column]
        if isinstance(feature, ClassLabel) and kind != "regression":
            return cls(tuple(feature.names))
        values = label_strings(table, source, column)
        numbers = [_number(value) for value in values]
        whole = all(n is not None and "." not in v and n.is_integer() for n, v in zip(numbers, values, strict=True))
        if kind == "regression" or (kind is None and not whole and None not in numbers):
            labels = cls(None)
            labels.encode(table, source, column)
            return labels
        names = sorted(set(values), key=(lambda name: (float(name), name)) if whole else None)
        if len(names) < 2:
            raise ValueError(
                f"{source}: every row of {column!r} has the label {names[0]!r}: there is nothing to tell apart"
            )
        return cls(tuple(names))

    def encode(self, table: Dataset, source: str, column: str) -> list[int] | list[float]:
        """Returns the rows' labels as class numbers or floats. ValueError names the first row that has another label."""
        feature = table.features[column]
        if isinstance(feature, ClassLabel) and self.names == tuple(feature.names) and min(table[column]) >= 0:
            return list(table[column])
        values = label_strings(table, source, column)
        if self.names is None:
            numbers = []
            for row, value in enumerate(values, start=1):
                number = _number(value)
                if number is None or not math.isfinite(number):
                    raise ValueError(
                        f"{source}, row {row}: label {value!r} is not a finite number, which regression needs: "
                        'correct or remove the row, or classify with `kind="classification"`'
                    )
                numbers.append(number)
            return numbers
        number_of = {name: i for i, name in enumerate(self.names)}
        if self.unnamed:
            number_of |= {str(i): i for i in range(len(self.names))}
        for row, value in enumerate(values, start=1):
            if value not in number_of:
                shown = listed(self.names[:20]) + (", …" if len(self.names) > 20 else "")
                raise ValueError(f"{source}, row {row}: label {value!r} is not among the known labels {shown}")
        return [number_of[value] for value in values]


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
