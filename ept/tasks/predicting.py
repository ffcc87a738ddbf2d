"""Predictions of a model, as tensors or texts and as lines."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from ept.tasks.continuation import label_scores
from ept.tasks.task import Problem, Split

__all__ = ["lines_of", "predict"]


@torch.no_grad()
def predict(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    batch: dict[str, Tensor],
    max_new_tokens: int = 128,
) -> Tensor | list[str]:
    """Logits [rows, classes], values [rows] or generated texts for a padded batch of tokens."""
    inputs: dict[str, Any] = {key: value.to(model.ept.prompt.device) for key, value in batch.items() if key != "labels"}
    if task == "text2text":
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)
    logits = model(**inputs).logits.float().cpu()
    return logits.squeeze(-1) if task == "regression" else logits


def lines_of(task: str, predictions: Tensor | list[str], label_names: Callable[[int], str]) -> Iterator[str]:
    """One line per row: label and probability with a tab between, the value, or the text."""
    if not isinstance(predictions, Tensor):
        yield from (" ".join(text.split("\n")) for text in predictions)
    elif task == "regression":
        yield from (f"{value:.6g}" for value in predictions.tolist())
    else:
        best = predictions.softmax(-1).max(-1)
        for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            yield f"{label_names(label)}\t{probability:.6f}"


@torch.no_grad()
def predict_split(
    model: nn.Module,
    problem: Problem,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_new_tokens: int,
    description: str | None = "Evaluating",
) -> Tensor | list[str]:
    """What `Problem.metrics` judges, for every row of a split, from an EPTModel or a model of `ept.peers`."""
    model.eval()
    device = next(model.parameters()).device
    rows = split.data.remove_columns("labels")
    if problem.kind == "continuation":
        collate = problem.collator(tokenizer)

        def run(rows: list[dict[str, Any]]) -> Tensor:
            return label_scores(model, [row["input_ids"] for row in rows], collate)

        return torch.stack(in_batches(rows, batch_size, list, run, description))

    writer: Any = model  # of a class that has `generate`, for text2text

    def generate(batch: dict[str, Tensor]) -> list[str]:
        ids = writer.generate(**_on(device, batch), max_new_tokens=max_new_tokens)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    def logits(batch: dict[str, Tensor]) -> Tensor:
        return model(**_on(device, batch)).logits.float().cpu()

    if problem.kind == "text2text":
        return in_batches(rows, batch_size, DataCollatorWithPadding(tokenizer), generate, description)
    return torch.stack(in_batches(rows, batch_size, collator(model, tokenizer), logits, description))


def _on(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in batch.items()}


Batch = TypeVar("Batch")


class _Collator(DataCollatorWithPadding):
    """Pads to the longest row; PEFT prompt tuning's head must be told which columns are text (its rows come first)."""

    prompt_rows: int = 0

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__([{k: v for k, v in f.items() if k != "length"} for f in features])
        if self.prompt_rows:
            mask = batch["attention_mask"]
            batch["pooling_mask"] = torch.cat([mask.new_zeros(len(mask), self.prompt_rows), mask], dim=1)
        return dict(batch)


def collator(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> _Collator:
    """The collator of classification and regression rows for a model of `ept.peers`."""
    from ept.backbone.heads import MeanPoolingForSequenceClassification

    collate = _Collator(tokenizer)
    peft = getattr(model, "active_peft_config", None)
    if peft is not None and peft.is_prompt_learning and isinstance(
        model.base_model, MeanPoolingForSequenceClassification
    ):  # fmt: skip
        collate.prompt_rows = peft.num_virtual_tokens
    return collate


def in_batches(
    rows: Any,
    batch_size: int,
    collate: Callable[[list[dict[str, Any]]], Batch],
    run: Callable[[Batch], Any],
    description: str | None = None,
) -> list[Any]:
    """What `run` gives for each row, in the order of the rows; batches of similar length; a bar if described."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    results: list[Any] = [None] * len(rows)
    for start in tqdm(range(0, len(order), batch_size), desc=description, unit="batch", disable=description is None):
        index = order[start : start + batch_size]
        for i, result in zip(index, run(collate([rows[i] for i in index])), strict=True):
            results[i] = result
    return results


@torch.no_grad()
def predict_logits(
    model: nn.Module,
    rows: Any,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 64,
    description: str | None = None,
) -> np.ndarray:
    """Logits [rows, labels] of a classification model, in the order of the rows; a bar if described."""
    model.eval()
    device = next(model.parameters()).device

    def run(batch: dict[str, Tensor]) -> np.ndarray:
        return model(**{k: v.to(device) for k, v in batch.items() if k != "labels"}).logits.float().cpu().numpy()

    return np.stack(in_batches(rows, batch_size, collator(model, tokenizer), run, description))
