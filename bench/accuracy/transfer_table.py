"""The transfer study's tables, from its lines alone.

    python -m bench.accuracy.transfer_table [--draws 2000]

Reads transfer.jsonl in bench/results/accuracy/ and writes transfer.md beside it.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Mapping

from ..text.real_text import load_task
from .arms import TASKS
from .bootstrap import INTERVAL, Bootstrap, Record, Runs
from .study import RESULTS, read

SCRATCH, SOURCES, FAR = "from scratch", "from sources", "from sources of other texts"
SIZES = (50, 100, 500, 2000)
ARMS = ("EPT", "EPT q=8", "LoRA r=2", "LoRA r=4", "LoRA, all linear")
PAIRS = [
    (("EPT", SOURCES), ("EPT", SCRATCH)),
    (("EPT", SOURCES), ("LoRA r=4", SCRATCH)),
    (("EPT", SOURCES), ("LoRA r=2", SOURCES)),
    (("EPT", SOURCES), ("LoRA r=4", SOURCES)),
    (("EPT", SOURCES), ("LoRA, all linear", SCRATCH)),
    (("EPT", SOURCES), ("LoRA, all linear", SOURCES)),
    (("EPT q=8", SOURCES), ("LoRA r=4", SOURCES)),
    (("EPT q=8", SOURCES), ("LoRA, all linear", SOURCES)),
    (("EPT", FAR), ("LoRA r=4", SCRATCH)),
    (("EPT", FAR), ("LoRA r=2", FAR)),
    (("EPT", FAR), ("LoRA r=4", FAR)),
    (("EPT", FAR), ("LoRA, all linear", FAR)),
    (("EPT", SCRATCH), ("LoRA r=4", SCRATCH)),
    (("EPT", SCRATCH), ("LoRA, all linear", SCRATCH)),
    (("LoRA r=4", SOURCES), ("LoRA r=4", SCRATCH)),
]


def final_runs(records: list[Record]) -> Mapping[tuple[int, str, str], Runs]:
    """(rows, arm, start) -> runs. `FAR` takes its own runs of the tasks that share their texts, and the others' as they are."""
    found: dict[tuple[int, str, str], dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in (r for r in records if r["stage"] == "final"):
        shared = record["task"] in ("movies", "rating")
        starts = [SCRATCH] if record["way"] == "scratch" else [FAR] if record["far"] else [SOURCES]
        starts += [FAR] if starts == [SOURCES] and not shared else []
        for start in starts:
            found[record["rows"], record["arm"], start][record["task"]][record["seed"]] = record
    return found


def final_table(found: Mapping[tuple[int, str, str], Runs], rows: int) -> list[str]:
    lines = [
        f"| {rows:,} rows | trained, without the head | {' | '.join(TASKS)} | mean |",
        "|---" * (len(TASKS) + 3) + "|",
    ]
    for arm in ARMS:
        for start in (SCRATCH, SOURCES, FAR):
            runs = found.get((rows, arm, start))
            if runs is None:
                continue
            scores = {task: [r["score"] for r in runs[task].values()] for task in TASKS}
            cells = [f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" for values in scores.values()]
            mean = statistics.mean(statistics.mean(values) for values in scores.values())
            size = min(r["trained_parameters"] for r in runs["rating"].values()) - 385  # its head
            lines.append(f"| {arm}, {start} | {size:,} | {' | '.join(cells)} | {mean:.4f} |")
    return lines


def differences(found: Mapping[tuple[int, str, str], Runs], bootstrap: Bootstrap, rows: int) -> list[str]:
    lines = [f"| difference at {rows:,} rows | points | {INTERVAL} | pairs of runs |", "|---|---|---|---|"]
    for first, second in PAIRS:
        one, other = (found.get((rows, *name)) for name in (first, second))
        if one is not None and other is not None:
            names = f"{', '.join(first)} − {', '.join(second)}"
            lines.append(f"| {names} | {bootstrap.difference(one, other)} |")
    return lines


def search_table(records: list[Record], stage: str) -> list[str]:
    """Every way and rate with its mean over tasks and seeds on dev parts, the usual head rate."""
    scores: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    chosen = [r for r in records if r["stage"] == stage and r["head_rate"] == 0.005]
    for record in chosen:
        scores[record["arm"], record["way"]][record["factor"]].append(record["score"])
    factors = sorted({record["factor"] for record in chosen})
    runs = {len(values) for by_factor in scores.values() for values in by_factor.values()}
    lines = [f"| dev, {min(runs)} runs a cell | {' | '.join(f'rate × {factor:g}' for factor in factors)} |"]
    lines.append("|---" * (len(factors) + 1) + "|")
    for (arm, way), by_factor in scores.items():
        cells = [f"{statistics.mean(by_factor[factor]):.4f}" if factor in by_factor else "–" for factor in factors]
        lines.append(f"| {arm}, {way} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy.transfer_table", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--draws", type=int, default=2000)
    draws = parser.parse_args().draws
    records = read("transfer")
    found = final_runs(records)
    bootstrap = Bootstrap({name: load_task(name) for name in TASKS}, draws)
    lines = ["# Starting from adapters of other tasks", ""]
    for rows in SIZES:
        lines += [*final_table(found, rows), "", *differences(found, bootstrap, rows), ""]
    lines += ["## The search at 100 rows", "", *search_table(records, "search 100"), ""]
    lines += ["## Other weights at 100 rows", "", *search_table(records, "weights"), ""]
    lines += ["## The search at 500 rows", "", *search_table(records, "search 500"), ""]
    lines += [
        "At 2,000 rows EPT from scratch goes at half of its default rate, which 500 rows chose: see `bench/NOTES.md`."
    ]
    lines += ["Mean ± deviation over seeds; protocol in `bench/accuracy/README.md`."]
    machines = sorted({tuple(sorted(record["machine"].items())) for record in records})
    lines += ["; ".join(f"{name} {value}" for name, value in machine) for machine in machines]
    text = "\n".join(lines)
    (RESULTS / "transfer.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
