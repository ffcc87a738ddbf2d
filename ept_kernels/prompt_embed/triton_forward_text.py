"""Forward, the text: which token stands in which slot, and the updated rows of X. The plan is in triton_forward.py."""

import triton
import triton.language as tl

from ..common.triton_device import activate, load_rows, multiply, release, store_block, wait


@triton.jit
def order_row(row, mask, slots, lengths, counter, length, CHUNK: tl.constexpr, SIGNAL: tl.constexpr, AMD: tl.constexpr):
    """slots[row]: its text tokens, then its padding; lengths[row]: how many are text."""
    base = row.to(tl.int64) * length
    columns = tl.arange(0, CHUNK)
    total = 0
    for start in range(0, length, CHUNK):
        total += tl.sum((tl.load(mask + base + start + columns, start + columns < length, other=0) != 0).to(tl.int32))
    tl.store(lengths + row, total)
    before = 0
    for start in range(0, length, CHUNK):
        column = start + columns
        text = (tl.load(mask + base + column, column < length, other=0) != 0).to(tl.int32)
        text_before = before + tl.cumsum(text) - text
        slot = tl.where(text != 0, text_before, total + column - text_before)
        tl.store(slots + base + slot, column, column < length)
        before += tl.sum(text)
    if SIGNAL:
        release(counter, AMD)


@triton.jit
def write_text(
    tile, first_column, first_row, last_row,
    ids, source, mask, starts, slots, lengths, ordered, lowrank_a, lowrank_b, token_down, token_up, inner, out,
    batch, length, num_rows, num_positions, prompt_start, source_stride, scale, unit,
    D: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, R_TILE: tl.constexpr, Q_TILE: tl.constexpr,
    SLOTS: tl.constexpr, BATCH: tl.constexpr, BLOCK_D: tl.constexpr,
    GATHER: tl.constexpr, MASK: tl.constexpr, STARTS: tl.constexpr, UPDATE: tl.constexpr, SAVE: tl.constexpr,
    WAITS: tl.constexpr, ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, AMD: tl.constexpr,
):  # fmt: skip
    """X for SLOTS slots of the batch rows first_row … last_row; with the token-conditioned update all of d at once.

    The order of loads is that of their latencies: A and B before the slots are waited for, then the rows of E of all batch
    rows, and A·B while these are on their way.
    """
    slot = tile * SLOTS + tl.arange(0, SLOTS)
    ranks = tl.arange(0, R_TILE)
    columns = first_column + tl.arange(0, BLOCK_D)
    flags = slots
    if MASK == "flags":
        flags = mask
    if UPDATE:
        a = load_rows(lowrank_a, slot, slot < num_positions, ranks, R, COMPUTE) * (scale * unit)
        if Q == 0:
            b = load_rows(lowrank_b, ranks, ranks < R, columns, D, COMPUTE)
    if WAITS:
        wait(ordered, batch)
    row, token, source_row, text, exists = locate(
        first_row, last_row, slot, ids, flags, lengths, length, source_stride, BATCH, SLOTS, GATHER, MASK
    )
    column = token + tl.where(token >= load_starts(starts, row, last_row, prompt_start, STARTS), num_rows, 0)
    out_row = (row.to(tl.int64)[:, None] * (num_rows + length) + column) * D
    if Q == 0:
        inside = exists[:, :, None] & (columns < D)[None, None, :]
        x = tl.load(source + source_row[:, :, None] + columns[None, None, :], inside, other=0.0)
        if UPDATE:
            update = lowrank_update(a, b, SLOTS, BLOCK_D, COMPUTE, PRECISION)
            total = x.to(COMPUTE) + tl.where(text[:, :, None], update[None, :, :], 0.0)
            tl.store(out + out_row[:, :, None] + columns[None, None, :], total, inside)
        else:
            tl.store(out + out_row[:, :, None] + columns[None, None, :], x, inside)
    else:
        # The gathered rows are read for σ(x/e·Dᵀ), and again, from the cache, below.
        token_ranks = tl.arange(0, Q_TILE)
        z = tl.zeros([BATCH * SLOTS, Q_TILE], COMPUTE)
        for start in range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            inside = exists[:, :, None] & (columns < D)[None, None, :]
            x = tl.load(source + source_row[:, :, None] + columns[None, None, :], inside, other=0.0).to(COMPUTE)
            down = load_rows(token_down, token_ranks, token_ranks < Q, columns, D, COMPUTE)
            z = multiply(tl.reshape(x, [BATCH * SLOTS, BLOCK_D]), down.T, z, PRECISION)
        z = z * (1.0 / unit)
        if SAVE:
            saved_row = tl.reshape(row.to(tl.int64)[:, None] * length + slot[None, :], [BATCH * SLOTS])
            store_block(inner, saved_row, tl.reshape(exists, [BATCH * SLOTS]), token_ranks, Q, Q, z)
            if MASK == "flags":
                tl.store(slots + row.to(tl.int64)[:, None] * length + slot[None, :], text.to(tl.int32), exists)
        token_mix = activate(z, ACTIVATION) * unit
        # Loading a slice ahead costs a resident program on AMD, and none on NVIDIA.
        for start in tl.range(0, D, BLOCK_D, num_stages=1 if AMD else None):
            columns = start + tl.arange(0, BLOCK_D)
            inside = exists[:, :, None] & (columns < D)[None, None, :]
            if UPDATE:
                b = load_rows(lowrank_b, ranks, ranks < R, columns, D, COMPUTE)
                update = lowrank_update(a, b, SLOTS, BLOCK_D, COMPUTE, PRECISION)
            up = load_rows(token_up, token_ranks, token_ranks < Q, columns, D, COMPUTE)
            token_update = multiply(token_mix, up, tl.zeros([BATCH * SLOTS, BLOCK_D], COMPUTE), PRECISION)
            x = tl.load(source + source_row[:, :, None] + columns[None, None, :], inside, other=0.0).to(COMPUTE)
            if UPDATE:
                x += tl.where(text[:, :, None], update[None, :, :], 0.0)
            x += tl.where(text[:, :, None], tl.reshape(token_update, [BATCH, SLOTS, BLOCK_D]), 0.0)
            tl.store(out + out_row[:, :, None] + columns[None, None, :], x, inside)


