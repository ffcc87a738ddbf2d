"""Backward: the gradients of triton_forward in two launches, each deterministic, without a program that waits.

With Y = e·Σ_b dX at the prompt's rows, t = text slots (the p-th text token of every row), Σ over the batch:

    text      dC = Σ_b dX[b, t]               dA = e·c·dC·Bᵀ           dB = e·c·Aᵀ·dC
    token     g = (dX·Wᵀ) ∘ σ'(z), z = x/e·Dᵀ     dD = gᵀ·x             dW = e·σ(z)ᵀ·dX        dx = dX + g·D
    fusion    y = P·Bᵀ, S = softmax(κ·y·Aᵀ), κ = c/√d, T = S·A
              dT = c·Y·Bᵀ    dS = κ·S ∘ (dT·Aᵀ − rowsum(S ∘ dT·Aᵀ))        dy = dS·A
              dA += Sᵀ·dT + dSᵀ·y             dB += c·Tᵀ·Y + dyᵀ·P
    spaces    m = Y·Vᵀ, u = P·Uᵀ: du = m ∘ w ∘ σ'(u)                    dU = duᵀ·P             dV = (w ∘ σ(u))ᵀ·Y
    gate      dw = Σ_h m ∘ σ(u) (+ the gate's own gradient), dl = w ∘ (dw − rowsum(w ∘ dw))     dG = dlᵀ·P
    prompt    dP = Y + dy·B + du·U + dl·G

First launch, `reduce`: what sums over the batch or over d.
    prompt    PROMPT_TILE rows × BLOCK_D columns: Y, and partial sums of Y·[B; V]ᵀ; the last slice of a row block to
              arrive adds them up and goes back through both softmaxes and the activation
    text      TEXT_TILE slots × BLOCK_D columns, all batch rows: dC and partial sums of dC·Bᵀ
    token     in its place, with the token-conditioned update: TEXT_TILE slots × BATCH rows × all of d: g, partial
              sums of Σ_b dX·Bᵀ, and dx where inputs_embeds asks for it (a second read of dX, from the cache)
Second launch, `weights`: everything that is left, by slices of d and blocks of A.
    text      BLOCK_D columns × a share of the slots: partial dB (from dC), or dB, dW and dD (from dX and x)
    prompt    BLOCK_D columns × all prompt rows: dP, dU, dV, dG and a partial dB
              the last of the two roles to arrive at a slice adds up dB, dW and dD
    positions POSITION_TILE rows of A: dA

dX is read once, with the token-conditioned update once per launch. dC [N, d] is stored in the compute type: with tiles
of TEXT_TILE slots, partial sums of dB would be r / TEXT_TILE times as large. The order of every sum is fixed by the
shapes, so equal inputs give equal bits.
"""

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import (
    NUM_WARPS,
    PROMPT_TILE,
    SMALLEST_DOT,
    TEXT_TILE,
    activate,
    activation_slope,
    arrive,
    backend_flags,
    column_tile,
    counters,
    divided_up,
    load_rows,
    load_written,
    multiply,
    on_device,
    power_of_two,
    softmax_spaces,
    space_of_column,
    store_block,
    tile_of,
    triton_dtype,
)
from .triton_forward import locate

# Of P, A, B, U, V, G, D, W and inputs_embeds: see `backward`.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

WEIGHTS_TILE = 4096  # numbers of dB, dU, dV and dG that a program of the second launch adds up in registers
POSITION_TILE = 16  # rows of A per step; twice as many spill on sm_100, with two products of each in registers
WEIGHTS_WARPS = 8  # on NVIDIA, where its operands would spill in the registers of four; AMD's four have as many lanes
WEIGHTS_STAGES = 1  # its loops are short and full of dots: loading ahead would only spill
UNROLL = 8  # batch rows in flight while dX is summed: 8 × 16 bytes per thread
TOKEN_BATCH = 2  # batch rows per program that needs all of d at once
SLOT_SHARES = 4  # programs that share the slots of a slice of dB (and dW, dD)
TOKEN_SHARES = 16  # the same where dX itself is read again


