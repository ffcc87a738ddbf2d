"""A causal language model as a classifier: which label's words are the likeliest continuation of the text.

A row is the text with CUE after it. It is trained on the right label's tokens alone; it is judged by the sum of the
log-probabilities of each label's tokens, the end of the text among them where the tokenizer has one.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ept.backbone.traits import IGNORE_INDEX

__all__ = ["CUE", "ContinuationCollator", "candidates", "contexts", "label_scores"]

CUE = " Answer:"  # stands between a text and its label, which follows after a space


def candidates(tokenizer: PreTrainedTokenizerBase, words: list[str]) -> list[list[int]]:
    """Returns each label's token ids as they follow CUE. ValueError if two labels have the same."""
    cue = _plain(tokenizer, [CUE.strip()])[0]
    ids = []
    for whole in _plain(tokenizer, [f"{CUE.strip()} {word}" for word in words]):
        same = next((i for i, (a, b) in enumerate(zip(cue, whole, strict=False)) if a != b), len(cue))
        ids.append(whole[same:] + ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]))
    for i, label_ids in enumerate(ids):
        if label_ids in ids[:i]:
            raise ValueError(
                f"the labels {words[ids.index(label_ids)]!r} and {words[i]!r} have the same tokens: rename one of them"
            )
    return ids


def contexts(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int | None = None) -> list[list[int]]:
    """Returns the texts' token ids with CUE after them, at most `max_length` tokens: the text is cut, never the cue."""
    cue = _plain(tokenizer, [CUE.strip()])[0]
    begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    start = [tokenizer.bos_token_id] if begins else []
    rows = []
    for text in texts:
        ids = start + _plain(tokenizer, [text + CUE])[0]
        if max_length is not None and len(ids) > max_length:
            ids = (start + _plain(tokenizer, [text])[0])[: max(0, max_length - len(cue))] + cue
        rows.append(ids)
    return rows


def _plain(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


class ContinuationCollator:
    """Batches of contexts (`input_ids`) and class numbers (`labels`) as token ids with the label's tokens as targets.

    Rows are padded to a multiple of `multiple` tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, label_ids: list[list[int]], multiple: int = 1):
        self.pad_token_id, self.label_ids, self.multiple = tokenizer.pad_token_id, label_ids, multiple

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return self.continued([(row["input_ids"], self.label_ids[int(row["labels"])]) for row in rows])

    def continued(self, pairs: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        """Makes `input_ids`, `attention_mask` and `labels` [rows, L], padded on the right, of contexts and continuations."""
        width = max(len(context) + len(ids) for context, ids in pairs)
        width = -(-width // self.multiple) * self.multiple
        batch = {
            "input_ids": torch.full((len(pairs), width), self.pad_token_id),
            "attention_mask": torch.zeros(len(pairs), width, dtype=torch.int64),
            "labels": torch.full((len(pairs), width), IGNORE_INDEX),
        }
        for i, (context, ids) in enumerate(pairs):
            end = len(context) + len(ids)
            batch["input_ids"][i, :end] = torch.tensor(context + ids)
            batch["attention_mask"][i, :end] = 1
            batch["labels"][i, len(context) : end] = torch.tensor(ids)
        return batch

    def separate(self, batch: dict[str, Tensor]) -> tuple[list[list[int]], list[int]]:
        """Returns the contexts and class numbers that a batch was made of."""
        texts, classes = [], []
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            target = labels[labels != IGNORE_INDEX].tolist()
            classes.append(self.label_ids.index(target))
            texts.append(ids[: int(mask.sum()) - len(target)].tolist())
        return texts, classes


@torch.no_grad()
def label_scores(model: nn.Module, rows: list[list[int]], collate: ContinuationCollator, at_once: int = 64) -> Tensor:
    """Returns the summed log-probabilities [rows, labels] of each label's tokens after each context.

    A pass of the model takes `at_once` sequences.
    """
    pairs = [(context, ids) for context in rows for ids in collate.label_ids]
    device = next(model.parameters()).device
    scores = []
    for start in range(0, len(pairs), at_once):
        batch = {k: v.to(device) for k, v in collate.continued(pairs[start : start + at_once]).items()}
        labels = batch.pop("labels")
        # PEFT's soft prompts have columns in the logits; the text's are the last.
        logits = model(**batch).logits[:, -labels.shape[1] :][:, :-1]
        targets, wanted = labels[:, 1:].clamp(min=0), labels[:, 1:] != IGNORE_INDEX
        # Over the wanted tokens alone: a softmax of every position would double the memory of the logits.
        chosen = torch.zeros(targets.shape, device=device)
        chosen[wanted] = logits[wanted].float().log_softmax(-1).gather(1, targets[wanted].unsqueeze(1)).squeeze(1)
        scores.append(chosen.sum(1).cpu())
    return torch.cat(scores).view(len(rows), len(collate.label_ids))
