"""`make demo`: EPT's default on a real encoder and real text, in a few minutes.

Trains it, times a few steps of prompt tuning with 100 rows beside it, saves the adapter and its losses' picture to
runs/demo/, then loads the adapter in a new process and labels sentences that nobody has seen.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, set_seed

import ept
from ept import EPTModel, MeanPoolingForSequenceClassification
from ept.compare.methods import build
from ept.machine import describe
from ept.model.start_values import token_counts
from ept.plots import plot_loss

from ..quiet import quiet
from ..steps.by_length import interleaved_seconds
from ..steps.clock import ratio
from ..text.real_text import load_task, minilm
from ..text.rows import encode, fit, predict, score

METHOD = "EPT"
# Name shown -> the compared method, its budget, and its learning rate. A budget of 50 rows gives EPT its default sizes.
METHODS_SHOWN = {METHOD: ("EPT deep", 50 * 384, 1.0), "prompt tuning 100": ("prompt tuning 100", 100 * 384, 0.005)}
ARMS_ON_RECORD = {METHOD: "EPT, deep", "prompt tuning 100": "prompt tuning 100"}
ON_RECORD = Path(__file__).parents[1] / "results" / "accuracy" / "table.md"
MAX_LENGTH = 64
TRAINING_SECONDS = 150  # with the rest it stays under 4 minutes on two cores
FEWEST_STEPS, MOST_STEPS = 60, 300
SENTENCES = [
    "A warm, funny film that earns every one of its tears.",
    "A dull and clumsy story with wooden acting.",
    "Beautifully shot, and moving from the first scene to the last.",
    "An overlong, joyless exercise in style over substance.",
    "One of the best comedies of the year.",
    "The jokes fall flat and the ending makes no sense.",
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.demo", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, help="training steps (default: what fits into two and a half minutes, at most 300)"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument(
        "--predict", action="store_true", help="only load the adapter of output_dir and label sentences"
    )
    options = parser.parse_args()
    quiet()
    if options.predict:
        label_sentences(options.output_dir)
        return
    started = time.time()
    settings = {"task": "movies", "steps": options.steps, "seed": 0, "ept": ept.__version__}
    claim_output_dir(options.output_dir, settings)
    run(options.output_dir, settings)
    command = [sys.executable, "-m", "bench.accuracy.demo", "--predict", "--output_dir", str(options.output_dir)]
    subprocess.run(command, check=True)
    print(
        f"\nthe adapter, metrics.json and loss.png are in {options.output_dir}/ ({time.time() - started:.0f} s in all)"
    )


def claim_output_dir(directory: Path, settings: dict) -> None:
    """An earlier run of the same settings is replaced; anything else is moved aside, and said."""
    metrics = directory / "metrics.json"
    if not directory.exists() or not any(directory.iterdir()):
        return
    try:
        before = json.loads(metrics.read_text()).get("settings")
    except (OSError, ValueError):
        before = None  # cut short, or not the demo's
    if before != settings:
        number = 1
        while (aside := directory.with_name(f"{directory.name}-{number}")).exists():
            number += 1
        os.replace(directory, aside)
        print(f"{directory}/ held another run ({before or 'no whole metrics.json'}): it is now {aside}/")


def run(directory: Path, settings: dict) -> None:
    encoder, task = minilm(), load_task(settings["task"])
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    rows = {part: encode(task, part, tokenizer, MAX_LENGTH) for part in ("train", "test")}
    counts = token_counts([row["input_ids"] for row in rows["train"]], len(tokenizer))
    print(
        f"movie-review sentiment, {len(rows['train']):,} rows to train on, {len(rows['test']):,} held out; "
        f"MiniLM-L6, frozen; {torch.get_num_threads()} threads"
    )
    models = {}
    for name, (method, budget, rate) in METHODS_SHOWN.items():
        set_seed(settings["seed"])
        models[name] = build(
            method, encoder, task.num_labels, task.problem_type,
            budget=budget, rate=rate, tokenizer=tokenizer, token_counts=counts,
        )  # fmt: skip
    model, groups = cast(EPTModel, models[METHOD][0]), models[METHOD][1]
    seconds = interleaved_seconds(models, rows["train"], tokenizer, rounds=3, description="step times, in turn")
    in_time = int(TRAINING_SECONDS / statistics.median(seconds[METHOD]))
    steps = settings["steps"] or min(MOST_STEPS, max(FEWEST_STEPS, in_time))
    set_seed(settings["seed"])
    trace = fit(
        model, groups, rows["train"], tokenizer, steps=steps, seed=settings["seed"],
        description=f"train {METHOD}, {steps} steps of 32 rows",
    )  # fmt: skip
    logits = predict(model, rows["test"], tokenizer, description=f"test {METHOD}")
    results = {
        name: {
            "trained_parameters": sum(p.numel() for p in each.parameters() if p.requires_grad),
            "step_ms": 1000 * statistics.median(seconds[name]),
            "step_ratio": ratio(seconds[name], seconds[METHOD]),
            "on_record": on_record(ARMS_ON_RECORD[name], settings["task"]),
        }
        for name, (each, _) in models.items()
    }
    results[METHOD]["score"] = score(task, logits, "test")
    model.config.id2label = dict(enumerate(task.label_names))
    save(directory, settings, steps, results, {METHOD: (trace.steps, trace.losses)}, model, tokenizer)
    print_table(results, steps)


def on_record(arm: str, task: str) -> str:
    """A task's score of an arm in the accuracy study's table of 2,000 training rows, with its deviation over seeds."""
    lines = ON_RECORD.read_text(encoding="utf-8").splitlines()
    header = next(line for line in lines if line.startswith("| arm |"))
    row = next(line for line in lines if line.startswith(f"| {arm} |"))
    cells = dict(zip(header.split("|"), row.split("|"), strict=True))
    return cells[f" {task} "].strip()


def save(directory: Path, settings, steps, results, curves, model, tokenizer) -> None:
    """Everything into a fresh directory first, so that the old run stays until the new one is whole."""
    fresh = directory.with_name(directory.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    plot_loss(curves, fresh / "loss.png")
    record = {"methods": results, "settings": settings, "steps": steps, "machine": describe()}
    (fresh / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(fresh, directory)


def print_table(results: dict[str, dict[str, Any]], steps: int) -> None:
    print(f"\n{'method':20}{'trained':>10}{'step':>10}{'ratio':>8}{'accuracy now':>14}{'on record':>20}")
    for name, r in results.items():
        now = f"{r['score']:.3f}" if "score" in r else ""
        print(
            f"{name:20}{r['trained_parameters']:>10,}{r['step_ms']:>7.0f} ms{r['step_ratio']:>8.2f}{now:>14}{r['on_record']:>20}"
        )
    print(
        f"now: {steps} steps; 1,000 held-out rows, standard error about 0.012. On record (bench/results/accuracy/table.md):\n"
        "150 steps on 2,000 rows, several seeds. Of prompt tuning only the time is measured here."
    )


def label_sentences(directory: Path) -> None:
    """What a user does in another process: the backbone, the adapter, a sentence."""
    labels = json.loads((directory / "adapter_config.json").read_text())["label_names"]
    base = MeanPoolingForSequenceClassification.from_encoder(str(minilm()), num_labels=len(labels))
    model = EPTModel.from_pretrained(base, directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**batch).logits.softmax(-1)
    print("\nthe saved adapter in a new process:")
    for sentence, row in zip(SENTENCES, probabilities, strict=True):
        print(f"  {labels[row.argmax()]:9}{row.max():.2f}  {sentence}")


if __name__ == "__main__":
    main()
