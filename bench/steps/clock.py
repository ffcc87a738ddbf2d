"""Times by turns: what a step costs beside other methods' on the same batches, in the same minutes."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

__all__ = ["interleaved", "quartiles", "ratio", "settled"]


def interleaved(
    steps: dict[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    description: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each of several functions, called in turn; the first `warmup` rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in tqdm(range(warmup + rounds), desc=description, unit="round", disable=description is None):
        for name, step in steps.items():
            started = clock()
            step()
            if number >= warmup:
                seconds[name].append(clock() - started)
    return seconds


def ratio(seconds: list[float], baseline: list[float]) -> float:
    """The median over rounds of one function's seconds by the baseline's in the same round."""
    return quartiles(seconds, baseline)[1]


def quartiles(seconds: list[float], baseline: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile of the ratio within a round."""
    return statistics.quantiles([a / b for a, b in zip(seconds, baseline, strict=True)], n=4)


def settled(step: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The step, and on a GPU the wait until it is done there."""
    if device == "cpu":
        return step

    def until_done() -> None:
        step()
        torch.cuda.synchronize()

    return until_done
