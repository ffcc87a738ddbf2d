"""The trained adapters of `--init_adapters`: checked early, and the rows by which they are weighted."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from ept.files.adapter_dir import read_adapter
from ept.model.files import AdapterFiles
from ept.model.model import EPTModel
from ept.model.transfer import FIRST_ROWS
from ept.tasks.task import Task

__all__ = ["check_same_backbone", "check_sources", "init_rows", "start_in_words"]


def check_sources(directories: Sequence[str]) -> None:
    """Raises ValueError or FileNotFoundError if a directory holds no whole adapter that can be trained on, or comes twice."""
    paths = [os.path.realpath(directory) for directory in directories]
    for number, directory in enumerate(directories):
        if paths[number] in paths[:number]:
            raise ValueError(f"--init_adapters has {directory} twice: name each adapter once")
        if read_adapter(directory)[0].get("folded"):
            raise ValueError(f"{directory} is folded, for inference only: give the adapter that it was folded from")


def check_same_backbone(directories: Sequence[str], backbone: PreTrainedModel) -> None:
    """Raises ValueError if an adapter was trained on another backbone."""
    for directory in directories:
        AdapterFiles.read(directory, backbone, ignore_backbone_mismatch=False)


def init_rows(task: Task, rows: Any, number_of_adapters: int, collate: Any, seed: int) -> dict[str, Tensor] | None:
    """Returns a batch of up to 200 training rows, drawn at random; None where one adapter is taken as it is.

    Raises:
        ValueError: there are several adapters, and the task has no head whose input could be judged.
    """
    if not task.kind.has_head:
        if number_of_adapters > 1:
            raise ValueError(
                f"--init_adapters: {number_of_adapters} adapters are weighted by what a head reads, and {task.kind.asked_as} "
                "has none: give one of them"
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
