"""The specification of `prompt_columns` in plain torch, row by row."""

import torch
from torch import Tensor

from .arguments import Columns, Rows, Settings


def prompt_columns(rows: Rows, settings: Settings) -> Columns:
    """Puts S columns before each row's first text token, the prompt last among them."""
    mask, lengths, labels = rows
    (batch, length), width = mask.shape, settings.width
    starts = torch.zeros(batch, dtype=torch.int32, device=mask.device)
    wide = mask.new_zeros(batch, width + length)
    for row in range(batch):
        text = (mask[row] != 0).nonzero().flatten().tolist()
        start = text[0] if text else length
        own = width if lengths is None else int(lengths[row])
        starts[row] = start
        wide[row, start + width - own : start + width] = 1
        wide[row, [width + column for column in text]] = 1
    positions = ((wide != 0).cumsum(1) - 1).clamp(min=0) + settings.first_position
    return Columns(starts, wide, positions, _behind(labels, mask, settings))


def _behind(labels: Tensor | None, mask: Tensor, settings: Settings) -> Tensor:
    """The labels behind S columns that do not count; an empty tensor without labels."""
    if labels is None:
        return mask.new_empty(0, 0)
    none = labels.new_full((len(labels), settings.width), settings.ignore_index)
    wide = torch.cat([none, labels], dim=1)
    if settings.drops_first_label:
        wide[:, settings.width : settings.width + 1] = settings.ignore_index
    return wide
