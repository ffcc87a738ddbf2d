"""A task of `bench.real_text` as rows for `ept.fitting`, and the score of a model's logits on it."""

import functools
import warnings
from typing import Any

import numpy as np
from scipy.stats import pearsonr
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from ept.compare.fit import Fit, fit
from ept.tasks.predicting import collator
from ept.tasks.predicting import predict_logits as predict

from .real_text import Task, load_task, minilm, smollm2

__all__ = ["Fit", "collator", "encode", "fit", "load", "predict", "quiet", "score"]


def quiet() -> None:
    """No progress bars and warnings of transformers and PEFT, which are not the reader's."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # PEFT's


@functools.cache
def load(
    name: str, max_length: int, backbone: str = "minilm"
) -> tuple[Task, PreTrainedTokenizerBase, dict[str, list[dict[str, Any]]]]:
    """A task, the tokenizer of a backbone ("minilm" or "smollm2"), and the rows of each part as `encode` makes them."""
    task, tokenizer = load_task(name), AutoTokenizer.from_pretrained(minilm()) if backbone == "minilm" else _smollm2s()
    return task, tokenizer, {part: encode(task, part, tokenizer, max_length) for part in ("train", "dev", "test")}


def _smollm2s() -> PreTrainedTokenizerBase:
    """Padded on the left: PEFT's prompt tuning reads a row's last column for its last token."""
    return AutoTokenizer.from_pretrained(**smollm2(), padding_side="left")


def encode(task: Task, part: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    """Token ids and labels of a part of a task, truncated, not padded."""
    encoded = tokenizer(task.texts[part], truncation=True, max_length=max_length, return_token_type_ids=False)
    label_type = float if task.problem_type == "regression" else int
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": label_type(label), "length": len(ids)}
        for ids, mask, label in zip(encoded["input_ids"], encoded["attention_mask"], task.labels[part], strict=True)
    ]


def score(task: Task, logits: np.ndarray, part: str) -> float:
    """Accuracy, or Pearson's correlation for a regression."""
    labels = np.asarray(task.labels[part])
    if task.problem_type == "regression":
        return float(pearsonr(logits[:, 0], labels).statistic)
    return float((logits.argmax(1) == labels).mean())