@triton.jit
def lowrank_update(a, b, SLOTS: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """A·B for SLOTS slots and BLOCK_D columns, in the layout of the gathers."""
    update = multiply(a, b, tl.zeros([SLOTS, BLOCK_D], COMPUTE), PRECISION)
    # A reduction over an axis of one leaves the layout of the dot for that of the gathers, once.
    return tl.sum(tl.reshape(update, [1, SLOTS, BLOCK_D]), 0)


@triton.jit
def load_starts(starts, row, last_row, prompt_start, STARTS: tl.constexpr):
    """[rows, 1]: the text column of each row's prompt."""
    if STARTS:
        return tl.load(starts + row, row < last_row, other=0).to(tl.int32)[:, None]
    else:
        return tl.zeros_like(row)[:, None] + prompt_start


@triton.jit
def locate(
    first_row, last_row, slot, ids, slots, lengths, length, source_stride,
    BATCH: tl.constexpr, SLOTS: tl.constexpr, GATHER: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """For BATCH × SLOTS: batch rows, tokens, their rows' offsets in the source, whether text, whether there at all.

    `slots` are the order of the tokens, or flags of those that are text, as MASK says.
    """
    row = first_row + tl.arange(0, BATCH)
    exists = (row < last_row)[:, None] & (slot < length)[None, :]
    index = row.to(tl.int64)[:, None] * length + slot[None, :]
    if MASK == "slots":
        token = tl.load(slots + index, exists, other=0, cache_modifier=".cg")
        text = slot[None, :] < tl.load(lengths + row, row < last_row, other=0, cache_modifier=".cg")[:, None]
    else:
        token = tl.broadcast_to(slot[None, :], [BATCH, SLOTS])
        text = exists
        if MASK == "flags":
            text = tl.load(slots + index, exists, other=0) != 0
    source_index = row.to(tl.int64)[:, None] * length + token
    if GATHER:
        source_index = tl.load(ids + source_index, exists, other=0).to(tl.int64)
    return row, token, source_index * source_stride, text, exists
