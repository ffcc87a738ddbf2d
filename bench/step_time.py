"""Step times as ratios of interleaved medians: what EPT costs beside its backbone and beside prompt tuning.

    python -m bench.step_time [--threads 1 2] [--rounds 15]

For MiniLM (real weights; batch 32, length 64) and a T5-small shape (seeded weights; batch 16, length 128), at the
trained parameters of a 100-token prompt:

    layer   a step with EPT over the same step on ready-made embeddings of the same total length: the layer's own cost
    step    a step with EPT over a step with PEFT's prompt tuning of 100 tokens

A step is forward, backward and AdamW. The methods take turns on the same batch; each figure is the median over rounds
of the ratio within a round, with its quartiles. Appends one JSON line per figure to bench/results/step_time.jsonl.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config
from transformers.utils import logging as hf_logging

from ept import EPTConfig, get_ept_model
from ept.training import parameter_groups

from .fit import collator
from .machine import describe
from .methods import build
from .real_text import minilm

__all__ = ["interleaved", "interleaved_seconds", "quartiles", "ratio"]

RESULTS = Path(__file__).parent / "results" / "step_time.jsonl"
PROMPT_TOKENS = 100


def interleaved(
    steps: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2, description: str | None = None
) -> dict[str, list[float]]:
    """Seconds of each of several functions, called in turn; the first `warmup` rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in tqdm(range(warmup + rounds), desc=description, unit="round", disable=description is None):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: list[float], baseline: list[float]) -> float:
    """The median over rounds of one function's seconds by the baseline's in the same round."""
    return quartiles(seconds, baseline)[1]


def quartiles(seconds: list[float], baseline: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile of the ratio within a round."""
    return statistics.quantiles([a / b for a, b in zip(seconds, baseline, strict=True)], n=4)


def training_step(model: nn.Module, groups: list[dict[str, Any]], batches: list[dict]) -> Callable[[], None]:
    """One step per call, on the batches in turn, at a learning rate of zero: the model stays as it is."""
    optimizer = torch.optim.AdamW([group | {"lr": 0.0} for group in groups], weight_decay=0.0)
    turn = 0

    def step() -> None:
        nonlocal turn
        model.train()
        model(**batches[turn % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        turn += 1

    return step


def interleaved_seconds(
    models: dict[str, tuple[nn.Module, list[dict[str, Any]]]],
    rows: list[dict[str, Any]],
    tokenizer,
    *,
    rounds: int,
    description: str | None = None,
) -> dict[str, list[float]]:
    """Seconds of whole training steps of models with their optimiser groups, on batches of 32 of the rows."""
    parts = [rows[i : i + 32] for i in range(0, 32 * (rounds + 1), 32)]
    steps = {
        name: training_step(model, groups, [collator(model, tokenizer)(part) for part in parts])
        for name, (model, groups) in models.items()
    }
    return interleaved(steps, rounds, warmup=1, description=description)


def floor_step(model: nn.Module, width: int, columns: int, batch: dict) -> Callable[[], None]:
    """The backbone alone on ready-made embeddings of the same total length that ask for their gradient."""
    labels, size = batch["labels"], len(batch["labels"])
    embeds = torch.randn(size, columns, width, requires_grad=True)
    mask = torch.ones(size, columns, dtype=torch.int64)

    def step() -> None:
        model.train()
        model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss.backward()
        embeds.grad = None
        model.zero_grad()

    return step


def minilm_steps(preset: str) -> dict[str, Callable[[], None]]:
    encoder = minilm()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    g = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": ids, "attention_mask": [1] * 64, "labels": i % 2, "length": 64}
        for i, ids in enumerate(torch.randint(2000, 20000, (32, 64), generator=g).tolist())
    ]
    ours, steps = "EPT" if preset == "default" else "EPT paper", {}
    for name, key, rate in ((ours, "EPT", 1.0), (f"prompt tuning {PROMPT_TOKENS}", "prompt tuning", 0.005)):
        model, groups = build(
            name, encoder, 2, "single_label_classification", budget=PROMPT_TOKENS * 384, rate=rate, tokenizer=tokenizer
        )
        batch = collator(model, tokenizer)(rows)
        steps[key] = training_step(model, groups, [batch])
        if key == "EPT":
            steps["floor"] = floor_step(model.base_model, 384, 64 + model.ept_config.prompt_length, batch)
    return steps


def t5_small_steps(preset: str) -> dict[str, Callable[[], None]]:
    def backbone():
        torch.manual_seed(0)
        config = T5Config(d_model=512, num_layers=6, num_heads=8, d_ff=2048, decoder_start_token_id=0, dropout_rate=0.0)
        return AutoModelForSeq2SeqLM.from_config(config)

    g = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(5, 32000, (16, 128), generator=g),
        "attention_mask": torch.ones(16, 128, dtype=torch.int64),
        "labels": torch.randint(5, 32000, (16, 4), generator=g),
    }
    model = get_ept_model(backbone(), EPTConfig.for_budget(PROMPT_TOKENS * 512, 512, preset=preset))
    peft_config = PromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=PROMPT_TOKENS, num_transformer_submodules=1
    )
    peer = get_peft_model(backbone(), peft_config)
    return {
        "EPT": training_step(model, parameter_groups(model), [batch]),
        "floor": floor_step(model.base_model, 512, 128 + model.ept_config.prompt_length, batch),
        "prompt tuning": training_step(peer, [{"params": [p for p in peer.parameters() if p.requires_grad]}], [batch]),
    }


SHAPES = {"MiniLM, batch 32, length 64": minilm_steps, "T5-small shape, batch 16, length 128": t5_small_steps}
FIGURES = {"layer": "floor", "step": "prompt tuning"}
GOALS = {"layer": 1.03, "step": 0.45}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step_time", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--presets", nargs="+", default=["default", "paper"], choices=["default", "paper"])
    options = parser.parse_args()
    hf_logging.set_verbosity_error()
    RESULTS.parent.mkdir(exist_ok=True)
    print(f"{'shape':38}{'preset':9}{'threads':>8}  {'figure':7}{'median':>8}{'quartiles':>16}{'goal':>7}{'ms':>7}")
    for threads in options.threads:
        torch.set_num_threads(threads)
        for shape, make in SHAPES.items():
            for preset in options.presets:
                seconds = interleaved(make(preset), options.rounds)
                for figure, baseline in FIGURES.items():
                    low, middle, high = quartiles(seconds["EPT"], seconds[baseline])
                    step_ms = 1000 * statistics.median(seconds["EPT"])
                    print(
                        f"{shape:38}{preset:9}{threads:>8}  {figure:7}{middle:>8.3f}{f'{low:.3f} … {high:.3f}':>16}"
                        f"{GOALS[figure]:>7.2f}{step_ms:>7.0f}",
                        flush=True,
                    )
                    record = {
                        "shape": shape, "preset": preset, "figure": figure, "ratio": middle, "quartiles": [low, high],
                        "goal": GOALS[figure], "step_ms": step_ms, "rounds": options.rounds,
                    }  # fmt: skip
                    with open(RESULTS, "a") as file:
                        file.write(json.dumps(record | describe()) + "\n")


if __name__ == "__main__":
    main()
