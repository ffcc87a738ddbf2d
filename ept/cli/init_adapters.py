"""The trained adapters of `--init_adapters`: checked early, and the rows by which they are weighted."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ept.model.files import AdapterFiles
from ept.model.model import EPTModel
from ept.model.transfer import FIRST_ROWS
from ept.tasks.task import Task

__all__ = ["init_rows", "read_sources", "start_in_words"]


def read_sources(names: Sequence[str]) -> list[AdapterFiles]:
    """Reads the adapters of directories or hub ids.

    Raises:
        ValueError, OSError: one is not whole, or folded, or comes twice.
    """
    sources = [AdapterFiles.read(name) for name in names]
    paths = [os.path.realpath(source.directory) for source in sources]
    for number, (name, source) in enumerate(zip(names, sources, strict=True)):
        if paths[number] in paths[:number]:
            raise ValueError(f"--init_adapters has {name} twice: name each adapter once")
        if source.is_folded:
            raise ValueError(f"{name} is folded, for inference only: give the adapter that it was folded from")
    return sources


def init_rows(task: Task, rows: Any, number_of_adapters: int, collate: Any, seed: int) -> dict[str, Tensor] | None:
    """Returns a batch of up to 200 training rows, drawn at random; None where one adapter is taken as it is.

    Raises:
        ValueError: there are several adapters, and the task has no head that reads whole rows, by which they are judged.
    """
    if not task.kind.has_head or task.kind.reads_words:
        if number_of_adapters > 1:
            raise ValueError(
                f"--init_adapters: {number_of_adapters} adapters are weighted by what a head reads of each row, and "
                f"{task.kind.asked_as} has no such head: give one of them"
            )
        return None
    chosen = np.random.default_rng(seed).permutation(len(rows))[:FIRST_ROWS]
    return dict(collate([rows[int(i)] for i in chosen]))


def start_in_words(model: EPTModel) -> str:
    """Says what an adapter started from: each one's weight, and the error by which it was weighted."""
    start = model.started_from
    if start is None:
        raise ValueError("the adapter did not start from others")
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in start.weights.items() if round(weight, 2))
    if start.errors is None:
        return f"started from {weights}"
    errors = ", ".join(f"{name} {error:.3f}" for name, error in start.errors.items())
    return f"started from {weights} (share of the labels' variance that each misses: {errors})"
