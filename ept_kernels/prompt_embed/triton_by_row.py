"""Whole rows in registers: the backbone's input in one launch, with the constants of several adapters, whatever their number.

    X[b, j] = x + e·c·A[p]·B + e·σ(x/e·Dᵀ)·W      A, B, D, W and P* of the adapter of row b; e·c·A·B may stand in a table

For inference; and the forward of one trained adapter where its prompt is P itself and its text has no update but a
token-conditioned one of few ranks, as in the default preset (triton_forward.py asks for that).

A program takes ROWS columns of one batch row with all of d, so that it reads one adapter's tensors: text, whose rows it
holds in registers as layer_update does, or rows of P*. Programs share nothing and wait for nobody: with a mask each counts
the text before its own columns.

Bytes: the rows of E once and those of X once. The mask of a row, 8 bytes for each token before its own, P*, A, B, D and W
come from the caches.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_device import activate
from ..common.triton_launch import compute_dtype, divided_up, launch, launching_on, power_of_two, triton_dtype
from ..common.triton_rows import UNROLLED, add_outer, group_of, project, rows_of, warps_of
from .arguments import Settings, Stack, Text, Weights

MASK_CHUNK = 256  # entries of the mask counted at a time


@triton.jit(
    do_not_specialize=[
        "length", "num_rows", "adapters", "covered", "prompt_start", "text_tiles", "tiles",
    ]
)  # fmt: skip
def by_row_kernel(
    ids, source, mask, starts, prompt, lowrank_a, lowrank_b, token_down, token_up, index, lengths, positions, out,
    kept_slots, kept_starts, kept_inner,
    length, num_rows, adapters, covered, prompt_start, source_stride, prompt_stride, text_tiles, tiles,
    scale: tl.float64, embed_scale: tl.float64, prompt_scale: tl.float64,
    D: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, TILE_D: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    CHUNK: tl.constexpr, GATHER: tl.constexpr, TEXT: tl.constexpr, STARTS: tl.constexpr, INDEXED: tl.constexpr,
    LENGTHS: tl.constexpr, KIND: tl.constexpr, SAVE: tl.constexpr, ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    places = tl.arange(0, TILE_D)
    adapter = tl.full((), 0, tl.int32)
    if INDEXED:
        adapter = tl.load(index + row).to(tl.int32)
    safe = tl.minimum(tl.maximum(adapter, 0), adapters - 1).to(tl.int64)
    start = prompt_start
    if STARTS:
        start = tl.load(starts + row).to(tl.int32)
    own = num_rows
    if LENGTHS:
        own = tl.minimum(tl.load(lengths + safe).to(tl.int32), num_rows)
    first_row = row * (num_rows + length)
    scale = tl.full((), scale, COMPUTE)
    unit = tl.full((), embed_scale, COMPUTE)
    if tile < text_tiles:
        column = tile * ROWS + tl.arange(0, ROWS)
        exists = column < length
        position, text = locate_text(mask, positions, row, tile * ROWS, column, length, CHUNK, TEXT)
        inside = exists[:, None] & (places < D)[None, :]
        token = row * length + column
        if GATHER:
            token = tl.load(ids + token, exists, other=0).to(tl.int64)
        if SAVE and TEXT == "flags":
            tl.store(kept_slots + row * length + column, text.to(tl.int32), exists)
        x = tl.load(
            source + token[:, None] * source_stride + places[None, :], inside, other=0.0, eviction_policy="evict_first"
        ).to(COMPUTE)  # fmt: skip
        total = x
        there = text & (position < covered)
        covered_row = (safe * covered + position) * R
        if KIND == "table":
            update = tl.load(
                lowrank_a + covered_row[:, None] + places[None, :], there[:, None] & (places < D)[None, :], other=0.0
            ).to(COMPUTE)  # fmt: skip
            total += update
        if Q > 0:
            own_down, own_up = token_down + safe * Q * D, token_up + safe * Q * D
            for first in range(0, Q, GROUP):
                products = project(x, own_down, first, places, D, Q, GROUP, COMPUTE)
                for k in tl.static_range(GROUP):
                    inner = products[k] / unit
                    if SAVE:
                        saved = (row * length + column) * Q + first + k
                        tl.store(kept_inner + saved, inner, exists & (first + k < Q))
                    mix = tl.where(text, activate(inner, ACTIVATION) * unit, 0.0)
                    total = add_outer(total, mix, own_up, first + k, places, D, Q, COMPUTE)
        if KIND == "factors":
            own_b = lowrank_b + safe * R * D
            for k in range(R):
                factor = tl.load(lowrank_a + covered_row + k, there, other=0.0).to(COMPUTE) * (scale * unit)
                total = add_outer(total, factor, own_b, k, places, D, R, COMPUTE)
        if INDEXED:  # an index that names no adapter cannot raise here, so it is not taken for another one
            total = tl.where((adapter >= 0) & (adapter < adapters), total, float("nan"))
        column += tl.where(column >= start, own, 0)
        tl.store(out + (first_row + column)[:, None] * D + places[None, :], total, inside)
    else:
        number = (tile - text_tiles) * ROWS + tl.arange(0, ROWS)
        inside = (number < num_rows)[:, None] & (places < D)[None, :]
        of_prompt = number < own
        rows = tl.load(
            prompt + safe * prompt_stride + number[:, None] * D + places[None, :], inside & of_prompt[:, None], other=0.0
        ).to(COMPUTE)  # fmt: skip
        rows *= tl.full((), prompt_scale, COMPUTE)
        if INDEXED:
            rows = tl.where((adapter >= 0) & (adapter < adapters), rows, float("nan"))
        if SAVE and STARTS and tile == text_tiles:
            tl.store(kept_starts + row, start)
        column = tl.where(of_prompt, start + number, length + number)  # behind a shorter row there are zeros
        tl.store(out + (first_row + column)[:, None] * D + places[None, :], rows, inside)


@triton.jit
def locate_text(mask, positions, row, first, column, length, CHUNK: tl.constexpr, TEXT: tl.constexpr):
    """p of each column, and whether it is text: from "positions", from a "mask", or all of it ("all").

    With "flags" the mask alone is read: nothing asks for p.
    """
    exists = column < length
    if TEXT == "flags":
        position = column
        text = tl.load(mask + row * length + column, exists, other=0) != 0
    elif TEXT == "mask":
        before = tl.sum(tl.zeros([CHUNK], tl.int32))
        base = mask + row * length
        for start in range(0, first, CHUNK):
            earlier = start + tl.arange(0, CHUNK)
            before += tl.sum((tl.load(base + earlier, earlier < first, other=0) != 0).to(tl.int32))
        text = tl.load(base + column, exists, other=0) != 0
        count = text.to(tl.int32)
        position = before + tl.cumsum(count) - count
    elif TEXT == "positions":
        position = tl.load(positions + row * length + column, exists, other=-1).to(tl.int32)
        text = position >= 0
    else:
        position = column
        text = exists
    return position, text


class Kept(NamedTuple):
    """What the forward of a trained adapter leaves for its backward: triton_forward.Kept, as far as it is used here."""

    slots: Tensor
    starts: Tensor
    inner: Tensor


def forward(text: Text, stack: Stack, settings: Settings) -> Tensor:
    """X [batch, S + L, d] in the source's dtype."""
    out = empty_result(text, stack)
    if out.numel():
        _launch(text, stack, settings, out, stack.prompt.shape, stack.prompt.stride(0), stack.token_rank, None)
    return out


