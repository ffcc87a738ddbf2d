"""reference.py for all rows at once: fifteen operations with labels."""

import torch
import torch.nn.functional as F

from .arguments import Columns, Rows, Settings


def prompt_columns(rows: Rows, settings: Settings) -> Columns:
    """reference.prompt_columns."""
    mask, lengths, labels = rows
    length, width = mask.shape[1], settings.width
    text = mask != 0
    starts = (text.cumsum(1) == 0).sum(1, dtype=torch.int32)
    column = torch.arange(width + length, device=mask.device, dtype=torch.int32)
    behind_start = column - starts.unsqueeze(1)
    filler = 0 if lengths is None else (width - lengths).unsqueeze(1)
    wide = torch.where(behind_start < width, behind_start >= filler, F.pad(text, (width, 0)))
    positions = (wide.cumsum(1) + (settings.first_position - 1)).clamp(min=settings.first_position)
    moved = mask.new_empty(0, 0)
    if labels is not None:
        first = int(settings.drops_first_label and length > 0)
        moved = F.pad(labels[:, first:], (width + first, 0), value=settings.ignore_index)
    return Columns(starts, wide.to(mask.dtype), positions, moved)
