"""Texts as token ids."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ept.data.columns import Columns, texts_of

__all__ = ["tokenize", "tokenize_targets"]


def tokenize(
    table: Dataset,
    source: str,
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    labels: list | None = None,
) -> tuple[Dataset, int]:
    """Returns the rows as tokens, cut to `max_length` and not padded, with `labels` if given; and how many rows were cut."""
    texts = [texts_of(table, source, name) for name in (columns.text, columns.text_pair) if name is not None]
    special = tokenizer.num_special_tokens_to_add(pair=len(texts) > 1)
    if max_length is not None and max_length <= special:
        raise ValueError(
            f"{source}: texts of at most {max_length} tokens hold nothing but the tokenizer's {special} special ones: "
            "raise `max_length`, or shorten the prompt where the backbone's positions are full"
        )

    def encode(*batch: list[str]) -> dict[str, Any]:
        # Without a limit first, since a tokenizer does not tell which rows it cut; few rows are encoded twice.
        encoded = tokenizer(*batch, verbose=False)
        cut = [max_length is not None and len(ids) > max_length for ids in encoded["input_ids"]]
        for i in (i for i, is_cut in enumerate(cut) if is_cut):
            again = tokenizer(*([column[i]] for column in batch), truncation=True, max_length=max_length)
            for key in encoded:
                encoded[key][i] = again[key][0]
        return dict(encoded) | {"cut": cut}

    data = Dataset.from_dict({str(i): column for i, column in enumerate(texts)})
    names = data.column_names
    data = data.map(
        encode, batched=True, input_columns=names, remove_columns=names, desc=f"Tokenising {Path(source).name}"
    )
    number_cut = sum(data["cut"])
    data = data.remove_columns("cut")
    return (data if labels is None else data.add_column("labels", labels)), number_cut


def tokenize_targets(
    table: Dataset, source: str, column: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[list[int]], int]:
    """Returns the token ids of the texts to be generated, for `tokenize`'s `labels`; and how many texts were cut."""
    texts = texts_of(table, source, column)
    ids = tokenizer(text_target=texts, verbose=False)["input_ids"]
    cut = [i for i, row in enumerate(ids) if len(row) > max_length]
    for i in cut:
        ids[i] = tokenizer(text_target=texts[i], truncation=True, max_length=max_length)["input_ids"]
    return ids, len(cut)
