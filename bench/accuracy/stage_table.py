"""A stage's table, from lines alone: python -m bench.accuracy.stage_table STAGE [--glue DIRECTORY]

Writes bench/results/accuracy/STAGE.md: each arm's scores by task and, where the stage read the test parts, the differences
of the first arm and of EPT's others from the arms behind them with their 95 % intervals, and STAGE.png.
"""

import argparse
import itertools
import statistics
from collections.abc import Mapping
from pathlib import Path

from ..text.real_text import Task, load_task
from .arms import ALL_ROWS, STAGES
from .bootstrap import INTERVAL, Bootstrap, Record, Runs, by_arm, runs_by
from .picture import COLOURS, Point, draw_scores
from .study import RESULTS, glue_tasks, read

# Stage -> arms of other files, on the same rows and seeds, that stand beside its own.
BESIDE = {
    "lora_all_final": ("EPT, deep q=8", "EPT, deep", "LoRA r=4", "LoRA r=2"),
    "gemma3_final": ("EPT, deep, plain start", "EPT, deep, full rate", "EPT, deep, half rate", "EPT, deep, rate 0.6"),
    "smollm2_final": ("EPT, deep, plain start", "EPT, deep, full rate"),
    "gemma3_rates": tuple(
        f"EPT, deep q=4, {rate}"
        for rate in ("full rate, 1", "full rate, 0.5", "full rate, 0.25", "half rate, 1", "half rate, 0.5")
    ),
    "smollm2_rates": tuple(f"EPT, deep q=4, full rate, {rate}" for rate in ("1", "0.5", "0.25", "2")),
}
EARLIER = ("plain_start", "earlier_rates")  # in the table, not in the picture
OTHER_FILES = ("final", *EARLIER)


def _place(record: Record) -> tuple[str | None, str, int | None, int]:
    return record.get("backbone"), record["task"], record.get("rows"), record["seed"]


def _in_order(records: list[Record], stage: str) -> list[Record]:
    """The lines by arm, in the order in which the stage names its arms."""
    arms = list(dict.fromkeys(job["arm"] for job in STAGES[stage]()))
    return sorted(records, key=lambda record: arms.index(record["arm"]) if record["arm"] in arms else len(arms))


def score_rows(runs: Mapping[str, Runs], stage: str) -> list[str]:
    tasks = list(dict.fromkeys(task for arm in runs.values() for task in arm))
    lines = [f"| {stage} | trained, with the head | {' | '.join(tasks)} |", "|---" * (len(tasks) + 2) + "|"]
    for arm, by_task in runs.items():
        cells = [_cell([record["score"] for record in by_task.get(task, {}).values()]) for task in tasks]
        trained = max(record["trained_parameters"] for own in by_task.values() for record in own.values())
        lines.append(f"| {arm} | {trained:,} | {' | '.join(cells)} |")
    return lines


def written_rows(runs: Mapping[str, Runs]) -> list[str]:
    """What language models wrote: means over seeds. What is forgotten is the rise of the loss on other text."""
    lines = [
        "| written | task | exact match | loss of the answers | loss on other text: before | rise | s/step |",
        "|---" * 7 + "|",
    ]
    for arm, by_task in runs.items():
        for task, own in by_task.items():
            names = ("exact_match", "answer_loss", "other_text_loss_before", "other_text_loss", "step_seconds")
            exact, loss, before, after, seconds = (statistics.mean(run[name] for run in own.values()) for name in names)
            lines.append(
                f"| {arm} | {task} | {exact:.3f} | {loss:.3f} | {before:.3f} | {after - before:+.3f} | {seconds:.2f} |"
            )
    return [*lines, ""]


def _cell(scores: list[float]) -> str:
    if not scores:
        return "–"
    spread = f" ± {statistics.stdev(scores):.4f} ({len(scores)} seeds)" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.4f}{spread}"