@triton.jit
def sum_prompt(
    block, part, parts, grad_out, grad_gate, lowrank_a, lowrank_b, space_up, down, softmax, y_sum, partial, small,
    attention_mean, arrived, batch, length, num_rows, num_positions, prompt_start, scale, unit,
    D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    R_TILE: tl.constexpr, K_TILE: tl.constexpr, KH_TILE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, POSITIONS: tl.constexpr, GATE_GRAD: tl.constexpr,
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
        out_row = tl.full((), 1, tl.int64) * row * (num_rows + length) + prompt_start + rows
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
    tile, part, grad_out, slots, lengths, lowrank_b, dc, da_partial, dx,
    batch, length, covered_slots, num_rows, prompt_start,
    D: tl.constexpr, R: tl.constexpr, R_TILE: tl.constexpr, SLOTS: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK: tl.constexpr, INPUT_GRAD: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, UNROLL_BY: tl.constexpr,
):  # fmt: skip
    """dC and its share of dC·Bᵀ for SLOTS slots and BLOCK_D columns."""
    slot = tile * SLOTS + tl.arange(0, SLOTS)
    columns = part * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([SLOTS, BLOCK_D], COMPUTE)
    for start in tl.range(0, batch, loop_unroll_factor=UNROLL_BY):
        g, token_row, text, exists = load_grad(
            start, start + 1, slot, columns, grad_out, slots, lengths, length, num_rows, prompt_start,
            D, 1, SLOTS, MASK, COMPUTE,
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
    tile, chunk, grad_out, slots, lengths, lowrank_b, token_down, token_up, inner, inner_grad, da_partial, dx,
    batch, length, covered_slots, num_rows, prompt_start,
    D: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, R_TILE: tl.constexpr, Q_TILE: tl.constexpr,
    SLOTS: tl.constexpr, BATCH: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, INPUT_GRAD: tl.constexpr,
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
            first_row, last_row, slot, columns, grad_out, slots, lengths, length, num_rows, prompt_start,
            D, BATCH, SLOTS, MASK, COMPUTE,
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
                first_row, last_row, slot, columns, grad_out, slots, lengths, length, num_rows, prompt_start,
                D, BATCH, SLOTS, MASK, COMPUTE,
            )  # fmt: skip
            projection = load_rows(token_down, token_ranks, token_ranks < Q, columns, D, COMPUTE)
            through = multiply(g, projection, tl.zeros([TOKENS, BLOCK_D], COMPUTE), PRECISION)
            grad += tl.reshape(through, [BATCH, SLOTS, BLOCK_D])
            inside = exists[:, :, None] & (columns < D)[None, None, :]
            tl.store(dx + token_row[:, :, None] * D + columns[None, None, :], grad, inside)


