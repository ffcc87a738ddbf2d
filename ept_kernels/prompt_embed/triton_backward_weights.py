"""Backward, second launch: gradients by slices of d and by blocks of A. The plan is in triton_backward.py."""

import triton
import triton.language as tl

from ..common.triton_device import activate, arrive, load_rows, load_written, multiply, store_block
from .triton_backward_reduce import attention_and_grad, load_grad, load_softmax
from .triton_forward_text import locate


@triton.jit
def weights_of_text(
    part, share, shares, ids, source, grad_out, slots, lengths, starts, lowrank_a, inner, inner_grad, dc, partial,
    batch, length, text_slots, covered_slots, num_rows, prompt_start, source_stride, scale, unit,
    D: tl.constexpr, R: tl.constexpr, B_R: tl.constexpr, Q: tl.constexpr,
    R_TILE: tl.constexpr, Q_TILE: tl.constexpr,
    SLOTS: tl.constexpr, BATCH: tl.constexpr, BLOCK_D: tl.constexpr, GATHER: tl.constexpr, MASK: tl.constexpr,
    STARTS: tl.constexpr, ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
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
                    start, batch, slot, columns, grad_out, slots, lengths, starts, length, num_rows, prompt_start,
                    D, BATCH, SLOTS, MASK, STARTS, COMPUTE,
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
        "batch", "length", "num_rows", "num_positions", "covered_slots", "text_slots", "prompt_start", "shares",
        "da_parts", "prompt_items", "text_items",
    ]
)  # fmt: skip
def weights_kernel(
    ids, source, grad_out, prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, token_down, token_up,
    slots, lengths, starts, inner, down, mix, softmax, y_sum, small, attention_mean, dc, da_partial, inner_grad, partial, counter,
    grad_prompt, grad_lowrank_a, grad_lowrank_b, grad_space_down, grad_space_up, grad_gate_weight,
    grad_token_down, grad_token_up,
    batch, length, num_rows, num_positions, covered_slots, text_slots, prompt_start, source_stride,
    scale: tl.float64, embed_scale: tl.float64, shares, da_parts, prompt_items, text_items,
    D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, H: tl.constexpr, Q: tl.constexpr,
    R_TILE: tl.constexpr, K_TILE: tl.constexpr, KH_TILE: tl.constexpr, Q_TILE: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, POSITIONS: tl.constexpr, BATCH: tl.constexpr,
    GATHER: tl.constexpr, MASK: tl.constexpr, STARTS: tl.constexpr, UPDATE: tl.constexpr, FUSION: tl.constexpr,
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
                ids, source, grad_out, slots, lengths, starts, lowrank_a, inner, inner_grad, dc, partial,
                batch, length, text_slots, covered_slots, num_rows, prompt_start, source_stride, scale, unit,
                D, UPDATE_R, B_R, Q, R_TILE, Q_TILE, SLOTS, BATCH, BLOCK_D, GATHER, MASK, STARTS,
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
