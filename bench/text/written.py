"""A task as text to write: a language model reads a row and learns its label's words, as `ept train --task continuation`."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ept.backbone.traits import IGNORE_INDEX
from ept.tasks.continuation import ContinuationCollator, candidates, contexts, label_scores
from ept.tasks.metrics import Answers, metrics_of

from .real_text import Task

__all__ = ["Written", "collator_of", "judge", "text_loss", "written_rows"]

BATCH = 32


class Written(NamedTuple):
    """What a language model makes of a part of a task.

    Attributes: `score` (the task's metric of the likeliest label), `exact_match` (the share of rows whose whole answer is
    at every token the likeliest one), `answer_loss` (mean over the answers' tokens), `chosen` (class numbers).
    """

    score: float
    exact_match: float
    answer_loss: float
    chosen: list[int]


def written_rows(task: Task, part: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    """Rows of at most `max_length` tokens, the cue among them; labels are class numbers. ValueError for a regression."""
    if task.problem_type == "regression":
        raise ValueError(f"{task.name} is a regression: only classes have words to write")
    texts = task.texts[part] if task.prompts is None else task.prompts[part]
    ids = contexts(tokenizer, texts, max_length)
    return [
        {"input_ids": row, "attention_mask": [1] * len(row), "labels": label, "length": len(row)}
        for row, label in zip(ids, task.labels[part], strict=True)
    ]


def collator_of(task: Task, tokenizer: PreTrainedTokenizerBase) -> ContinuationCollator:
    return ContinuationCollator(tokenizer, candidates(tokenizer, task.label_names))


@torch.no_grad()
def judge(
    model: nn.Module, rows: list[dict[str, Any]], collate: ContinuationCollator, task: Task, part: str
) -> Written:
    """Scores a part of a task, its rows in their order."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    chosen, right, loss, tokens = [0] * len(rows), 0, 0.0, 0
    for start in range(0, len(order), BATCH):
        index = order[start : start + BATCH]
        batch = collate([rows[i] for i in index])
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, -labels.shape[1] :][
            :, :-1
        ]  # PEFT's prompt has columns of its own before these
        wanted, targets = labels[:, 1:] != IGNORE_INDEX, labels[:, 1:]
        right += int(((logits.argmax(-1) == targets) | ~wanted).all(1).sum())
        loss += float(nn.functional.cross_entropy(logits[wanted].float(), targets[wanted], reduction="sum"))
        tokens += int(wanted.sum())
        scores = label_scores(model, [rows[i]["input_ids"] for i in index], collate)
        for i, number in zip(index, scores.argmax(1).tolist(), strict=True):
            chosen[i] = number
    answers = Answers(task.labels[part], chosen, task.num_labels)
    return Written(metrics_of([task.metric], answers)[task.metric], right / len(rows), loss / tokens, chosen)


@torch.no_grad()
def text_loss(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int) -> float:
    """Mean loss of a language model over the tokens of other texts, each of at most `max_length`."""
    model.eval()
    total, tokens = 0.0, 0
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt").input_ids
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
        total += float(nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    return total / tokens