@triton.jit
def load_grad(
    first_row, last_row, slot, columns, grad_out, slots, lengths, length, num_rows, prompt_start,
    D: tl.constexpr, BATCH: tl.constexpr, SLOTS: tl.constexpr, MASK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dX [BATCH, SLOTS, columns] at the slots; the tokens' rows in dx; whether text; whether there at all."""
    row, token, token_row, text, exists = locate(
        first_row, last_row, slot, None, slots, lengths, length, 1, BATCH, SLOTS, False, MASK
    )
    column = token + tl.where(token >= prompt_start, num_rows, 0)
    out_row = (row.to(tl.int64)[:, None] * (num_rows + length) + column) * D
    inside = exists[:, :, None] & (columns < D)[None, None, :]
    grad = tl.load(grad_out + out_row[:, :, None] + columns[None, None, :], inside, other=0.0).to(COMPUTE)
    return grad, token_row, text, exists


@triton.jit
def weights_of_text(
    part, share, shares, ids, source, grad_out, slots, lengths, lowrank_a, inner, inner_grad, dc, partial,
    batch, length, text_slots, covered_slots, num_rows, prompt_start, source_stride, scale, unit,
    D: tl.constexpr, R: tl.constexpr, B_R: tl.constexpr, Q: tl.constexpr,
    R_TILE: tl.constexpr, Q_TILE: tl.constexpr,
    SLOTS: tl.constexpr, BATCH: tl.constexpr, BLOCK_D: tl.constexpr, GATHER: tl.constexpr, MASK: tl.constexpr,
    ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial dB, dW and dD of BLOCK_D columns over every `shares`-th tile of slots."""
    TOKENS: tl.constexpr = BATCH * SLOTS
    columns = part * BLOCK_D + tl.arange(0, BLOCK_D)
    ranks, token_ranks = tl.arange(0, R_TILE), tl.arange(0, Q_TILE)
    db = tl.zeros([R_TILE, BLOCK_D], COMPUTE)
    dw = tl.zeros([Q_TILE, BLOCK_D], COMPUTE)
    dd = tl.zeros([Q_TILE, BLOCK_D], COMPUTE)
    for first in range(share * SLOTS, text_slots, shares * SLOTS):
        slot = first + tl.arange(0, SLOTS)
        if Q > 0:
            total = tl.zeros([SLOTS, BLOCK_D], COMPUTE)
            for start in range(0, batch, BATCH):
                grad, _, text, exists = load_grad(
                    start, batch, slot, columns, grad_out, slots, lengths, length, num_rows, prompt_start,
                    D, BATCH, SLOTS, MASK, COMPUTE,
                )  # fmt: skip
                grad = tl.where(text[:, :, None], grad, 0.0)
                total += tl.sum(grad, 0)
                row, _, source_row, _, _ = locate(
                    start, batch, slot, ids, slots, lengths, length, source_stride, BATCH, SLOTS, GATHER, MASK
                )
                inside = exists[:, :, None] & (columns < D)[None, None, :]
                x = tl.load(source + source_row[:, :, None] + columns[None, None, :], inside, other=0.0).to(COMPUTE)
                saved_row = tl.reshape(row.to(tl.int64)[:, None] * length + slot[None, :], [TOKENS])
                saved = tl.reshape(exists, [TOKENS])
                z = load_rows(inner, saved_row, saved, token_ranks, Q, COMPUTE)
                g = load_rows(inner_grad, saved_row, saved, token_ranks, Q, COMPUTE)
                dw = multiply(activate(z, ACTIVATION).T, tl.reshape(grad, [TOKENS, BLOCK_D]), dw, PRECISION)
                dd = multiply(g.T, tl.reshape(x, [TOKENS, BLOCK_D]), dd, PRECISION)
        else:
            total = load_rows(dc, slot, slot < covered_slots, columns, D, COMPUTE)
        if R > 0:
            a = load_rows(lowrank_a, slot, slot < covered_slots, ranks, R, COMPUTE)
            db = multiply(a.T, total, db, PRECISION)
    base = partial + share * (B_R + 2 * Q) * D
    if B_R > 0:
        store_block(base, ranks, ranks < B_R, columns, D, D, db * (scale * unit))
    if Q > 0:
        store_block(base + B_R * D, token_ranks, token_ranks < Q, columns, D, D, dw * unit)
        store_block(base + (B_R + Q) * D, token_ranks, token_ranks < Q, columns, D, D, dd)


@triton.jit
def weights_of_prompt(
    part, share, prompt, lowrank_b, space_down, gate_weight, mix, y_sum, small, partial,
    grad_prompt, grad_space_down, grad_space_up, grad_gate_weight, num_rows, scale,
    D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr,
    R_TILE: tl.constexpr, K_TILE: tl.constexpr, KH_TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dP, dU, dV, dG and the fusion's dB for BLOCK_D columns."""
    MIX: tl.constexpr = R + K * H
    SMALL: tl.constexpr = 2 * R + K * H + K
    columns = part * BLOCK_D + tl.arange(0, BLOCK_D)
    ranks, inners, spaces = tl.arange(0, R_TILE), tl.arange(0, KH_TILE), tl.arange(0, K_TILE)
    db = tl.zeros([R_TILE, BLOCK_D], COMPUTE)
    if R + K > 0:
        # Two loops, first all products with Y, then those with P: in one, their operands would not fit the registers.
        dv_weight = tl.zeros([KH_TILE, BLOCK_D], COMPUTE)
        for first in range(0, num_rows, ROWS):
            rows = first + tl.arange(0, ROWS)
            valid = rows < num_rows
            y = load_rows(y_sum, rows, valid, columns, D, COMPUTE)
            if R > 0:
                t = load_written(mix, rows, valid, ranks, R, MIX) * scale
                db = multiply(t.T, y, db, PRECISION)
            if K > 0:
                inner = load_written(mix + R, rows, valid, inners, K * H, MIX)
                dv_weight = multiply(inner.T, y, dv_weight, PRECISION)
        if K > 0:
            store_block(grad_space_up, inners, inners < K * H, columns, D, D, dv_weight)
    du_weight = tl.zeros([KH_TILE, BLOCK_D], COMPUTE)
    dg_weight = tl.zeros([K_TILE, BLOCK_D], COMPUTE)
    for first in range(0, num_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        valid = rows < num_rows
        dp = load_rows(y_sum, rows, valid, columns, D, COMPUTE)
        if R + K > 0:
            p = load_rows(prompt, rows, valid, columns, D, COMPUTE)
        if R > 0:
            dy = load_written(small + R, rows, valid, ranks, R, SMALL)
            db = multiply(dy.T, p, db, PRECISION)
            dp = multiply(dy, load_rows(lowrank_b, ranks, ranks < R, columns, D, COMPUTE), dp, PRECISION)
        if K > 0:
            du = load_written(small + 2 * R, rows, valid, inners, K * H, SMALL)
            dl = load_written(small + 2 * R + K * H, rows, valid, spaces, K, SMALL)
            du_weight = multiply(du.T, p, du_weight, PRECISION)
            dg_weight = multiply(dl.T, p, dg_weight, PRECISION)
            dp = multiply(du, load_rows(space_down, inners, inners < K * H, columns, D, COMPUTE), dp, PRECISION)
            dp = multiply(dl, load_rows(gate_weight, spaces, spaces < K, columns, D, COMPUTE), dp, PRECISION)
        store_block(grad_prompt, rows, valid, columns, D, D, dp)
    if R > 0:
        store_block(partial + share * WIDTH * D, ranks, ranks < R, columns, D, D, db)
    if K > 0:
        store_block(grad_space_down, inners, inners < K * H, columns, D, D, du_weight)
        store_block(grad_gate_weight, spaces, spaces < K, columns, D, D, dg_weight)


@triton.jit
def add_up(
    partial, row, num_rows, columns, shares, grad, WIDTH: tl.constexpr,
    D: tl.constexpr, TILE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """grad = the sum of the shares' rows row … row + num_rows."""
    rows = tl.arange(0, TILE)
    total = tl.zeros([TILE, columns.shape[0]], COMPUTE)
    for share in range(shares):
        total += load_written(partial + (share * WIDTH + row) * D, rows, rows < num_rows, columns, D, D)
    store_block(grad, rows, rows < num_rows, columns, D, D, total)


@triton.jit
def weights_of_positions(
    block, lowrank_a, down, softmax, small, attention_mean, da_partial, da_parts, grad_lowrank_a,
    num_rows, num_positions, covered_slots, scale, unit,
    D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, H: tl.constexpr, R_TILE: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, UPDATE: tl.constexpr, FUSION: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA for POSITIONS rows of A."""
    positions = block * POSITIONS + tl.arange(0, POSITIONS)
    ranks = tl.arange(0, R_TILE)
    da = tl.zeros([POSITIONS, R_TILE], COMPUTE)
    if UPDATE:
        for part in range(da_parts):
            da += load_written(da_partial + part * covered_slots * R, positions, positions < covered_slots, ranks, R, R)
        da *= scale * unit
    if FUSION:
        DOWN: tl.constexpr = R + K * H + K
        SMALL: tl.constexpr = 2 * R + K * H + K
        a = load_rows(lowrank_a, positions, positions < num_positions, ranks, R, COMPUTE)
        for first in range(0, num_rows, ROWS):
            rows = first + tl.arange(0, ROWS)
            valid = rows < num_rows
            y = load_written(down, rows, valid, ranks, R, DOWN)
            dt = load_written(small, rows, valid, ranks, R, SMALL)
            highest, total = load_softmax(softmax, rows, valid)
            mean = tl.load(attention_mean + rows, valid, other=0.0)
            # Rows past the prompt have dT = 0 and y = 0, so what their made-up probabilities say adds nothing.
            attention, attention_grad = attention_and_grad(
                y, a, dt, highest, total, positions < num_positions, scale / D**0.5, COMPUTE, PRECISION
            )
            score_grad = attention * (attention_grad - mean[:, None]) * (scale / D**0.5)
            da = multiply(score_grad.T, y, multiply(attention.T, dt, da, PRECISION), PRECISION)
    store_block(grad_lowrank_a, positions, positions < num_positions, ranks, R, R, da)


@triton.jit(
    do_not_specialize=[
        "batch", "length", "num_rows", "num_positions", "covered_slots", "prompt_start", "prompt_items", "text_tiles",
    ]
)  # fmt: skip
def reduce_kernel(
    grad_out, grad_gate, slots, lengths, lowrank_a, lowrank_b, space_up, token_down, token_up,
    inner, down, softmax, y_sum, partial, small, attention_mean, dc, da_partial, inner_grad, dx, counter,
    batch, length, num_rows, num_positions, covered_slots, prompt_start, scale: tl.float64, embed_scale: tl.float64,
    prompt_items, text_tiles,
    D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, H: tl.constexpr, Q: tl.constexpr,
    R_TILE: tl.constexpr, K_TILE: tl.constexpr, KH_TILE: tl.constexpr, Q_TILE: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, POSITIONS: tl.constexpr, BATCH: tl.constexpr, UNROLL_BY: tl.constexpr,
    MASK: tl.constexpr, UPDATE: tl.constexpr, FUSION: tl.constexpr, GATE_GRAD: tl.constexpr, INPUT_GRAD: tl.constexpr,
    ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, AMD: tl.constexpr,
):  # fmt: skip
    SLICES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    scale = tl.full((), scale, COMPUTE)
    unit = tl.full((), embed_scale, COMPUTE)
    item = tl.program_id(0)
    if item < prompt_items:
        block = item // SLICES
        sum_prompt(
            block, item % SLICES, SLICES, grad_out, grad_gate, lowrank_a, lowrank_b, space_up, down, softmax,
            y_sum, partial, small, attention_mean, counter + block,
            batch, length, num_rows, num_positions, prompt_start, scale, unit,
            D, R if FUSION else 0, K, H, R_TILE, K_TILE, KH_TILE, ROWS, BLOCK_D, POSITIONS, GATE_GRAD,
            ACTIVATION, COMPUTE, PRECISION, AMD, UNROLL_BY,
        )  # fmt: skip
    elif Q > 0:
        item -= prompt_items
        sum_tokens(
            item % text_tiles, item // text_tiles, grad_out, slots, lengths, lowrank_b, token_down, token_up,
            inner, inner_grad, da_partial, dx, batch, length, covered_slots, num_rows, prompt_start,
            D, R if UPDATE else 0, Q, R_TILE, Q_TILE, SLOTS, BATCH, BLOCK_D, MASK, INPUT_GRAD,
            ACTIVATION, COMPUTE, PRECISION,
        )  # fmt: skip
    elif UPDATE or INPUT_GRAD:
        item -= prompt_items
        sum_text(
            item // SLICES, item % SLICES, grad_out, slots, lengths, lowrank_b, dc, da_partial, dx,
            batch, length, covered_slots, num_rows, prompt_start,
            D, R if UPDATE else 0, R_TILE, SLOTS, BLOCK_D, MASK, INPUT_GRAD, COMPUTE, PRECISION, UNROLL_BY,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "batch", "length", "num_rows", "num_positions", "covered_slots", "text_slots", "prompt_start", "shares",
        "da_parts", "prompt_items", "text_items",
    ]
)  # fmt: skip
def weights_kernel(
    ids, source, grad_out, slots, lengths, prompt, lowrank_a, lowrank_b, space_down, gate_weight,
    inner, inner_grad, down, mix, softmax, y_sum, small, attention_mean, dc, da_partial, partial, counter,
    grad_prompt, grad_lowrank_a, grad_lowrank_b, grad_space_down, grad_space_up, grad_gate_weight,
    grad_token_down, grad_token_up,
    batch, length, num_rows, num_positions, covered_slots, text_slots, prompt_start, source_stride,
    scale: tl.float64, embed_scale: tl.float64, shares, da_parts, prompt_items, text_items,
    D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, H: tl.constexpr, Q: tl.constexpr,
    R_TILE: tl.constexpr, K_TILE: tl.constexpr, KH_TILE: tl.constexpr, Q_TILE: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, POSITIONS: tl.constexpr, BATCH: tl.constexpr,
    GATHER: tl.constexpr, MASK: tl.constexpr, UPDATE: tl.constexpr, FUSION: tl.constexpr,
    ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, AMD: tl.constexpr,
):  # fmt: skip
    SLICES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    UPDATE_R: tl.constexpr = R if UPDATE else 0
    FUSION_R: tl.constexpr = R if FUSION else 0
    B_R: tl.constexpr = R if UPDATE or FUSION else 0
    scale = tl.full((), scale, COMPUTE)
    unit = tl.full((), embed_scale, COMPUTE)
    item = tl.program_id(0)
    part = item % SLICES
    columns = part * BLOCK_D + tl.arange(0, BLOCK_D)
    WIDTH: tl.constexpr = B_R + 2 * Q
    arrivals = shares
    if FUSION:
        arrivals += 1
    if item < prompt_items + text_items:
        if item < prompt_items:
            weights_of_prompt(
                part, shares, prompt, lowrank_b, space_down, gate_weight, mix, y_sum, small, partial,
                grad_prompt, grad_space_down, grad_space_up, grad_gate_weight, num_rows, scale,
                D, FUSION_R, K, H, WIDTH, R_TILE, K_TILE, KH_TILE, ROWS, BLOCK_D, COMPUTE, PRECISION,
            )  # fmt: skip
        else:
            weights_of_text(
                part, item // SLICES - prompt_items // SLICES, shares,
                ids, source, grad_out, slots, lengths, lowrank_a, inner, inner_grad, dc, partial,
                batch, length, text_slots, covered_slots, num_rows, prompt_start, source_stride, scale, unit,
                D, UPDATE_R, B_R, Q, R_TILE, Q_TILE, SLOTS, BATCH, BLOCK_D, GATHER, MASK,
                ACTIVATION, COMPUTE, PRECISION,
            )  # fmt: skip
        if FUSION or item >= prompt_items:  # noqa: SIM102  Triton evaluates both sides of `and`
            if arrive(counter + part, arrivals, AMD):
                if B_R > 0:
                    add_up(partial, 0, R, columns, arrivals, grad_lowrank_b, WIDTH, D, R_TILE, COMPUTE)
                if Q > 0:
                    add_up(partial, B_R, Q, columns, shares, grad_token_up, WIDTH, D, Q_TILE, COMPUTE)
                    add_up(partial, B_R + Q, Q, columns, shares, grad_token_down, WIDTH, D, Q_TILE, COMPUTE)
    elif B_R > 0:
        weights_of_positions(
            item - prompt_items - text_items, lowrank_a, down, softmax, small, attention_mean, da_partial, da_parts,
            grad_lowrank_a,
            num_rows, num_positions, covered_slots, scale, unit,
            D, R, K, H, R_TILE, ROWS, POSITIONS, UPDATE, FUSION, COMPUTE, PRECISION,
        )  # fmt: skip


def backward(
    grad_out: Tensor,
    grad_gate: Tensor | None,
    ids: Tensor | None,
    source: Tensor,
    masked: bool,
    prompt: Tensor,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    token_down: Tensor | None,
    token_up: Tensor | None,
    slots: Tensor,
    lengths: Tensor,
    inner: Tensor,
    down: Tensor,
    mix: Tensor,
    softmax: Tensor,
    scale: float,
    embed_scale: float,
    activation: str,
    prompt_start: int,
    lowrank_update: bool,
    fusion: bool,
    input_grad: bool,
) -> Gradients:
    """Gradients of P, A, B, U, V, G, D, W and inputs_embeds (if `input_grad`), each in its tensor's dtype.

    The arguments are those of `forward` with what it returned; a gradient that does not exist is empty.
    """
    grads = empty_grads(
        source, prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, token_down, token_up, input_grad
    )
    *weight_grads, dx = grads
    if grad_out.numel() == 0:
        for grad in grads:
            grad.zero_()
        return grads
    batch, length = grad_out.shape[0], grad_out.shape[1] - len(prompt)
    s, d = prompt.shape
    n, r = (0, 0) if lowrank_a is None else lowrank_a.shape
    k, h, _ = (0, 0, d) if space_down is None else space_down.shape
    q = 0 if token_down is None else len(token_down)
    update, fusion = lowrank_update and r > 0, fusion and r > 0
    dtype = down.dtype
    block_d = column_tile(d, grad_out.element_size())
    slices, blocks = divided_up(d, block_d), divided_up(s, PROMPT_TILE)
    tiles = dict(R_TILE=tile_of(r), K_TILE=tile_of(k), KH_TILE=tile_of(k * h), Q_TILE=tile_of(q))
    accumulated = tiles["R_TILE"] + 2 * tiles["KH_TILE"] + tiles["K_TILE"]
    weights_d = min(block_d, max(SMALLEST_DOT, WEIGHTS_TILE // power_of_two(accumulated)))
    weights_slices = divided_up(d, weights_d)
    covered = min(n, length) if update else 0
    text_slots = length if q else covered
    text_tiles = divided_up(length if q or input_grad else covered, TEXT_TILE)
    da_parts = divided_up(batch, TOKEN_BATCH) if q else slices
    shares = min(TOKEN_SHARES if q else SLOT_SHARES, max(1, divided_up(text_slots, TEXT_TILE))) if update or q else 0
    b_rank = r if update or fusion else 0
    common = dict(
        D=d, R=r, K=k, H=h, Q=q, **tiles, ROWS=PROMPT_TILE, SLOTS=TEXT_TILE, POSITIONS=POSITION_TILE,
        BATCH=TOKEN_BATCH, MASK=masked, UPDATE=update, FUSION=fusion, ACTIVATION=activation, COMPUTE=triton_dtype(dtype),
    )  # fmt: skip

    y_sum = down.new_empty(s, d)
    small = down.new_empty(s, (2 * r if fusion else 0) + k * h + k)
    attention_mean = down.new_empty(len(softmax))
    partial = down.new_empty(blocks * slices * PROMPT_TILE * (tiles["R_TILE"] + tiles["KH_TILE"]))
    dc = down.new_empty(0 if q else covered, d)
    da_partial = down.new_empty(da_parts, covered, r)
    inner_grad = torch.empty_like(inner)
    with on_device(prompt), counters.take(max(blocks, weights_slices), prompt.device) as counter:
        flags = backend_flags(dtype)
        reduce_kernel[(blocks * slices + text_tiles * da_parts,)](
            grad_out, grad_gate, slots, lengths, lowrank_a, lowrank_b, space_up, token_down, token_up,
            inner, down, softmax, y_sum, partial, small, attention_mean, dc, da_partial, inner_grad, dx, counter,
            batch, length, s, n, covered, prompt_start, scale, embed_scale, blocks * slices, text_tiles,
            BLOCK_D=block_d, UNROLL_BY=UNROLL, GATE_GRAD=grad_gate is not None and k > 0, INPUT_GRAD=input_grad,
            num_warps=NUM_WARPS, **common, **flags,
        )  # fmt: skip
        partial = down.new_empty(shares + fusion, b_rank + 2 * q, d)
        position_items = divided_up(n, POSITION_TILE) if b_rank else 0
        weights_kernel[(weights_slices * (1 + shares) + position_items,)](
            ids, source, grad_out, slots, lengths, prompt, lowrank_a, lowrank_b, space_down, gate_weight,
            inner, inner_grad, down, mix, softmax, y_sum, small, attention_mean, dc, da_partial, partial, counter, *weight_grads,
            batch, length, s, n, covered, text_slots, prompt_start, source.stride(-2), scale, embed_scale,
            shares, da_parts, weights_slices, weights_slices * shares, GATHER=ids is not None, BLOCK_D=weights_d,
            num_warps=NUM_WARPS if flags["AMD"] else WEIGHTS_WARPS, num_stages=WEIGHTS_STAGES, **common, **flags,
        )  # fmt: skip
    return grads


def empty_grads(
    source: Tensor,
    prompt: Tensor,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    token_down: Tensor | None,
    token_up: Tensor | None,
    input_grad: bool,
) -> Gradients:
    """The tensors that `backward` fills, for real and for fake inputs."""
    weights = (prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, token_down, token_up)
    grads = [prompt.new_empty(0) if weight is None else torch.empty_like(weight) for weight in weights]
    source_grad = torch.empty_like(source) if input_grad else source.new_empty(0)
    return cast(Gradients, (*grads, source_grad))  # eight and one
