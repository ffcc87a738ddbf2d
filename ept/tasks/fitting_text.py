"""Cuts the passages of a benchmark's rows to the tokens that a model has room for."""

import re
from collections.abc import Callable

from ept.tasks.glue import BenchmarkTask, Rows

__all__ = ["fit_texts"]


def fit_texts(
    task: BenchmarkTask,
    rows: Rows,
    templates: tuple[str, ...],
    count: Callable[[list[tuple[str, ...]]], list[int]],
    limit: int | None,
) -> tuple[list[tuple[str, ...]], int]:
    """Cuts each row's texts to at most `limit` tokens; returns them, and how many rows had to be cut.

    What gives way are words at the end of the fields in `task.cut`: a passage, not the question about it. Of several
    such fields all keep the same number of words at most, so that the longest is cut first. A row that is too long
    without them keeps none of them; the tokenizer cuts the rest.

    Args:
        templates: of the texts, made of the task's fields.
        count: the numbers of tokens of several rows' texts.
    """

    def texts(fields: dict[str, str], most: int | None = None) -> tuple[str, ...]:
        if most is not None:
            fields = fields | {name: _first_words(fields[name], most) for name in task.cut if name in fields}
        return tuple(template.format_map(fields).strip() for template in templates)

    fitted = [texts(fields) for fields in rows.fields]
    if limit is None:
        return fitted, 0
    too_long = [i for i, number in enumerate(count(fitted)) if number > limit]
    for i in too_long:
        fields = rows.fields[i]
        # `low` words fit, or nothing does; `high` words do not.
        low, high = 0, max(len(fields[name].split()) for name in task.cut if name in fields)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if count([texts(fields, middle)])[0] <= limit else (low, middle)
        fitted[i] = texts(fields, low)
    return fitted, len(too_long)


def _first_words(text: str, most: int) -> str:
    """Returns a text up to the end of its word number `most`, its spaces as they are."""
    end = 0
    for number, match in enumerate(re.finditer(r"\S+", text), start=1):
        if number > most:
            break
        end = match.end()
    return text[:end]
