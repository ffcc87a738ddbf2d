"""Backward, first launch: what sums over the batch or over d. The plan is in triton_backward.py."""

import triton
import triton.language as tl

from ..common.triton_device import (
    activate,
    activation_slope,
    arrive,
    load_rows,
    load_written,
    multiply,
    softmax_spaces,
    space_of_column,
    store_block,
)
from .triton_forward_text import load_starts, locate


@triton.jit
def sum_prompt(
    block, part, parts, grad_out, grad_gate, lowrank_a, lowrank_b, space_up, starts, down, softmax, y_sum, partial, small,
    attention_mean, arrived, batch, length, num_rows, num_positions, prompt_start, scale, unit,
    D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    R_TILE: tl.constexpr, K_TILE: tl.constexpr, KH_TILE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, POSITIONS: tl.constexpr, STARTS: tl.constexpr, GATE_GRAD: tl.constexpr,
    ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, AMD: tl.constexpr,
    UNROLL_BY: tl.constexpr,
):  # fmt: skip
    """Y for ROWS prompt rows and BLOCK_D columns; the last slice to arrive takes the row block back to `small`."""
    PARTIAL: tl.constexpr = R_TILE + KH_TILE
    rows = block * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    columns = part * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (columns < D)[None, :]
    y = tl.zeros([ROWS, BLOCK_D], COMPUTE)
    for row in tl.range(0, batch, loop_unroll_factor=UNROLL_BY):
        start = prompt_start
        if STARTS:
            start = tl.load(starts + row)
        out_row = tl.full((), 1, tl.int64) * row * (num_rows + length) + start + rows
        y += tl.load(grad_out + out_row[:, None] * D + columns[None, :], inside, other=0.0).to(COMPUTE)
    y *= unit
    tl.store(y_sum + rows[:, None] * D + columns[None, :], y, inside)
    if R + K > 0:
        base = partial + (block * parts + part) * ROWS * PARTIAL
        local = tl.arange(0, ROWS)
        if R > 0:
            ranks = tl.arange(0, R_TILE)
            b = load_rows(lowrank_b, ranks, ranks < R, columns, D, COMPUTE)
            dt = multiply(y, b.T, tl.zeros([ROWS, R_TILE], COMPUTE), PRECISION)
            store_block(base, local, local < ROWS, ranks, R_TILE, PARTIAL, dt)
        if K > 0:
            inners = tl.arange(0, KH_TILE)
            v = load_rows(space_up, inners, inners < K * H, columns, D, COMPUTE)
            m = multiply(y, v.T, tl.zeros([ROWS, KH_TILE], COMPUTE), PRECISION)
            store_block(base + R_TILE, local, local < ROWS, inners, KH_TILE, PARTIAL, m)
        if arrive(arrived, parts, AMD):
            prompt_softmaxes(
                block, parts, grad_gate, lowrank_a, down, softmax, partial + block * parts * ROWS * PARTIAL, small,
                attention_mean,
                num_rows, num_positions, scale,
                D, R, K, H, R_TILE, K_TILE, KH_TILE, ROWS, POSITIONS, GATE_GRAD, ACTIVATION, COMPUTE, PRECISION,
            )  # fmt: skip


