"""A task as text to write: a language model reads a row and learns its label's words, as `ept train --task continuation`, or
a text of its own, as `ept train` does with prompts and completions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ept.backbone.traits import IGNORE_INDEX
from ept.tasks.continuation import ContinuationCollator, candidates, contexts, label_scores
from ept.tasks.metrics import Answers, metrics_of
from ept.tasks.writing import ExchangeCollator, encode_exchanges, read_pair

from .real_text import Task

__all__ = ["MILLI", "Written", "collator_of", "judge", "text_loss", "written_rows"]

BATCH = 32
MOST_TOKENS = 32  # of a text that is written
MILLI = 1000  # a loss on record is in thousandths
Collator = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


class Written(NamedTuple):
    """What a language model makes of a part of a task.

    Attributes: `score` (the task's metric of the likeliest label; of a text the mean over the rows of each one's loss per
    token), `exact_match` (the share of rows whose whole answer is at every token the likeliest one), `answer_loss` (mean over
    the answers' tokens), `predictions` (class numbers; of a text each row's loss in thousandths).
    """

    score: float
    exact_match: float
    answer_loss: float
    predictions: list[float]


def written_rows(task: Task, part: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    """Rows of at most `max_length` tokens before the answer, the cue among them; labels are class numbers, or a text's tokens.

    Raises:
        ValueError: the task is a regression.
    """
    if task.problem_type == "regression":
        raise ValueError(f"{task.name} is a regression: only classes have words to write")
    texts = task.texts[part] if task.prompts is None else task.prompts[part]
    if task.answers is not None:
        pairs = zip(texts, task.answers[part], strict=True)
        exchanges = [read_pair(tokenizer, text, answer, task.name) for text, answer in pairs]
        return encode_exchanges(tokenizer, exchanges, max_length, MOST_TOKENS)[0]
    ids = contexts(tokenizer, texts, max_length)
    return [
        {"input_ids": row, "attention_mask": [1] * len(row), "labels": label, "length": len(row)}
        for row, label in zip(ids, task.labels[part], strict=True)
    ]


def collator_of(task: Task, tokenizer: PreTrainedTokenizerBase) -> Collator:
    if task.answers is not None:
        return ExchangeCollator(tokenizer.pad_token_id)
    return ContinuationCollator(tokenizer, candidates(tokenizer, task.label_names))


@torch.no_grad()
def judge(model: nn.Module, rows: list[dict[str, Any]], collate: Collator, task: Task, part: str) -> Written:
    """Scores a part of a task, its rows in their order."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    chosen, losses, right, loss, tokens = [0] * len(rows), [0.0] * len(rows), 0, 0.0, 0
    for start in range(0, len(order), BATCH):
        index = order[start : start + BATCH]
        batch = collate([rows[i] for i in index])
        labels = batch.pop("labels")
        # PEFT's prompt has columns of its own before these.
        logits = model(**batch).logits[:, -labels.shape[1] :][:, :-1]
        wanted, targets = labels[:, 1:] != IGNORE_INDEX, labels[:, 1:]
        right += int(((logits.argmax(-1) == targets) | ~wanted).all(1).sum())
        of_token = torch.zeros(wanted.shape)
        of_token[wanted] = nn.functional.cross_entropy(logits[wanted].float(), targets[wanted], reduction="none")
        loss += float(of_token.sum())
        tokens += int(wanted.sum())
        for i, value in zip(index, (of_token.sum(1) / wanted.sum(1)).tolist(), strict=True):
            losses[i] = value
        if isinstance(collate, ContinuationCollator):
            scores = label_scores(model, [rows[i]["input_ids"] for i in index], collate)
            for i, number in zip(index, scores.argmax(1).tolist(), strict=True):
                chosen[i] = number
    exact, mean = right / len(rows), loss / tokens
    if task.answers is not None:
        return Written(sum(losses) / len(rows), exact, mean, [MILLI * value for value in losses])
    answers = Answers(task.labels[part], chosen, task.num_labels)
    return Written(metrics_of([task.metric], answers)[task.metric], exact, mean, list(map(float, chosen)))


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
