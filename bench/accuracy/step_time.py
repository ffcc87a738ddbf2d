"""Step times of the study's arms, in turn on the same batches: `python -m bench.accuracy.step_time [--rounds 12]`.

Writes bench/results/accuracy/step_time.json: each arm's time over that of the input-only preset, lower quartile, median
and upper quartile over the rounds. From the medians follow `EQUAL_TIME_STEPS` in arms.py.
"""

import argparse
import json
from typing import Any

import torch

from ept.compare.methods import adapt
from ept.machine import describe

from ..quiet import quiet
from ..steps.by_length import interleaved_seconds
from ..steps.clock import quartiles
from ..text.rows import load
from .arms import ARMS, BUDGET, STEPS, job
from .precision import fast_dtype
from .study import MAX_LENGTH, RESULTS, minilm_for


def measure(rounds: int) -> dict[str, Any]:
    """Ratios by arm, on movie snippets sorted by length as in training, one thread."""
    torch.set_num_threads(1)
    quiet()
    task, tokenizer, parts = load("movies", MAX_LENGTH)
    rows = sorted(parts["train"][: 32 * (rounds + 1)], key=lambda row: row["length"])
    models = {}
    for arm, told in ARMS.items():
        built = job(arm, **dict[str, Any](task="movies", rows=2000, seed=0) | told)
        models[arm] = adapt(
            built["method"], minilm_for(task, fast_dtype(built["dtype"])), budget=built["budget"], rate=1.0, tokenizer=tokenizer,
            settings=built.get("settings"),
        )  # fmt: skip
    seconds = interleaved_seconds(models, rows, tokenizer, rounds=rounds, description="step times")
    over = {arm: [round(q, 3) for q in quartiles(s, seconds["EPT"])] for arm, s in seconds.items()}
    return {"over EPT": over, "rounds": rounds, "budget": BUDGET, "machine": describe()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.step_time", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    measured = measure(parser.parse_args().rounds)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "step_time.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    for arm, (low, middle, high) in measured["over EPT"].items():
        print(f"{arm:24} {middle:.3f} ({low:.3f} to {high:.3f}): {round(STEPS / middle)} steps in EPT's time")


if __name__ == "__main__":
    main()
