"""Columns of a batch: where the prompt's go in, where the caller's come to stand."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Places", "leading_padding", "source_columns", "taken"]


def leading_padding(attention_mask: Tensor) -> Tensor:
    """[batch] columns before each row's first text token."""
    return ((attention_mask != 0).cumsum(1) == 0).sum(1)


def taken(tensor: Tensor, columns: Tensor) -> Tensor:
    """The columns [batch, m] of a tensor [batch, n, …]."""
    deeper = tensor.shape[2:]
    return tensor.gather(1, columns.reshape(*columns.shape, *(1 for _ in deeper)).expand(*columns.shape, *deeper))


def source_columns(width: int, starts: int | Tensor, lengths: Tensor, size: int) -> Tensor:
    """[n, width + size] which of the columns [prompt of `width` rows, text, filling] each column of a row has.

    Args:
        width: S.
        starts: the text column before which a prompt stands, one for all or [n].
        lengths: [n] how many of the S columns are prompt.
        size: text columns, or more: those that a shorter text has are the first.
    """
    start = starts.unsqueeze(1) if isinstance(starts, Tensor) else starts
    own, column = lengths.unsqueeze(1), torch.arange(width + size, device=lengths.device)
    behind_start = column - start
    text = torch.where(behind_start < 0, column + width, column + (width - own))
    return torch.where((behind_start >= 0) & (behind_start < own), behind_start, text)


@dataclass(frozen=True)
class Places:
    """The columns that a batch's prompts take: S in each row.

    Attributes:
        width: S.
        start: the text column before which they stand, one for all rows or [batch].
        lengths: [batch] how many of them are the row's prompt; None: all.
        prompt_last: whether the prompt is the last of the S columns, behind columns that count as padding. Otherwise it
            stands first, and these are at the end of the row.
        sources: gives `source_columns` of the rows for L text columns; None where all prompts have S rows, or stand last.
    """

    width: int
    start: int | Tensor
    lengths: Tensor | None
    prompt_last: bool
    sources: Callable[[int], Tensor] | None = None

    def behind(self, starts: Tensor) -> "Places":
        """The places before the text columns `starts` [batch]."""
        return replace(self, start=starts)

    def insert(self, columns: Tensor, value: int | Tensor, filling: int = 0) -> Tensor:
        """Columns [batch, L, …] with the prompt's put in: one value, or [batch, S, …] values. Returns [batch, S + L, …].

        `filling` is the value of what is neither text nor prompt.
        """
        if self.sources is not None:
            deeper = (0, 0) * (columns.dim() - 2)
            text = F.pad(columns, (*deeper, 0, self.width), value=filling)
            if isinstance(value, Tensor):
                joined = torch.cat([value, text], dim=1)
            else:
                joined = F.pad(text, (*deeper, self.width, 0), value=value)
            return taken(joined, self.sources(columns.shape[1]))
        if not isinstance(value, Tensor):
            value = columns.new_full((len(columns), self.width, *columns.shape[2:]), value)
        if self.lengths is None and not isinstance(self.start, Tensor):
            return torch.cat([columns[:, : self.start], value, columns[:, self.start :]], dim=1)
        parts = [columns, value]
        if self.lengths is not None:
            parts.append(columns.new_full((len(columns), 1, *columns.shape[2:]), filling))
        return taken(torch.cat(parts, dim=1), self._sources(len(columns), columns.shape[1], columns.device))

    def _sources(self, batch: int, length: int, device: torch.device) -> Tensor:
        """[batch, S + L]: the column of [text, prompt, filling] that each column has."""
        start = self.start.unsqueeze(1) if isinstance(self.start, Tensor) else self.start
        column = torch.arange(self.width + length, device=device)
        behind_start = column - start
        prompt = behind_start + length
        if self.lengths is not None:
            filling = self.width - self.lengths.unsqueeze(1)
            prompt = prompt.where(behind_start >= filling, length + self.width)
        source = torch.where(
            behind_start < 0, column, torch.where(behind_start < self.width, prompt, column - self.width)
        )
        return source.expand(batch, -1)

    def text_columns(self, text: Tensor) -> Tensor:
        """Where the text columns [batch, L] come to stand."""
        start = self.start.unsqueeze(1) if isinstance(self.start, Tensor) else self.start
        own = self.width if self.lengths is None or self.prompt_last else self.lengths.unsqueeze(1)
        return text + own * (text >= start)

    def insert_first(self, columns: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Columns [batch, L, …] with the prompt's put in, which are as each row's first text token's."""
        first = columns[:, :1]
        if attention_mask is not None:
            first = taken(columns, leading_padding(attention_mask).clamp(max=columns.shape[1] - 1).unsqueeze(1))
        return self.insert(columns, first.expand(-1, self.width, *columns.shape[2:]))

    def insert_positions(self, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Explicit positions [batch, L] with the prompt's put in: it takes the positions where the text after it began."""
        unset = torch.iinfo(position_ids.dtype).max
        start = self.start.unsqueeze(1) if isinstance(self.start, Tensor) else self.start
        own: int | Tensor = self.width if self.lengths is None else self.lengths.unsqueeze(1).to(position_ids.dtype)
        is_after = torch.arange(position_ids.shape[1], device=position_ids.device) >= start
        after = position_ids.masked_fill(~is_after, unset)
        if attention_mask is not None:
            after = after.masked_fill(attention_mask == 0, unset)
        first = torch.cat([after, after.new_full((len(after), 1), unset)], dim=1).amin(dim=1, keepdim=True)
        if isinstance(self.start, int) and self.start:  # a row may have no text after the prompt
            first = first.where(first != unset, position_ids[:, self.start - 1 : self.start] + 1)
        elif isinstance(self.start, Tensor):
            before = F.pad(position_ids, (1, 0)).gather(1, self.start.unsqueeze(1).long()) + 1
            first = first.where((first != unset) | (start == 0), before)
        number = torch.arange(self.width, device=position_ids.device, dtype=position_ids.dtype)
        prompt = first + (number - (self.width - own) if self.prompt_last else number)
        moved = torch.where(is_after, position_ids + own, position_ids)
        if attention_mask is not None:
            moved = moved.where(attention_mask != 0, 0)
        return self.insert(moved, prompt)
