"""The columns of left-padded rows in one launch: a program for each row, which waits for nobody.

It reads its mask twice, the second time from the cache: to find the first text token, and to count. The loads of a chunk do
not depend on each other.
"""

import torch
import triton
import triton.language as tl

from ..common.triton_launch import NUM_WARPS, launch, launching_on
from .arguments import Columns, Rows, Settings

CHUNK = 1024  # columns at a time: eight to a thread


@triton.jit(do_not_specialize=["length", "width", "first_position", "ignore_index"])
def columns_kernel(
    mask, lengths, labels, starts, wide, positions, moved, length, width, first_position, ignore_index,
    CHUNK: tl.constexpr, LENGTHS: tl.constexpr, LABELS: tl.constexpr, DROPS_FIRST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, CHUNK)
    mask += row * length
    start = length + tl.sum(tl.zeros([CHUNK], tl.int32))
    for first in range(0, length, CHUNK):
        column = first + within
        text = tl.load(mask + column, column < length, other=0) != 0
        start = tl.minimum(start, tl.min(tl.where(text, column, length)))
    tl.store(starts + row, start)
    own = width
    if LENGTHS:
        own = tl.load(lengths + row).to(tl.int32)
    whole = width + length
    base = row * whole
    before = tl.sum(tl.zeros([CHUNK], tl.int32))
    for first in range(0, whole, CHUNK):
        column = first + within
        there = column < whole
        token = column - width
        text = tl.load(mask + token, there & (token >= 0), other=0) != 0
        behind_start = column - start
        seen = tl.where(behind_start < width, behind_start >= width - own, text) & there
        count = before + tl.cumsum(seen.to(tl.int32))
        before += tl.sum(seen.to(tl.int32))
        tl.store(wide + base + column, seen.to(wide.dtype.element_ty), there)
        tl.store(positions + base + column, (tl.maximum(count - 1, 0) + first_position).to(tl.int64), there)
        if LABELS:
            counts = token >= (1 if DROPS_FIRST else 0)
            label = tl.load(labels + row * length + token, there & counts, other=0)
            tl.store(moved + base + column, tl.where(counts, label, ignore_index), there)


def forward(rows: Rows, settings: Settings) -> Columns:
    """The columns in one launch."""
    results = empty_results(rows, settings)
    starts, wide, positions, moved = results
    batch, length = rows.mask.shape
    if batch == 0:
        return results
    mask, seen = (t.view(torch.uint8) if t.dtype == torch.bool else t for t in (rows.mask, wide))
    with launching_on(wide):
        launch(
            columns_kernel, batch,
            mask, rows.lengths, rows.labels, starts, seen, positions, moved,
            length, settings.width, settings.first_position, settings.ignore_index,
            CHUNK=CHUNK, LENGTHS=rows.lengths is not None, LABELS=rows.labels is not None,
            DROPS_FIRST=settings.drops_first_label, num_warps=NUM_WARPS,
        )  # fmt: skip
    return results


def empty_results(rows: Rows, settings: Settings) -> Columns:
    """The tensors that `forward` fills, for real and for fake inputs."""
    mask, _, labels = rows
    batch, length = mask.shape
    shape = (batch, settings.width + length)
    return Columns(
        mask.new_empty(batch, dtype=torch.int32),
        mask.new_empty(shape),
        mask.new_empty(shape, dtype=torch.int64),
        mask.new_empty(0, 0) if labels is None else labels.new_empty(shape),
    )
