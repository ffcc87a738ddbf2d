"""Training steps on real text: methods in turn on its batches, and EPT's batches of similar length beside DePT's padding."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from ..text.real_text import load_task, minilm
from ..text.rows import encode, padding_collator
from .clock import interleaved, settled
from .methods import build
from .ratios import Clock, ratio_row
from .shapes import Shape, backbone
from .step import training_step

__all__ = ["BY_LENGTH", "by_length", "interleaved_seconds"]


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


BY_LENGTH = Shape("MiniLM, movie reviews", 16, 256, 4, ("query", "value"), "SEQ_CLS")


def by_length(device: str, rounds: int, clock: Clock = time.perf_counter) -> list[dict[str, Any]]:
    """EPT on batches of similar length, padded to their longest row, over DePT's recipe: all rows padded to 256 columns.

    The batches are a sixth, a half and five sixths of the way up the training rows by length. What is compared is the
    sum over them; a padded batch takes the same whatever is in it.
    """
    shape, columns = BY_LENGTH, BY_LENGTH.length
    base = backbone(dataclasses.replace(shape, name="MiniLM"), device)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    rows = sorted(encode(load_task("movies"), "train", tokenizer, columns), key=lambda row: row["length"])
    starts = [len(rows) * part // 6 - shape.batch // 2 for part in (1, 3, 5)]
    steps = {}
    for name, pad in (("EPT", None), ("DePT", columns)):
        model, groups = build(name, shape, base)
        batches = [_padded(rows[start : start + shape.batch], pad, device) for start in starts]
        steps[name] = settled(_all_of(training_step(model, groups, batches), len(batches)), device)
    seconds = interleaved(steps, rounds, warmup=1, description=f"{shape.name}, training", clock=clock)
    return [ratio_row(shape, "EPT by length", "DePT padded to 256", seconds["EPT"], seconds["DePT"])]


def _padded(rows: list[dict[str, Any]], columns: int | None, device: str) -> dict[str, Tensor]:
    width = columns or max(row["length"] for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : row["length"]], mask[i, : row["length"]] = torch.tensor(row["input_ids"]), 1
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def _all_of(step: Callable[[], Any], count: int) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(count):
            step()

    return steps
