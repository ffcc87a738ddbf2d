"""Words and their labels as rows of tokens, and the spans that labels of words stand for.

A label stands at the first token of its word. The words of a row are joined with spaces and encoded as one text, so that a
tokenizer reads them as it reads any text; its offsets say where each word begins.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ept.backbone.traits import IGNORE_INDEX

__all__ = ["Span", "encode_words", "spans_of"]

Span = tuple[str, int, int]  # a label without its prefix, its first word, and the first word after it


def encode_words(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[str]],
    labels: Sequence[Sequence[int]] | None,
    limit: int | None,
) -> tuple[list[dict[str, Any]], int]:
    """Encodes rows of words as at most `limit` tokens each; returns them, and how many were cut.

    A row's `labels` hold the class number of a word at its first token, 0 where none are given, and -100 elsewhere.

    Raises:
        ValueError: the tokenizer gives no offsets, or no token of its own to some word.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            "labels of words need a fast tokenizer, which says where each token stands in the text: take another model"
        )
    encoded, number_cut = [], 0
    for number, words in enumerate(rows):
        row, starts = _encoded(tokenizer, _readable(tokenizer, words), limit)
        number_cut += None in starts
        marks = [IGNORE_INDEX] * len(row["input_ids"])
        for i, start in enumerate(starts):
            if start is not None:
                marks[start] = 0 if labels is None else labels[number][i]
        encoded.append(row | {"labels": marks})
    return encoded, number_cut


def _readable(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> Sequence[str]:
    """Returns the words, the unknown token in place of those of which the tokenizer leaves nothing."""
    starts = _encoded(tokenizer, words, None)[1]
    if None not in starts:
        return words
    missing = [word for word, start in zip(words, starts, strict=True) if start is None]
    if tokenizer.unk_token is not None:
        words = [str(tokenizer.unk_token) if word in missing else word for word in words]
        if None not in _encoded(tokenizer, words, None)[1]:
            return words
    raise ValueError(
        f"the tokenizer has no token of its own for the word {missing[0]!r} in {' '.join(words)!r}: leave it out"
    )


def _encoded(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str], limit: int | None
) -> tuple[dict[str, Any], list[int | None]]:
    """Encodes words as one text; returns the row, and the first token of each word, None where it has none."""
    text, places = " ".join(words), []  # the word of each character
    for i, word in enumerate(words):
        places += [i] * (len(word) + 1)
    cut = {} if limit is None else {"truncation": True, "max_length": limit}
    row = dict(tokenizer(text, return_offsets_mapping=True, verbose=False, **cut))
    starts: list[int | None] = [None] * len(words)
    for token, (start, end) in enumerate(row.pop("offset_mapping")):
        piece = text[start:end]
        if not piece.strip():
            continue  # a special token, or a space by itself
        word = places[start + len(piece) - len(piece.lstrip())]
        if starts[word] is None:
            starts[word] = token
    return row, starts


def spans_of(labels: Sequence[str]) -> list[Span]:
    """Returns the spans that the labels of a row's words stand for, in order.

    B-X begins a span of X, and so does an I-X that does not follow a word of X. A label without such a prefix is a span of
    one word; O is none.
    """
    spans: list[Span] = []
    open_label = None  # of the span that the next word may continue
    for number, label in enumerate(labels):
        prefix, _, name = label.partition("-")
        if label == "O":
            open_label = None
        elif prefix not in ("B", "I") or not name:
            spans.append((label, number, number + 1))
            open_label = None
        elif prefix == "I" and open_label == name:
            spans[-1] = (name, spans[-1][1], number + 1)
        else:
            spans.append((name, number, number + 1))
            open_label = name
    return spans
