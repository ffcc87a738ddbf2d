"""Rows of ratios.csv: a method's time over another's within a round, and the goals."""

from collections.abc import Callable
from typing import Any

from .clock import quartiles
from .methods import PROMPT_TUNING
from .shapes import Shape

__all__ = ["FEWEST_ROUNDS", "FLOOR", "GOALS", "Clock", "floor_name", "ratio_row"]

Clock = Callable[[], float]
FEWEST_ROUNDS = 3
FLOOR = "floor"
# (method, over) -> goal, where it holds for every shape; beside a shape where it does not.
GOALS: dict[tuple[str, str], float | dict[str, float]] = {
    ("EPT", FLOOR): 1.02,
    ("EPT", PROMPT_TUNING): {"MiniLM": 0.45, "T5-small": 0.70},
    ("EPT", "LoRA"): 1.10,
    ("EPT by length", "DePT padded to 256"): 0.50,
    ("EPT folded", "backbone"): 1.01,
    ("mixed batch of 8 adapters", "batch of one adapter"): 1.05,
    ("mixed batch of 32 adapters", "batch of one adapter"): 1.05,
}


def floor_name(method: str) -> str:
    """The name of an EPT preset's floor: their lengths and trained tensors differ."""
    return FLOOR if method == "EPT" else f"{FLOOR} of {method}"


def ratio_row(shape: Shape, method: str, over: str, seconds: list[float], baseline: list[float]) -> dict[str, Any]:
    """The ratio within a round as median and quartiles, its goal, and whether the median meets it."""
    low, median, high = quartiles(seconds, baseline)
    goal = GOALS.get((method, over))
    if isinstance(goal, dict):
        goal = goal.get(shape.name)
    return shape.identity | {
        "method": method, "over": over, "unit": "ratio", "median": median, "low": low, "high": high,
        "rounds": len(seconds), "goal": "" if goal is None else goal, "met": "" if goal is None else median <= goal,
    }  # fmt: skip
