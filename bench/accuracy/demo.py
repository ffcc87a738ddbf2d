"""`make demo`: EPT on a real encoder and real text beside prompt tuning and the head alone, in a few minutes.

Trains, compares at the same number of trained parameters, saves the adapter and two pictures to runs/demo/, then loads
the adapter in a new process and labels sentences that nobody has seen.
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

import torch
from transformers import AutoTokenizer, set_seed

import ept
from ept import EPTModel, MeanPoolingForSequenceClassification
from ept.compare.methods import build
from ept.machine import describe
from ept.model.start_values import token_counts
from ept.plots import plot_gates, plot_loss

from ..quiet import quiet
from ..steps.by_length import interleaved_seconds
from ..steps.clock import ratio
from ..text.real_text import load_task, minilm
from ..text.rows import encode, fit, predict, score

METHODS_SHOWN = {"EPT": 1.0, "prompt tuning 100": 0.005, "head only": 0.02}  # with the learning rate of each
BASELINE = "prompt tuning 100"
MAX_LENGTH = 64
TRAINING_SECONDS = 240  # all methods together; with the rest it stays under 6 minutes on two cores
FEWEST_STEPS, MOST_STEPS = 20, 150
SENTENCES = [
    "A warm, funny film that earns every one of its tears.",
    "Two hours of my life that I will never get back.",
    "The plot is thin, but the leads are so good that it hardly matters.",
    "An overlong, joyless exercise in style over substance.",
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="training steps of each method (default: what fits into 4 minutes)")
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
    settings = {"task": "movies", "steps": options.steps, "seed": 0, "budget": 100 * 384, "ept": ept.__version__}
    claim_output_dir(options.output_dir, settings)
    run(options.output_dir, settings)
    command = [sys.executable, "-m", "bench.accuracy.demo", "--predict", "--output_dir", str(options.output_dir)]
    subprocess.run(command, check=True)
    print(
        f"\nadapter, metrics.json, loss.png and gates.png are in {options.output_dir}/ ({time.time() - started:.0f} s in all)"
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
    for name, rate in METHODS_SHOWN.items():
        set_seed(settings["seed"])
        models[name] = build(
            name, encoder, task.num_labels, task.problem_type,
            budget=settings["budget"], rate=rate, tokenizer=tokenizer, token_counts=counts,
        )  # fmt: skip
    seconds = interleaved_seconds(models, rows["train"], tokenizer, rounds=6, description="step times, in turn")
    median = {name: statistics.median(s) for name, s in seconds.items()}
    steps = settings["steps"] or int(min(MOST_STEPS, max(FEWEST_STEPS, TRAINING_SECONDS / sum(median.values()))))
    print(f"{steps} steps of 32 rows for each method")

    curves, results = {}, {}
    for name, (model, groups) in models.items():
        before = model.gate_weights() if isinstance(model, EPTModel) else None
        set_seed(settings["seed"])
        trace = fit(
            model, groups, rows["train"], tokenizer, steps=steps, seed=settings["seed"], description=f"train {name}"
        )
        curves[name] = (trace.steps, trace.losses)
        logits = predict(model, rows["test"], tokenizer, description=f"test {name}")
        results[name] = {
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "score": score(task, logits, "test"),
            "step_ms": 1000 * median[name],
            "step_ratio": ratio(seconds[name], seconds[BASELINE]),
        }
        if isinstance(model, EPTModel):
            gates = (before, model.gate_weights())
            model.config.id2label = dict(enumerate(task.label_names))
    save(directory, settings, steps, results, curves, gates, models["EPT"][0], tokenizer)
    print_table(results)


def save(directory: Path, settings, steps, results, curves, gates, model, tokenizer) -> None:
    """Everything into a fresh directory first, so that the old run stays until the new one is whole."""
    fresh = directory.with_name(directory.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    plot_loss(curves, fresh / "loss.png")
    plot_gates(gates[1], gates[0], fresh / "gates.png")
    record = {"methods": results, "settings": settings, "steps": steps, "machine": describe()}
    (fresh / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(fresh, directory)


def print_table(results: dict[str, dict[str, float]]) -> None:
    print(f"\n{'method':20}{'trained':>10}{'accuracy':>10}{'step':>10}{'ratio':>8}")
    for name, r in results.items():
        print(
            f"{name:20}{r['trained_parameters']:>10,}{r['score']:>10.3f}{r['step_ms']:>7.0f} ms{r['step_ratio']:>8.2f}"
        )
    print("accuracy on 1,000 held-out rows (standard error about 0.012); trained parameters with the head's 770")


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
