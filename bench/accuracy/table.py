"""The accuracy study's table and picture, from the lines of its final runs alone.

    python -m bench.accuracy.table [--draws 2000]

Writes table.md and accuracy.png into bench/results/accuracy/.
"""

import argparse
import statistics

from ..text.real_text import load_task
from .arms import ARMS, COMPARISONS, TASKS
from .bootstrap import INTERVAL, Bootstrap, Record, by_arm, runs_by
from .picture import Point, draw_scores
from .study import RESULTS, read

# The other stages that read the test parts, and their titles.
OTHERS = {
    "equal_time": "Equal time: as many steps as fit into the input-only preset's for 150, 2,000 training rows",
    "whole_sets": "Whole training sets, 300 steps",
}

LEVEL = "EPT (default)"
# Arm -> its label and family in the picture; variants of EPT that only the tables need are left out.
DRAWN = {
    "EPT, deep": ("EPT (default)", "EPT"),
    "EPT, deep q=8": ("EPT, twice as wide", "EPT"),
    "EPT": ("EPT, input only", "input only"),
    "EPT paper": ("the paper's EPT", "paper"),
    "DePT": ("DePT", "DePT"),
    "LoRA, a tenth": ("LoRA r = 1", "LoRA"),
    "LoRA r=2": ("LoRA r = 2", "LoRA"),
    "LoRA r=4": ("LoRA r = 4", "LoRA"),
    "prompt tuning 10": ("prompt tuning, 10 tokens", "prompt tuning"),
    "prompt tuning 20": ("20 tokens", "prompt tuning"),
    "prompt tuning 100": ("100 tokens", "prompt tuning"),
    "BitFit": ("BitFit", "BitFit"),
    "head only": ("head only", "head only"),
    "full fine-tuning": ("full fine-tuning", "full"),
}


def _table(records: list[Record]) -> list[str]:
    of_arm = runs_by(records, by_arm)
    tasks_run = [task for task in TASKS if any(task in tasks for tasks in of_arm.values())]
    most = max(len(runs) for tasks in of_arm.values() for runs in tasks.values())
    lines = [f"{most} seed{'s' * (most > 1)} where not said.", ""]
    lines += [f"| arm | trained, with the head | {' | '.join(tasks_run)} | mean |", "|---" * (len(tasks_run) + 3) + "|"]
    for arm in sorted(of_arm, key=list(ARMS).index):
        tasks = of_arm[arm]
        cells, task_means = [], []
        for task in tasks_run:
            scores = [record["score"] for record in tasks[task].values()]
            if not scores:
                cells.append("–")
                continue
            spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
            count = "" if len(scores) == most else f" ({len(scores)})"
            cells.append(f"{statistics.mean(scores):.3f}{spread}{count}")
            task_means.append(statistics.mean(scores))
        mean = f"{statistics.mean(task_means):.4f}" if len(task_means) == len(tasks_run) else "–"
        trained = max(r["trained_parameters"] for runs in tasks.values() for r in runs.values())
        lines.append(f"| {arm} | {trained:,} | {' | '.join(cells)} | {mean} |")
    return lines


def _comparisons(records: list[Record], bootstrap: Bootstrap) -> list[str]:
    runs = runs_by(records, by_arm)
    lines = [f"| difference of the means | points | {INTERVAL} | pairs of runs |", "|---|---|---|---|"]
    for first, second in COMPARISONS:
        if runs[first].keys() & runs[second].keys() == {record["task"] for record in records}:
            lines.append(f"| {first} − {second} | {bootstrap.difference(runs[first], runs[second])} |")
    return lines


def _points(records: list[Record], bootstrap: Bootstrap) -> list[Point]:
    """The methods drawn of one size of training set, each with the interval of its difference from EPT (default)."""
    runs = runs_by(records, by_arm)
    level = next(arm for arm, (label, _) in DRAWN.items() if label == LEVEL)
    points = []
    for arm, (label, family) in DRAWN.items():
        if runs[arm].keys() == set(TASKS):
            own = [record for record in records if record["arm"] == arm]
            tasks = [[r["score"] for r in own if r["task"] == task] for task in TASKS]
            score = statistics.mean(statistics.mean(scores) for scores in tasks)
            interval = None
            if arm != level:
                mean, low, high, _ = bootstrap.difference(runs[arm], runs[level])
                interval = (score + low - mean, score + high - mean)
            points.append(Point(label, family, max(r["trained_parameters"] for r in own), score, interval))
    return points


def picture(records: list[Record], bootstrap: Bootstrap) -> None:
    """Writes accuracy.png: one panel for each training-set size, mean over the tasks against trained parameters."""
    sizes = sorted({record["rows"] for record in records}, reverse=True)
    panels = {
        f"{rows:,} training rows": _points([record for record in records if record["rows"] == rows], bootstrap)
        for rows in sizes
    }
    draw_scores(panels, LEVEL, "score, mean of five tasks", RESULTS / "accuracy.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.table", description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=2000)
    draws = parser.parse_args().draws
    records = read("final")
    if not records:
        raise SystemExit("no final runs yet: python -m bench.accuracy.study final")
    sections = {
        f"{rows:,} training rows": [record for record in records if record["rows"] == rows]
        for rows in sorted({record["rows"] for record in records}, reverse=True)
    }
    sections |= {title: read(stage) for stage, title in OTHERS.items()}
    bootstrap = Bootstrap({name: load_task(name) for name in TASKS}, draws)
    lines = []
    for title, chosen in sections.items():
        if chosen:
            lines += [f"## {title}", "", *_table(chosen), "", *_comparisons(chosen, bootstrap), ""]
    everything = [record for chosen in sections.values() for record in chosen]
    machines = sorted({tuple(sorted(record["machine"].items())) for record in everything})
    lines += ["Mean ± deviation over seeds; protocol in `bench/accuracy/README.md`."]
    lines += ["; ".join(f"{name} {value}" for name, value in machine) for machine in machines]
    text = "\n".join(lines)
    (RESULTS / "table.md").write_text(text + "\n", encoding="utf-8")
    picture(records, bootstrap)
    print(text)


if __name__ == "__main__":
    main()
