"""The rows that are trained on: whether they are tokens, and their order."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    default_data_collator,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

__all__ = ["LengthGroupedByEpoch", "check_tokenised", "knows_lengths"]

# Collators that pad tokens and know no text; a class of one's own that is derived from them may know it.
OF_TOKENS = (DataCollatorWithPadding, DataCollatorForSeq2Seq, DataCollatorForTokenClassification)


def check_tokenised(rows: Any, name: str, collator: Any) -> None:
    """Raises ValueError if rows are text, which their collator does not tokenise; `name` is what the error calls them."""
    if collator is not default_data_collator and type(collator) not in OF_TOKENS:
        return
    row = _first(rows)
    if row is None or not row.keys().isdisjoint({"input_ids", "inputs_embeds"}):
        return
    texts = [str(column) for column, value in row.items() if isinstance(value, str)]
    if texts:
        raise ValueError(
            f"{name}: its rows hold text ({', '.join(texts)}) and no input_ids: tokenise them, as "
            f'tokenizer(row["{texts[0]}"]) does, or give a data_collator that makes batches of tokens from them'
        )


def knows_lengths(rows: Any, length_column: str) -> bool:
    """Tells whether rows that can be counted say how long they are: by their tokens, or by a column of lengths."""
    row = _first(rows)
    return row is not None and ("input_ids" in row or (length_column in row and hasattr(rows, "column_names")))


def _first(rows: Any) -> Mapping[str, Any] | None:
    """Returns the first row, where rows can be indexed and it is a mapping."""
    if not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__") or not len(rows):
        return None
    row = rows[0]
    return row if isinstance(row, Mapping) else None


class LengthGroupedByEpoch(LengthGroupedSampler):
    """transformers' sampler with its order a function of seed and epoch, so that a resumed epoch has the same batches.

    transformers draws the order from the global random state, which is another one after a resume, and takes the batch
    of one process; here it is that of all processes, so that the order is that of one with their batches together.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int, processes: int):
        super().__init__(sampler.batch_size * processes, lengths=sampler.lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()
