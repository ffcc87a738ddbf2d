"""Step times by turns: what a training step costs beside other methods' on the same batches, in the same minutes."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .fit import padding_collator

__all__ = ["floor_step", "interleaved", "interleaved_seconds", "quartiles", "ratio", "training_step"]


def interleaved(
    steps: dict[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    description: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each of several functions, called in turn; the first `warmup` rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in tqdm(range(warmup + rounds), desc=description, unit="round", disable=description is None):
        for name, step in steps.items():
            started = clock()
            step()
            if number >= warmup:
                seconds[name].append(clock() - started)
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
        name: training_step(model, groups, [padding_collator(model, tokenizer)(part) for part in parts])
        for name, (model, groups) in models.items()
    }
    return interleaved(steps, rounds, warmup=1, description=description)


def floor_step(model: nn.Module, embeds: Tensor, labels: Tensor) -> Callable[[], None]:
    """A step of the backbone alone on ready-made embeddings [batch, columns, d], which ask for their gradient.

    The model stays in the mode that it is in: in evaluation mode its dropout is off, as it is behind EPT.
    """
    embeds = embeds.detach().requires_grad_()
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)

    def step() -> None:
        model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss.backward()
        embeds.grad = None
        model.zero_grad()

    return step
