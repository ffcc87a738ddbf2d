"""A task of `bench.real_text` as rows for `ept.fitting`, and the score of a model's logits on it."""

from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ept.fitting import Fit, collator, fit
from ept.fitting import predict_logits as predict

from .real_text import Task

__all__ = ["Fit", "collator", "encode", "fit", "predict", "score", "token_counts"]


def encode(task: Task, part: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    """Token ids and labels of a part of a task, truncated, not padded."""
    encoded = tokenizer(task.texts[part], truncation=True, max_length=max_length, return_token_type_ids=False)
    label_type = float if task.problem_type == "regression" else int
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": label_type(label), "length": len(ids)}
        for ids, mask, label in zip(encoded["input_ids"], encoded["attention_mask"], task.labels[part], strict=True)
    ]


def token_counts(rows: list[dict[str, Any]], vocab_size: int) -> Tensor:
    """[vocab] how often each token occurs."""
    return torch.bincount(torch.tensor([i for row in rows for i in row["input_ids"]]), minlength=vocab_size)


def score(task: Task, logits: np.ndarray, part: str) -> float:
    """Accuracy, or Pearson's correlation for a regression."""
    labels = np.asarray(task.labels[part])
    if task.problem_type == "regression":
        return float(pearsonr(logits[:, 0], labels).statistic)
    return float((logits.argmax(1) == labels).mean())
