"""Differences between methods on the same rows and seeds, with their intervals.

A draw takes test rows and seeds with replacement: the same rows for both methods, the same seeds for all tasks, since a
seed's start values serve them all.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..text.real_text import Task
from ..text.written import MILLI
from .study import decode_predictions

__all__ = ["INTERVAL", "Bootstrap", "Difference", "Record", "Runs", "by_arm", "runs_by", "scores_of"]

INTERVAL = "95 % interval, rows and seeds"

Record = dict[str, Any]  # a line of a stage
Runs = Mapping[str, Mapping[int, Record]]  # task -> seed -> line


class Difference(NamedTuple):
    """Of two methods' means over tasks and seeds, in shares of 1: itself, the ends of its 95 % interval, the pairs of runs."""

    mean: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        """In points, as cells of a table: difference, interval, pairs."""
        return f"{100 * self.mean:+.2f} | {100 * self.low:+.2f} … {100 * self.high:+.2f} | {self.pairs}"


def runs_by(records: Iterable[Record], key: Callable[[Record], Hashable]) -> dict[Any, dict[str, dict[int, Record]]]:
    """The lines by what `key` says of them, in the order in which that first stands in the file."""
    runs: dict[Any, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        runs[key(record)][record["task"]][record["seed"]] = record
    return runs


def by_arm(record: Record) -> str:
    return str(record["arm"])


def scores_of(predictions: np.ndarray, labels: np.ndarray, metric: str) -> np.ndarray:
    """[…] accuracy, a correlation, or the mean loss over the last axis of predictions and labels [… , rows].

    A correlation is 0 where one of the two is constant, as it is for ept's metrics.
    """
    if metric == "loss":
        return predictions.mean(-1) / MILLI
    if metric not in ("pearson", "matthews"):  # Matthews' correlation is Pearson's of zeros and ones
        return (predictions == labels).mean(-1)
    x = predictions - predictions.mean(-1, keepdims=True)
    y = labels - labels.mean(-1, keepdims=True)
    size = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.where(size > 0, (x * y).sum(-1) / np.where(size > 0, size, 1), 0.0)


class Bootstrap:
    """Scores of runs on drawn rows.

    Args:
        tasks: by name, those of all runs.

    Raises:
        ValueError: a run was scored on another number of test rows than its task has.
    """

    def __init__(self, tasks: Mapping[str, Task], draws: int):
        self._rng, self._draws = np.random.default_rng(0), draws
        self._rows, self._labels, self._metric = {}, {}, {}
        for name, task in tasks.items():
            labels = np.asarray(task.labels["test"], dtype=float)
            drawn = self._rng.integers(len(labels), size=(draws, len(labels)))
            self._rows[name] = np.concatenate([np.arange(len(labels))[None], drawn])  # the first: the rows as they are
            self._labels[name] = labels[self._rows[name]]
            self._metric[name] = task.metric
        self._seeds: dict[int, np.ndarray] = {}
        self._scores: dict[tuple[str, str], np.ndarray] = {}

    def difference(self, first: Runs, second: Runs) -> Difference:
        """Of the tasks and seeds that both have. ValueError where there are none."""
        by_task, pairs = [], 0
        for name in self._rows:
            seeds = sorted(first.get(name, {}).keys() & second.get(name, {}).keys())
            if seeds:
                pairs += len(seeds)
                scores = np.stack([self._of(first[name][seed]) - self._of(second[name][seed]) for seed in seeds])
                by_task.append(scores[self._drawn(len(seeds)), np.arange(self._draws + 1)[:, None]].mean(1))
        if not by_task:
            raise ValueError("the methods share no task and seed")
        means = np.mean(by_task, axis=0)  # [1 + draws]
        low, high = np.quantile(means[1:], (0.025, 0.975))
        return Difference(float(means[0]), float(low), float(high), pairs)

    def _drawn(self, seeds: int) -> np.ndarray:
        """[1 + draws, seeds], the first the seeds as they are."""
        if seeds not in self._seeds:
            drawn = self._rng.integers(seeds, size=(self._draws, seeds))
            self._seeds[seeds] = np.concatenate([np.arange(seeds)[None], drawn])
        return self._seeds[seeds]

    def _of(self, record: Record) -> np.ndarray:
        """[1 + draws] scores of one run."""
        name, text = record["task"], record["predictions"]
        if (name, text) not in self._scores:
            stored = decode_predictions(text).astype(float)
            if len(stored) != self._rows[name].shape[1]:
                raise ValueError(
                    f"a line of {record['arm'] if 'arm' in record else record['form']} has {len(stored):,} predictions, but "
                    f"{name}'s test part has {self._rows[name].shape[1]:,} rows: its files are others than those of the run"
                )
            predictions = stored[self._rows[name]]
            self._scores[name, text] = scores_of(predictions, self._labels[name], self._metric[name])
        return self._scores[name, text]
