"""`make compare`: EPT beside its peers on real text, at equal trained parameters, equal steps and equal wall-clock.

    python -m bench.accuracy.compare [--task movies] [--steps 150] [--seeds 3] [--processes 2]

Protocol, the same for every method:
1. Search: the three learning rates of ept/peers.py, one seed, `--search_steps` steps; the best on the dev part wins.
2. Final: that rate, `--steps` steps, `--seeds` seeds; the test part is read once per run. EPT's defaults and the middle
   rate of prompt tuning with 100 tokens run as well.
3. Equal wall-clock: prompt tuning again with as many steps as fit into the time that EPT's final run takes, by the
   ratio of their step times measured in turn.
One process per core, one thread each. Every run appends a JSON line to bench/results/compare-<task>.jsonl; a run that
stands there is not repeated, so an interrupted comparison goes on. The table is written beside it as Markdown.
"""

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import set_seed

from ept.compare.methods import METHODS, build
from ept.machine import describe
from ept.model.start_values import token_counts

from ..quiet import quiet
from ..steps.by_length import interleaved_seconds
from ..steps.clock import ratio
from ..text.real_text import TASKS, load_task, minilm
from ..text.rows import fit, load, predict, score

RESULTS = Path(__file__).parents[1] / "results"
BUDGET_ROWS = 100  # the budget is that of a soft prompt of so many tokens
MAX_LENGTH = 64
PATIENT = "prompt tuning 100"  # gets the equal wall-clock run
ALWAYS = {"EPT": 1.0, PATIENT: 0.005}  # run whatever the search says, since a short search favours fast rates
COMPARED = [method for method in METHODS if method not in ("BitFit", "full", "EPT deep", "LoRA all")]
IDENTITY = ("stage", "task", "method", "rate", "seed", "steps")


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One training run in a process of its own; returns the job with its scores."""
    torch.set_num_threads(1)
    quiet()
    task, tokenizer, rows = load(job["task"], MAX_LENGTH)
    set_seed(job["seed"])
    model, groups = build_method(job["method"], job["rate"], task, tokenizer, rows["train"])
    trace = fit(model, groups, rows["train"], tokenizer, steps=job["steps"], seed=job["seed"])
    part = "dev" if job["stage"] == "search" else "test"
    return job | {
        "score": score(task, predict(model, rows[part], tokenizer), part),
        "train_loss": statistics.mean(trace.losses[-5:]),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "step_seconds": statistics.median(trace.step_seconds),
    }


def build_method(method: str, rate: float, task, tokenizer, train_rows):
    counts = token_counts([row["input_ids"] for row in train_rows], len(tokenizer))
    return build(
        method, minilm(), task.num_labels, task.problem_type,
        budget=BUDGET_ROWS * 384, rate=rate, tokenizer=tokenizer, token_counts=counts,
    )  # fmt: skip


def run_all(jobs: list[dict[str, Any]], path: Path, processes: int, description: str) -> list[dict[str, Any]]:
    """The jobs' results, from the file where they stand there, else by running them, slowest first."""

    def identity(record: dict[str, Any]) -> tuple:
        return tuple(record[key] for key in IDENTITY)

    done = {}
    if path.exists():
        done = {identity(r): r for r in map(json.loads, path.read_text().splitlines()) if "stage" in r}
    missing = [job for job in jobs if identity(job) not in done]
    missing.sort(key=lambda job: job["steps"] * (4 if job["method"] == PATIENT else 1), reverse=True)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run, job) for job in missing]
        for future in tqdm(as_completed(futures), total=len(futures), desc=description, unit="run"):
            record = future.result()
            done[identity(record)] = record
            with open(path, "a") as file:
                file.write(json.dumps(record | {"machine": describe()}) + "\n")
    return [done[identity(job)] for job in jobs]


