"""From the runs of a sweep, the paper's table as Markdown and as a picture."""

import json
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from ept.plots import plot_scores
from ept.tasks.glue import BENCHMARK_TASKS

__all__ = ["Cell", "draw", "markdown", "table"]


@dataclass
class Cell:
    """A method on a task at its best learning rate: the scores of its seeds."""

    metric: str
    rate: float
    scores: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores)

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds; 0 for one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0


def table(records: list[dict[str, Any]]) -> dict[str, dict[str, Cell]]:
    """Method -> task -> cell. Of several learning rates the one whose mean on the validation rows is highest, among
    those with the most seeds; the scores are the test rows' where there are any, else the validation rows'.

    Raises:
        ValueError: there are no runs, or runs of more than one model, length, budget or number of steps, or of two
            directories of own files with one name.
    """
    if not records:
        raise ValueError("the results hold no finished run: let ept sweep go on first")
    for name in ("model", "steps", "batch_size", "max_seq_length", "budget"):
        values = sorted({str(record[name]) for record in records})
        if len(values) > 1:
            raise ValueError(f"the runs differ in {name} ({', '.join(values)}): report them apart")
    _refuse_namesakes(records)
    runs: dict[tuple[str, str], dict[float, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for record in {json.dumps([r["task"], r["method"], r["learning_rate"], r["seed"]]): r for r in records}.values():
        runs[record["method"], record["task"]][record["learning_rate"]].append(record["metrics"])
    cells: dict[str, dict[str, Cell]] = {}
    for (method, task), rates in runs.items():
        metric = next(iter(next(iter(rates.values()))[0]["validation"]))

        def scores(rate: float, split: str, rates: Any = rates, metric: str = metric) -> list[float]:
            return [metrics.get(split, metrics["validation"])[metric] for metrics in rates[rate]]

        best = max(rates, key=lambda rate: (len(rates[rate]), statistics.mean(scores(rate, "validation"))))
        cells.setdefault(method, {})[task] = Cell(metric, best, scores(best, "test"))
    return cells


def _refuse_namesakes(records: list[dict[str, Any]]) -> None:
    """Raises ValueError if a task's runs are of several directories; a benchmark's hold the same rows."""
    directories: dict[str, set[str]] = defaultdict(set)
    for record in records:
        if record["task"] not in BENCHMARK_TASKS:
            directories[record["task"]].add(str(record["data"]))
    for task, names in directories.items():
        if len(names) > 1:
            raise ValueError(f"the runs of {task} differ in data ({', '.join(sorted(names))}): report them apart")


def markdown(cells: dict[str, dict[str, Cell]], records: list[dict[str, Any]], baseline: str) -> str:
    """Writes the table as Markdown, the best average first, with what the runs have in common below it.

    Args:
        cells: of `table(records)`.
        baseline: the method that the others are compared with.
    """
    tasks = _tasks_of(cells)
    metrics = {task: next(row[task].metric for row in cells.values() if task in row) for task in tasks}
    averages = {method: _average(row, tasks) for method, row in cells.items()}
    baseline_average = averages.get(baseline, math.nan)
    names = ["method", "trained parameters", *(f"{task} ({metrics[task]})" for task in tasks), "average"]
    lines = [_line([*names, f"{baseline} over it"]), "|---" * (len(names) + 1) + "|"]
    seeds = {record["seed"] for record in records}
    for method in sorted(cells, key=lambda name: (math.isnan(averages[name]), -averages[name])):
        # The most parameters, those with the largest head.
        parameters = max(record["trained_parameters"] for record in records if record["method"] == method)
        scores = [_score(cells[method].get(task), len(seeds)) for task in tasks]
        average = averages[method]
        gain = "" if method == baseline else _gain(baseline_average, average)
        lines.append(
            _line([method, f"{parameters:,}", *scores, "–" if math.isnan(average) else f"{average:.3f}", gain])
        )
    return "\n".join([*lines, *_legend(cells, records)])


def draw(cells: dict[str, dict[str, Cell]], path: str) -> None:
    """Draws the table as a picture at `path`."""
    tasks = _tasks_of(cells)
    scores = {
        method: [(row[task].mean, row[task].spread) if task in row else (math.nan, 0.0) for task in tasks]
        for method, row in cells.items()
    }
    plot_scores(scores, tasks, path)


def _tasks_of(cells: dict[str, dict[str, Cell]]) -> list[str]:
    return sorted({task for row in cells.values() for task in row})


def _average(row: dict[str, Cell], tasks: list[str]) -> float:
    """Returns the mean over all tasks; nan while one is missing."""
    return statistics.mean(row[task].mean for task in tasks) if all(task in row for task in tasks) else math.nan


def _line(words: list[str]) -> str:
    return f"| {' | '.join(words)} |"


def _score(cell: Cell | None, num_seeds: int) -> str:
    if cell is None:
        return "–"
    fewer = f" ({len(cell.scores)})" if len(cell.scores) < num_seeds else ""
    return f"{cell.mean:.3f} ± {cell.spread:.3f}{fewer}"


def _gain(baseline: float, average: float) -> str:
    """Returns the baseline's average over a method's, less one."""
    if math.isnan(average) or math.isnan(baseline) or average == 0:
        return "–"
    return f"{(baseline - average) / abs(average):+.1%}"


def _legend(cells: dict[str, dict[str, Cell]], records: list[dict[str, Any]]) -> list[str]:
    """Returns the lines below the table: the runs' settings, the learning rates that were chosen, the machines."""
    first, tasks = records[0], _tasks_of(cells)
    has_test = all("test" in record["metrics"] for record in records)
    split = "test" if has_test else "validation (or, where there is one, test)"
    seeds = ", ".join(map(str, sorted({record["seed"] for record in records})))
    dtypes = ", ".join(sorted({str(record.get("dtype", "auto")) for record in records}))
    machines = sorted({_described(record["machine"]) for record in records})
    return [
        "",
        f"Mean ± standard deviation over seeds {seeds} on the {split} rows; `{first['model']}`, "
        f"{first['steps']} steps of {first['batch_size']} rows of at most {first['max_seq_length']} tokens, budget "
        f"{first['budget']:,} parameters without the head, weights loaded as {dtypes}. "
        "In parentheses: of how many seeds, where that is not all. The last column is the baseline's average over the method's, "
        "less one. Learning rate: the best on the validation rows, of those that were run:",
        "",
        *(f"- {method}: {', '.join(f'{task} {row[task].rate:g}' for task in tasks if task in row)}"
          for method, row in cells.items()),
        "",
        *(f"Machine: {machine}" for machine in machines),
    ]  # fmt: skip


def _described(machine: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