def picture(runs: Mapping[str, Runs], stage: str, tasks: dict[str, Task], bootstrap: Bootstrap) -> None:
    """Writes STAGE.png: a panel for each task, each arm with the interval of its difference from the first."""
    first, panels = next(iter(runs)), {}
    for name, task in tasks.items():
        points = []
        for arm, by_task in runs.items():
            if name not in by_task or name not in runs[first]:
                continue
            own, interval = by_task[name].values(), None
            score = statistics.mean(record["score"] for record in own)
            if arm != first:
                mean, low, high, _ = bootstrap.difference({name: by_task[name]}, {name: runs[first][name]})
                interval = (score + low - mean, score + high - mean)
            family = next((family for family in COLOURS if arm.startswith(family)), arm)
            points.append(Point(arm, family, max(record["trained_parameters"] for record in own), score, interval))
        if points:
            panels[f"{name} ({task.metric})"] = points
    draw_scores(panels, first, "score", RESULTS / f"{stage}.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.stage_table", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--glue", type=Path, metavar="DIRECTORY", help="of GLUE's files, for stages with its tasks")
    options = parser.parse_args()
    records, beside = _in_order(read(options.stage), options.stage), BESIDE.get(options.stage, ())
    if not records:
        raise SystemExit(f"no lines of {options.stage} yet: python -m bench.accuracy.study {options.stage}")
    of_glue = glue_tasks(parser, options, records)
    places = {_place(record) for record in records}
    others_there = {name: [r for r in read(name) if r["arm"] in beside and _place(r) in places] for name in OTHER_FILES}
    records += itertools.chain.from_iterable(others_there.values())
    runs = runs_by(records, by_arm)
    lines = [*score_rows(runs, options.stage), ""]
    if all("answer_loss" in record for record in records):
        lines += written_rows(runs)
    first, *others = runs
    bootstrap = None
    if all("predictions" in record for record in records) and others:
        names = sorted({record["task"] for record in records})
        tasks = {name: of_glue[name] if name in of_glue else load_task(name) for name in names}
        unit = "hundredths; less is better" if any(task.metric == "loss" for task in tasks.values()) else "points"
        lines += [
            f"| difference of the means | {unit} | {INTERVAL} | pairs of runs |",
            "|---|---|---|---|",
        ]
        bootstrap = Bootstrap(tasks, options.draws)
        own = [first, *(arm for arm in others if arm.startswith("EPT") and arm not in beside)]
        for arm, other in itertools.combinations(runs, 2):
            if other.startswith("EPT") and not arm.startswith("EPT"):
                arm, other = other, arm
            if arm in own or (arm.startswith("EPT") and not other.startswith("EPT")):
                lines.append(f"| {arm} − {other} | {bootstrap.difference(runs[arm], runs[other])} |")
        for task, arm in itertools.product(names if len(names) > 1 else (), others):
            if task in runs[first] and task in runs[arm]:
                of_task = ({task: runs[name][task]} for name in (first, arm))
                lines.append(f"| {task}: {first} − {arm} | {bootstrap.difference(*of_task)} |")
        lines.append("")
        if any(len(by_seed) == 1 for own_tasks in runs.values() for by_seed in own_tasks.values()):
            lines += ["Where a method has one seed, the interval draws rows alone.", ""]
    common = {"steps", "batch_size", "max_length", "rows", "budget", "backbone"}
    settings = {name: {record.get(name) for record in records} for name in sorted(common)}
    settings["rows"] = {"all" if rows == ALL_ROWS else rows for rows in settings["rows"]}
    told = [
        f"{name} {next(iter(values))}" for name, values in settings.items() if len(values) == 1 and None not in values
    ]
    machines = sorted({tuple(sorted(record["machine"].items())) for record in records})
    lines += [f"Protocol in `bench/accuracy/README.md`; {', '.join(told)}."]
    lines += ["; ".join(f"{name} {value}" for name, value in machine) for machine in machines]
    text = "\n".join(lines)
    (RESULTS / f"{options.stage}.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if bootstrap is not None:
        undrawn = {record["arm"] for name in EARLIER for record in others_there[name]}
        drawn = {arm: by_task for arm, by_task in runs.items() if arm not in undrawn}
        try:
            picture(drawn, options.stage, tasks, bootstrap)
        except ValueError as error:
            raise SystemExit(f"the table is written, but not the picture: {error}") from None


if __name__ == "__main__":
    main()
