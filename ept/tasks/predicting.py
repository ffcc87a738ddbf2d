"""Predictions for rows of tokens, from any model that transformers runs.

A predictor is a function from some unpadded rows to their predictions; `predict` runs one over any number of rows.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from ept.backbone.heads import MeanPoolingForSequenceClassification
from ept.backbone.traits import IGNORE_INDEX
from ept.tasks.continuation import ContinuationCollator, label_scores
from ept.tasks.writing import left_padded, prompt_of

__all__ = [
    "PaddingCollator",
    "Predictor",
    "answer_loss",
    "answer_predictor",
    "logits_predictor",
    "padding_collator",
    "predict",
    "score_predictor",
    "text_predictor",
    "word_predictor",
    "written_answers",
]

Row = dict[str, Any]
Predictor = Callable[[list[Row]], Tensor | list[Any]]


@torch.no_grad()
def predict(predictor: Predictor, rows: Any, batch_size: int, description: str | None = None) -> Tensor | list[Any]:
    """Predicts all rows; returns the predictions in the rows' order. A description shows a progress bar.

    Args:
        predictor: what one of this module's functions gave.
        rows: a list or a Dataset of rows with `input_ids`; rows of similar length are put into a batch.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    predictions: list[Any] = [None] * len(rows)
    for start in tqdm(range(0, len(order), batch_size), desc=description, unit="batch", disable=description is None):
        index = order[start : start + batch_size]
        for i, prediction in zip(index, predictor([rows[i] for i in index]), strict=True):
            predictions[i] = prediction
    return torch.stack(predictions) if isinstance(predictions[0], Tensor) else predictions


def logits_predictor(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Predictor:
    """Returns a predictor of logits [rows, labels], fp32 on the CPU, of a model that has a head."""
    collate = padding_collator(model.eval(), tokenizer)

    @torch.no_grad()
    def logits(rows: list[Row]) -> Tensor:
        return model(**_on_device(model, collate(_without_labels(rows)))).logits.float().cpu()

    return logits


def text_predictor(model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Predictor:
    """Returns a predictor of the texts that a model with `generate` writes."""
    writer: Any = model.eval()
    collate = DataCollatorWithPadding(tokenizer)

    @torch.no_grad()
    def texts(rows: list[Row]) -> list[str]:
        ids = writer.generate(**_on_device(model, collate(_without_labels(rows))), max_new_tokens=max_new_tokens)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    return texts


def answer_predictor(model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Predictor:
    """Predicts the answers that a causal model writes; of rows with labels, to what stands before the last answer."""

    @torch.no_grad()
    def texts(rows: list[Row]) -> list[str]:
        ids = written_answers(model, [prompt_of(row) for row in rows], tokenizer, max_new_tokens)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    return texts


@torch.no_grad()
def written_answers(
    model: nn.Module, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> Tensor:
    """Writes the likeliest tokens after each prompt up to the end of text: [rows, max_new_tokens or fewer]."""
    writer: Any = model.eval()
    batch = _on_device(model, left_padded(prompts, tokenizer.pad_token_id))
    ids = writer.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return ids[:, batch["input_ids"].shape[1] :]


@torch.no_grad()
def answer_loss(model: nn.Module, rows: Any, collate: Callable[[list[Row]], Any], batch_size: int) -> float:
    """Computes the mean loss over the tokens that are learned in all rows, with a model whose labels are tokens."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    total, tokens = 0.0, 0
    for start in range(0, len(order), batch_size):
        batch = dict(collate([rows[i] for i in order[start : start + batch_size]]))
        here = int((batch["labels"] != IGNORE_INDEX).sum())
        total += float(model(**_on_device(model, batch)).loss) * here
        tokens += here
    return total / tokens


def word_predictor(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Predictor:
    """Returns a predictor of each word's class number, of a model that labels tokens; rows say by labels where words begin."""
    logits = logits_predictor(model, tokenizer)

    def words(rows: list[Row]) -> list[list[int]]:
        # The padding's side decides in which columns a row's tokens are.
        chosen, left = cast(Tensor, logits(rows)).argmax(-1), tokenizer.padding_side == "left"
        classes = []
        for row, here in zip(rows, chosen, strict=True):
            length = len(row["labels"])
            tokens = here[-length:] if left else here[:length]
            classes.append([int(n) for n, mark in zip(tokens, row["labels"], strict=True) if mark != IGNORE_INDEX])
        return classes

    return words


def score_predictor(model: nn.Module, collate: ContinuationCollator) -> Predictor:
    """Returns a predictor of each label's score [rows, labels] as a continuation, of a causal language model."""
    model.eval()
    return lambda rows: label_scores(model, [row["input_ids"] for row in rows], collate)


class PaddingCollator(DataCollatorWithPadding):
    """Pads to the longest row and returns a plain dict.

    PEFT's prompt tuning puts rows before the text: a head that takes a mean must be told which columns are text.
    `prompt_rows` is their number; above 0 the batch has a `pooling_mask`.
    """

    prompt_rows: int = 0

    def __call__(self, features: list[Row]) -> dict[str, Tensor]:
        batch = super().__call__([{k: v for k, v in row.items() if k != "length"} for row in features])
        if self.prompt_rows:
            mask = batch["attention_mask"]
            batch["pooling_mask"] = torch.cat([mask.new_zeros(len(mask), self.prompt_rows), mask], dim=1)
        return dict(batch)


def padding_collator(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, multiple: int | None = None
) -> PaddingCollator:
    """Returns the collator for a model with a head, an EPTModel or one of the compared methods'.

    With `multiple` rows are padded to a multiple of so many tokens.
    """
    collate = PaddingCollator(tokenizer, pad_to_multiple_of=multiple)
    peft = getattr(model, "active_peft_config", None)
    if peft is not None and peft.is_prompt_learning and isinstance(
        model.base_model, MeanPoolingForSequenceClassification
    ):  # fmt: skip
        collate.prompt_rows = peft.num_virtual_tokens
    return collate


def _without_labels(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "labels"} for row in rows]


def _on_device(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}