@triton.jit
def prompt_softmaxes(
    block, parts, grad_gate, lowrank_a, down, softmax, partial, small, attention_mean, num_rows, num_positions, scale,
    D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    R_TILE: tl.constexpr, K_TILE: tl.constexpr, KH_TILE: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, GATE_GRAD: tl.constexpr,
    ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """small = [dT, dy, du, dl], by prompt rows."""
    PARTIAL: tl.constexpr = R_TILE + KH_TILE
    DOWN: tl.constexpr = R + K * H + K
    SMALL: tl.constexpr = 2 * R + K * H + K
    rows = block * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    local = tl.arange(0, ROWS)
    if R > 0:
        ranks = tl.arange(0, R_TILE)
        dt = tl.zeros([ROWS, R_TILE], COMPUTE)
        for part in range(parts):
            dt += load_written(partial + part * ROWS * PARTIAL, local, local < ROWS, ranks, R_TILE, PARTIAL)
        dt *= scale
        y = load_written(down, rows, valid, ranks, R, DOWN)
        highest, total = load_softmax(softmax, rows, valid)
        # rowsum(S ∘ dT·Aᵀ) equals rowsum(dT ∘ T), but only from the very numbers that it is subtracted from does its
        # rounding cancel theirs, which is most of the difference where one position has nearly all the attention.
        mean = tl.zeros([ROWS], COMPUTE)
        for start in range(0, num_positions, POSITIONS):
            positions = start + tl.arange(0, POSITIONS)
            a = load_rows(lowrank_a, positions, positions < num_positions, ranks, R, COMPUTE)
            attention, attention_grad = attention_and_grad(
                y, a, dt, highest, total, positions < num_positions, scale / D**0.5, COMPUTE, PRECISION
            )
            mean += tl.sum(attention * attention_grad, 1)
        dy = tl.zeros([ROWS, R_TILE], COMPUTE)
        for start in range(0, num_positions, POSITIONS):
            positions = start + tl.arange(0, POSITIONS)
            a = load_rows(lowrank_a, positions, positions < num_positions, ranks, R, COMPUTE)
            attention, attention_grad = attention_and_grad(
                y, a, dt, highest, total, positions < num_positions, scale / D**0.5, COMPUTE, PRECISION
            )
            dy = multiply(attention * (attention_grad - mean[:, None]), a, dy, PRECISION)
        dy *= scale / D**0.5
        tl.store(attention_mean + rows, mean, valid)
        store_block(small, rows, valid, ranks, R, SMALL, dt)
        store_block(small + R, rows, valid, ranks, R, SMALL, dy)
    if K > 0:
        inners, spaces = tl.arange(0, KH_TILE), tl.arange(0, K_TILE)
        m = tl.zeros([ROWS, KH_TILE], COMPUTE)
        for part in range(parts):
            m += load_written(partial + part * ROWS * PARTIAL + R_TILE, local, local < ROWS, inners, KH_TILE, PARTIAL)
        u = load_written(down + R, rows, valid, inners, K * H, DOWN)
        weight = softmax_spaces(load_written(down + R + K * H, rows, valid, spaces, K, DOWN), K, K_TILE)
        spread = space_of_column(K_TILE, H, KH_TILE, COMPUTE)
        weight_grad = tl.zeros([ROWS, K_TILE], COMPUTE)
        if GATE_GRAD:
            weight_grad += load_rows(grad_gate, rows, valid, spaces, K, COMPUTE)
        weight_grad = multiply(m * activate(u, ACTIVATION), spread.T, weight_grad, PRECISION)
        logit_grad = weight * (weight_grad - tl.sum(weight * weight_grad, 1)[:, None])
        store_block(small + 2 * R + K * H, rows, valid, spaces, K, SMALL, logit_grad)
        weight_of_column = multiply(weight, spread, tl.zeros([ROWS, KH_TILE], COMPUTE), PRECISION)
        du = m * weight_of_column * activation_slope(u, ACTIVATION)
        store_block(small + 2 * R, rows, valid, inners, K * H, SMALL, du)


@triton.jit
def load_softmax(softmax, rows, valid):
    """The highest score of each row and the sum of exp(score − highest).

    Kept apart: the rounding of their log-sum-exp, in units of a large score, would scale a whole row of probabilities.
    """
    return tl.load(softmax + 2 * rows, valid, other=0.0), tl.load(softmax + 2 * rows + 1, valid, other=1.0)


@triton.jit
def attention_and_grad(y, a, dt, highest, total, covered, score_scale, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """S and dT·Aᵀ for rows of y and of A."""
    zeros = tl.zeros([y.shape[0], a.shape[0]], COMPUTE)
    score = multiply(y, a.T, zeros, PRECISION) * score_scale
    attention = tl.where(covered[None, :], tl.exp(score - highest[:, None]) / total[:, None], 0.0)
    return attention, multiply(dt, a.T, zeros, PRECISION)


@triton.jit
def sum_text(
    tile, part, grad_out, slots, lengths, starts, lowrank_b, dc, da_partial, dx,
    batch, length, covered_slots, num_rows, prompt_start,
    D: tl.constexpr, R: tl.constexpr, R_TILE: tl.constexpr, SLOTS: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK: tl.constexpr, STARTS: tl.constexpr, INPUT_GRAD: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, UNROLL_BY: tl.constexpr,
):  # fmt: skip
    """dC and its share of dC·Bᵀ for SLOTS slots and BLOCK_D columns."""
    slot = tile * SLOTS + tl.arange(0, SLOTS)
    columns = part * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([SLOTS, BLOCK_D], COMPUTE)
    for start in tl.range(0, batch, loop_unroll_factor=UNROLL_BY):
        g, token_row, text, exists = load_grad(
            start, start + 1, slot, columns, grad_out, slots, lengths, starts, length, num_rows, prompt_start,
            D, 1, SLOTS, MASK, STARTS, COMPUTE,
        )  # fmt: skip
        if INPUT_GRAD:
            inside = exists[:, :, None] & (columns < D)[None, None, :]
            tl.store(dx + token_row[:, :, None] * D + columns[None, None, :], g, inside)
        total += tl.sum(tl.where(text[:, :, None], g, 0.0), 0)
    if R > 0:
        ranks = tl.arange(0, R_TILE)
        store_block(dc, slot, slot < covered_slots, columns, D, D, total)
        b = load_rows(lowrank_b, ranks, ranks < R, columns, D, COMPUTE)
        da = multiply(total, b.T, tl.zeros([SLOTS, R_TILE], COMPUTE), PRECISION)
        store_block(da_partial + part * covered_slots * R, slot, slot < covered_slots, ranks, R, R, da)


@triton.jit
def sum_tokens(
    tile, chunk, grad_out, slots, lengths, starts, lowrank_b, token_down, token_up, inner, inner_grad, da_partial, dx,
    batch, length, covered_slots, num_rows, prompt_start,
    D: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, R_TILE: tl.constexpr, Q_TILE: tl.constexpr,
    SLOTS: tl.constexpr, BATCH: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, STARTS: tl.constexpr,
    INPUT_GRAD: tl.constexpr,
    ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """g for SLOTS slots of BATCH rows, their share of Σ_b dX·Bᵀ, and dx."""
    TOKENS: tl.constexpr = BATCH * SLOTS
    slot = tile * SLOTS + tl.arange(0, SLOTS)
    first_row = chunk * BATCH
    last_row = tl.minimum(first_row + BATCH, batch)
    ranks, token_ranks = tl.arange(0, R_TILE), tl.arange(0, Q_TILE)
    g = tl.zeros([TOKENS, Q_TILE], COMPUTE)
    da = tl.zeros([SLOTS, R_TILE], COMPUTE)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        grad, _, text, exists = load_grad(
            first_row, last_row, slot, columns, grad_out, slots, lengths, starts, length, num_rows, prompt_start,
            D, BATCH, SLOTS, MASK, STARTS, COMPUTE,
        )  # fmt: skip
        grad = tl.where(text[:, :, None], grad, 0.0)
        up = load_rows(token_up, token_ranks, token_ranks < Q, columns, D, COMPUTE)
        g = multiply(tl.reshape(grad, [TOKENS, BLOCK_D]), up.T, g, PRECISION)
        if R > 0:
            b = load_rows(lowrank_b, ranks, ranks < R, columns, D, COMPUTE)
            da = multiply(tl.sum(grad, 0), b.T, da, PRECISION)
    if R > 0:
        store_block(da_partial + chunk * covered_slots * R, slot, slot < covered_slots, ranks, R, R, da)
    row = first_row + tl.arange(0, BATCH)
    saved_row = tl.reshape(row.to(tl.int64)[:, None] * length + slot[None, :], [TOKENS])
    saved = tl.reshape((row < last_row)[:, None] & (slot < length)[None, :], [TOKENS])
    z = load_written(inner, saved_row, saved, token_ranks, Q, Q)
    g *= activation_slope(z, ACTIVATION)
    store_block(inner_grad, saved_row, saved, token_ranks, Q, Q, g)
    if INPUT_GRAD:
        for start in range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            grad, token_row, _, exists = load_grad(
                first_row, last_row, slot, columns, grad_out, slots, lengths, starts, length, num_rows, prompt_start,
                D, BATCH, SLOTS, MASK, STARTS, COMPUTE,
            )  # fmt: skip
            projection = load_rows(token_down, token_ranks, token_ranks < Q, columns, D, COMPUTE)
            through = multiply(g, projection, tl.zeros([TOKENS, BLOCK_D], COMPUTE), PRECISION)
            grad += tl.reshape(through, [BATCH, SLOTS, BLOCK_D])
            inside = exists[:, :, None] & (columns < D)[None, None, :]
            tl.store(dx + token_row[:, :, None] * D + columns[None, None, :], grad, inside)


@triton.jit
def load_grad(
    first_row, last_row, slot, columns, grad_out, slots, lengths, starts, length, num_rows, prompt_start,
    D: tl.constexpr, BATCH: tl.constexpr, SLOTS: tl.constexpr, MASK: tl.constexpr, STARTS: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """dX [BATCH, SLOTS, columns] at the slots; the tokens' rows in dx; whether text; whether there at all."""
    row, token, token_row, text, exists = locate(
        first_row, last_row, slot, None, slots, lengths, length, 1, BATCH, SLOTS, False, MASK
    )
    column = token + tl.where(token >= load_starts(starts, row, last_row, prompt_start, STARTS), num_rows, 0)
    out_row = (row.to(tl.int64)[:, None] * (num_rows + length) + column) * D
    inside = exists[:, :, None] & (columns < D)[None, None, :]
    grad = tl.load(grad_out + out_row[:, :, None] + columns[None, None, :], inside, other=0.0).to(COMPUTE)
    return grad, token_row, text, exists


@triton.jit(
    do_not_specialize=[
        "batch", "length", "num_rows", "num_positions", "covered_slots", "prompt_start", "prompt_items", "text_tiles",
    ]
)  # fmt: skip
def reduce_kernel(
    grad_out, grad_gate, prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, token_down, token_up,
    slots, lengths, starts, inner, down, mix, softmax, y_sum, small, attention_mean, dc, da_partial, inner_grad, partial, dx,
    counter,
    batch, length, num_rows, num_positions, covered_slots, prompt_start, scale: tl.float64, embed_scale: tl.float64,
    prompt_items, text_tiles,
    D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, H: tl.constexpr, Q: tl.constexpr,
    R_TILE: tl.constexpr, K_TILE: tl.constexpr, KH_TILE: tl.constexpr, Q_TILE: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, POSITIONS: tl.constexpr, BATCH: tl.constexpr, UNROLL_BY: tl.constexpr,
    MASK: tl.constexpr, STARTS: tl.constexpr, UPDATE: tl.constexpr, FUSION: tl.constexpr, GATE_GRAD: tl.constexpr,
    INPUT_GRAD: tl.constexpr,
    ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, AMD: tl.constexpr,
):  # fmt: skip
    SLICES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    scale = tl.full((), scale, COMPUTE)
    unit = tl.full((), embed_scale, COMPUTE)
    item = tl.program_id(0)
    if item < prompt_items:
        block = item // SLICES
        sum_prompt(
            block, item % SLICES, SLICES, grad_out, grad_gate, lowrank_a, lowrank_b, space_up, starts, down,
            softmax, y_sum, partial, small, attention_mean, counter + block,
            batch, length, num_rows, num_positions, prompt_start, scale, unit,
            D, R if FUSION else 0, K, H, R_TILE, K_TILE, KH_TILE, ROWS, BLOCK_D, POSITIONS, STARTS, GATE_GRAD,
            ACTIVATION, COMPUTE, PRECISION, AMD, UNROLL_BY,
        )  # fmt: skip
    elif Q > 0:
        item -= prompt_items
        sum_tokens(
            item % text_tiles, item // text_tiles, grad_out, slots, lengths, starts, lowrank_b, token_down, token_up,
            inner, inner_grad, da_partial, dx, batch, length, covered_slots, num_rows, prompt_start,
            D, R if UPDATE else 0, Q, R_TILE, Q_TILE, SLOTS, BATCH, BLOCK_D, MASK, STARTS, INPUT_GRAD,
            ACTIVATION, COMPUTE, PRECISION,
        )  # fmt: skip
    elif UPDATE or INPUT_GRAD:
        item -= prompt_items
        sum_text(
            item // SLICES, item % SLICES, grad_out, slots, lengths, starts, lowrank_b, dc, da_partial, dx,
            batch, length, covered_slots, num_rows, prompt_start,
            D, R if UPDATE else 0, R_TILE, SLOTS, BLOCK_D, MASK, STARTS, INPUT_GRAD, COMPUTE, PRECISION, UNROLL_BY,
        )  # fmt: skip
