"""A task of real text as rows to train on, and the score of a model's logits on it."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ept.compare.fit import Fit, fit
from ept.tasks.metrics import Answers, metrics_of
from ept.tasks.predicting import logits_predictor, padding_collator
from ept.tasks.predicting import predict as predict_rows

from .language_models import language_model
from .real_text import Task, load_task, minilm

__all__ = ["Fit", "encode", "fit", "load", "padding_collator", "predict", "score", "tokenizer_of"]


@functools.cache
def load(
    name: str, max_length: int, backbone: str = "minilm", glue: Path | None = None
) -> tuple[Task, PreTrainedTokenizerBase, dict[str, list[dict[str, Any]]]]:
    """A task, a backbone's tokenizer ("minilm" or one of `LANGUAGE_MODELS`), and each part's rows as `encode` makes them."""
    task, tokenizer = load_task(name, glue), tokenizer_of(backbone)
    return task, tokenizer, {part: encode(task, part, tokenizer, max_length) for part in ("train", "dev", "test")}


def tokenizer_of(backbone: str) -> PreTrainedTokenizerBase:
    """A language model's is padded on the left: PEFT's prompt tuning reads a row's last column for its last token."""
    if backbone == "minilm":
        return AutoTokenizer.from_pretrained(minilm())
    return AutoTokenizer.from_pretrained(language_model(backbone), padding_side="left")


def predict(
    model: nn.Module, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, description: str | None = None
) -> np.ndarray:
    """Logits [rows, labels] of a classification model, in the order of the rows; a bar if described."""
    return np.asarray(predict_rows(logits_predictor(model, tokenizer), rows, 64, description))


def encode(task: Task, part: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    """Token ids and labels of a part of a task, truncated, not padded."""
    pairs = None if task.pairs is None else task.pairs[part]
    encoded = tokenizer(task.texts[part], pairs, truncation=True, max_length=max_length, return_token_type_ids=False)
    label_type = float if task.problem_type == "regression" else int
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": label_type(label), "length": len(ids)}
        for ids, mask, label in zip(encoded["input_ids"], encoded["attention_mask"], task.labels[part], strict=True)
    ]


def score(task: Task, logits: np.ndarray, part: str) -> float:
    """The task's metric: accuracy, Matthews' correlation, or Pearson's for a regression."""
    is_regression = task.problem_type == "regression"
    predicted = logits[:, 0] if is_regression else logits.argmax(1)
    return metrics_of([task.metric], Answers(task.labels[part], predicted.tolist(), task.num_labels))[task.metric]
