"""`ept report`: from the runs of `ept sweep`, the paper's table as Markdown and as a picture."""

import json
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

__all__ = ["Cell", "table"]


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
        ValueError: there are no runs, or runs of more than one model, length, budget or number of steps.
    """
    if not records:
        raise ValueError("the results hold no finished run: let ept sweep go on first")
    for name in ("model", "steps", "batch_size", "max_seq_length", "budget"):
        values = sorted({str(record[name]) for record in records})
        if len(values) > 1:
            raise ValueError(f"the runs differ in {name} ({', '.join(values)}): report them apart")
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


def _average(row: dict[str, Cell], tasks: list[str]) -> float:
    """The mean over all tasks; nan while one is missing."""
    return statistics.mean(row[task].mean for task in tasks) if all(task in row for task in tasks) else math.nan


def _markdown(cells: dict[str, dict[str, Cell]], records: list[dict[str, Any]], baseline: str) -> str:
    tasks = sorted({task for row in cells.values() for task in row})
    parameters: dict[str, int] = {}  # the most, with the largest head
    for record in records:
        parameters[record["method"]] = max(parameters.get(record["method"], 0), record["trained_parameters"])
    seeds = sorted({record["seed"] for record in records})
    averages = {method: _average(row, tasks) for method, row in cells.items()}
    metrics = {task: next(row[task].metric for row in cells.values() if task in row) for task in tasks}
    mark = averages.get(baseline, math.nan)
    head = [
        "method",
        "trained parameters",
        *(f"{task} ({metrics[task]})" for task in tasks),
        "average",
        f"{baseline} over it",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method in sorted(
        cells, key=lambda m: (math.isnan(averages[m]), -averages[m] if averages[m] == averages[m] else 0)
    ):
        row, average = cells[method], averages[method]
        shown = []
        for task in tasks:
            scores = row[task].scores if task in row else []
            fewer = f" ({len(scores)})" if len(scores) < len(seeds) else ""
            shown.append(f"{row[task].mean:.3f} ± {row[task].spread:.3f}{fewer}" if scores else "–")
        known = not (math.isnan(average) or math.isnan(mark) or average == 0)
        over = "" if method == baseline else f"{(mark - average) / abs(average):+.1%}" if known else "–"
        shown += ["–" if math.isnan(average) else f"{average:.3f}", over]
        lines.append(f"| {' | '.join([method, f'{parameters[method]:,}', *shown])} |")
    split = (
        "test"
        if all("test" in record["metrics"] for record in records)
        else "validation (or, where there is one, test)"
    )
    first = records[0]
    kinds = sorted({str(record.get("dtype", "auto")) for record in records})
    machines = sorted({_said_of(record["machine"]) for record in records})
    lines += [
        "",
        f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))} on the {split} rows; `{first['model']}`, "
        f"{first['steps']} steps of {first['batch_size']} rows of at most {first['max_seq_length']} tokens, budget "
        f"{first['budget']:,} parameters without the head, weights loaded as {', '.join(kinds)}. "
        "In parentheses: of how many seeds, where that is not all. The last column is the baseline's average over the method's, "
        "less one. Learning rate: the best on the validation rows, of those that were run:",
        "",
        *(f"- {method}: {', '.join(f'{task} {cells[method][task].rate:g}' for task in tasks if task in cells[method])}"
          for method in cells),
        "",
        *(f"Machine: {machine}" for machine in machines),
    ]  # fmt: skip
    return "\n".join(lines)


def _said_of(machine: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)


def _draw(cells: dict[str, dict[str, Cell]], path: str) -> None:
    from ept.plots import plot_scores

    tasks = sorted({task for row in cells.values() for task in row})
    plot_scores(
        {method: [(row[t].mean, row[t].spread) if t in row else (math.nan, 0.0) for t in tasks] for method, row in cells.items()},
        tasks, path,
    )  # fmt: skip
