"""Columns of a batch, as pure functions of tensors: the prompt's go in, padding moves aside, the caller's come back."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ept.layer.base import PromptShape

__all__ = ["behind_padding", "insert", "insert_first", "insert_positions", "leading_padding", "taken", "widened"]


def leading_padding(attention_mask: Tensor) -> Tensor:
    """[batch] columns before each row's first text token."""
    return ((attention_mask != 0).cumsum(1) == 0).sum(1)


def insert(shape: PromptShape, columns: Tensor, value: int | Tensor) -> Tensor:
    """Columns [batch, L, …] with the prompt's put in: one value, or [batch, s, …] values."""
    if not isinstance(value, Tensor):
        value = columns.new_full((len(columns), shape.length, *columns.shape[2:]), value)
    return torch.cat([columns[:, : shape.start], value, columns[:, shape.start :]], dim=1)


def insert_first(shape: PromptShape, columns: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Columns [batch, L, …] with the prompt's put in, which are as each row's first text token's."""
    first = columns[:, :1]
    if attention_mask is not None:
        first = taken(columns, leading_padding(attention_mask).clamp(max=columns.shape[1] - 1).unsqueeze(1))
    return insert(shape, columns, first.expand(-1, shape.length, *columns.shape[2:]))


def behind_padding(shape: PromptShape, width: int, leading: Tensor) -> Tensor:
    """[batch, width = s + L] where to take columns from, so that the prompt's come to stand behind a row's padding on
    the left, `leading` [batch] wide."""
    s, lead = shape.length, leading.unsqueeze(1)
    column = torch.arange(width, device=leading.device)
    return torch.where(column < lead, column + s, torch.where(column < lead + s, column - lead, column))


def taken(tensor: Tensor, columns: Tensor) -> Tensor:
    """The columns [batch, m] of a tensor [batch, n, …]."""
    deeper = tensor.shape[2:]
    return tensor.gather(1, columns.reshape(*columns.shape, *(1 for _ in deeper)).expand(*columns.shape, *deeper))


def widened(columns: Tensor, width: int, value: int, left: bool) -> Tensor:
    """Columns [batch, n, …] with columns of `value` added on one side up to `width`."""
    missing = width - columns.shape[1]
    sides = (missing, 0) if left else (0, missing)
    return F.pad(columns, (0, 0) * (columns.dim() - 2) + sides, value=value) if missing else columns


def insert_positions(shape: PromptShape, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Explicit positions [batch, L] with the prompt's put in: it takes the positions where the text after it began."""
    s, start = shape
    unset = torch.iinfo(position_ids.dtype).max
    after = position_ids[:, start:]
    if attention_mask is not None:
        after = after.masked_fill(attention_mask[:, start:] == 0, unset)
    first = torch.cat([after, after.new_full((len(after), 1), unset)], dim=1).amin(dim=1, keepdim=True)
    if start:  # a row may have no text after the prompt
        first = first.where(first != unset, position_ids[:, start - 1 : start] + 1)
    prompt = first + torch.arange(s, device=position_ids.device, dtype=position_ids.dtype)
    moved = torch.cat([position_ids[:, :start], position_ids[:, start:] + s], dim=1)
    if attention_mask is not None:
        moved = moved.where(attention_mask != 0, 0)
    return insert(shape, moved, prompt)