def suits(weights: Weights) -> bool:
    """Whether `forward_of_one` can take these parts, and is the faster form."""
    mixes = weights.spaces[0] > 0 or weights.rank > 0
    return not mixes and 0 < weights.token_rank <= UNROLLED


def forward_of_one(text: Text, weights: Weights, settings: Settings, out: Tensor, kept: Kept | None) -> None:
    """Fills X for one adapter's trained tensors, and `kept` where a backward may follow."""
    prompt = weights.prompt
    stack = Stack(prompt, token_down=weights.token_down, token_up=weights.token_up)
    _launch(text, stack, settings, out, (1, *prompt.shape), 0, weights.token_rank, kept)


def _launch(
    text: Text,
    stack: Stack,
    settings: Settings,
    out: Tensor,
    shape: Sequence[int],
    prompt_stride: int,
    q: int,
    kept: Kept | None,
) -> None:
    """`shape` is [adapters, S, d]. A stack of one adapter may be without that dimension; its prompt is then in units of e."""
    batch, length, d = text.shape
    adapters, num_rows, _ = shape
    kind = stack.kind
    r = 0 if stack.lowrank_a is None else stack.lowrank_a.shape[2]
    tile_d = power_of_two(d)
    most = rows_of(tile_d, max(q, r if kind == "factors" else 0))
    if kind == "table" and q:
        most = max(1, most // 2)  # a third tile stands in registers
    rows = min(most, power_of_two(max(length, num_rows)))
    text_tiles = divided_up(length, rows)
    tiles = text_tiles + divided_up(num_rows, rows)
    mask = text.mask if text.mask is None or text.mask.dtype != torch.bool else text.mask.view(torch.uint8)
    of_text = "positions" if stack.positions is not None else "all"
    if mask is not None:
        of_text = "flags" if kind == "none" else "mask"
    dtype = compute_dtype(text.source, *stack[:5])
    with launching_on(out):
        launch(
            by_row_kernel, batch * tiles,
            text.ids, text.source, mask, text.starts, *stack, out, *(kept or (None, None, None)),
            length, num_rows, adapters, 0 if stack.lowrank_a is None else stack.lowrank_a.shape[1],
            settings.prompt_start, text.source.stride(-2), prompt_stride, text_tiles, tiles,
            settings.scale, settings.embed_scale, settings.embed_scale if stack.prompt.dim() == 2 else 1.0,
            D=d, R=r, Q=q, TILE_D=tile_d, ROWS=rows, GROUP=group_of(q), CHUNK=MASK_CHUNK,
            GATHER=text.ids is not None, TEXT=of_text,
            STARTS=text.starts is not None, INDEXED=stack.adapter_index is not None, LENGTHS=stack.lengths is not None,
            KIND=kind, SAVE=kept is not None, ACTIVATION=settings.activation, COMPUTE=triton_dtype(dtype),
            num_warps=warps_of(tile_d),
        )  # fmt: skip


def empty_result(text: Text, stack: Stack) -> Tensor:
    """The tensor that `forward` fills, for real and for fake inputs."""
    batch, length, d = text.shape
    return text.source.new_empty(batch, stack.prompt.shape[1] + length, d)