def step_ratios(name: str, methods: list[str], rounds: int = 8) -> dict[str, float]:
    """Each method's step time over prompt tuning's with 100 tokens, in turn on the task's own batches, one thread."""
    torch.set_num_threads(1)
    task, tokenizer, rows = load(name, MAX_LENGTH)
    models = {method: build_method(method, 1.0, task, tokenizer, rows["train"]) for method in methods}
    seconds = interleaved_seconds(models, rows["train"], tokenizer, rounds=rounds)
    return {method: ratio(seconds[method], seconds[PATIENT]) for method in methods}


def table(task, finals: dict[str, list[dict[str, Any]]], ratios: dict[str, float], settings: str) -> str:
    metric = "Pearson" if task.problem_type == "regression" else "accuracy"
    lines = [
        f"| method | trained parameters | learning rate | {metric}, mean ± deviation | by seed | step time |",
        "|---|---|---|---|---|---|",
    ]
    for label, records in finals.items():
        scores = [r["score"] for r in records]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        rate = records[0]["rate"]
        unit = "× default" if records[0]["method"] in ("EPT", "EPT paper", "DePT") else ""
        lines.append(
            f"| {label} | {records[0]['trained_parameters']:,} | {rate:g} {unit} | {statistics.mean(scores):.3f} ± {spread:.3f} "
            f"| {' '.join(f'{s:.3f}' for s in scores)} | {ratios[records[0]['method']]:.2f} |"
        )
    return "\n".join([*lines, "", settings])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="movies", choices=list(TASKS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--search_steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=COMPARED, choices=list(METHODS))
    options = parser.parse_args()
    quiet()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"compare-{options.task}.jsonl"
    task = load_task(options.task)  # downloads once, before the processes start

    common = {"task": options.task}
    searched = run_all(
        [
            common | {"stage": "search", "method": m, "rate": rate, "seed": 0, "steps": options.search_steps}
            for m in options.methods
            for rate in METHODS[m].learning_rates
        ],
        path, options.processes, "learning rates",
    )  # fmt: skip
    best = {
        m: max((r for r in searched if r["method"] == m), key=lambda r: r["score"])["rate"] for m in options.methods
    }
    chosen = {m: {best[m], ALWAYS.get(m, best[m])} for m in options.methods}
    jobs = [
        common | {"stage": "final", "method": m, "rate": rate, "seed": seed, "steps": options.steps}
        for m in options.methods
        for rate in sorted(chosen[m])
        for seed in range(options.seeds)
    ]
    finals: dict[str, list[dict[str, Any]]] = {}
    for record in run_all(jobs, path, options.processes, "final runs"):
        method, rate = record["method"], record["rate"]
        label = (
            f"{method} ({'defaults' if method == 'EPT' else 'middle rate'})" if rate == ALWAYS.get(method) else method
        )
        finals.setdefault(label, []).append(record)
    ratios = step_ratios(options.task, options.methods)
    if PATIENT in options.methods and "EPT" in options.methods:
        fewer = max(1, round(options.steps * ratios["EPT"]))
        jobs = [
            common | {"stage": "final", "method": PATIENT, "rate": best[PATIENT], "seed": seed, "steps": fewer}
            for seed in range(options.seeds)
        ]
        label = f"{PATIENT}, EPT's wall-clock ({fewer} steps)"
        finals[label] = run_all(jobs, path, options.processes, "equal wall-clock")
    machine = describe()
    settings = (
        f"Task `{options.task}`: {len(task.labels['train']):,} rows to train on, {len(task.labels['test']):,} test rows read "
        f"once per run; frozen MiniLM-L6, linear head on the mean of the text tokens (its parameters are counted); batch 32, "
        f"{options.steps} steps, {options.seeds} seeds. Learning rate: the best of three on the dev part after "
        f"{options.search_steps} steps. Step time: over {PATIENT}, in turn on the same batches, one thread. "
        f"{machine['device']}, Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"commit {machine['commit']}; `python -m bench.accuracy.compare --task {options.task}`."
    )
    text = table(task, finals, ratios, settings)
    (RESULTS / f"compare-{options.task}.md").write_text(text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    main()
