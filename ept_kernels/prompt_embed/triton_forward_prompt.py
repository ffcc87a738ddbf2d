"""Forward, the prompt: P·[B; U; G]ᵀ, both softmaxes, and the rows of P*. The plan is in triton_forward.py."""

import triton
import triton.language as tl

from ..common.triton_device import (
    activate,
    arrive,
    load_rows,
    load_written,
    multiply,
    release,
    softmax_spaces,
    space_of_column,
    store_block,
)


@triton.jit
def project_prompt(
    block, part, parts, prompt, lowrank_a, lowrank_b, space_down, gate_weight, partial, down, mix, softmax, gate,
    arrived, flag, num_rows, num_positions, scale,
    D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    R_TILE: tl.constexpr, K_TILE: tl.constexpr, KH_TILE: tl.constexpr,
    PART: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, POSITIONS: tl.constexpr, SIGNAL: tl.constexpr,
    ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, AMD: tl.constexpr,
):  # fmt: skip
    """Partial sums of P·[B; U; G]ᵀ over PART columns of d; the last part to arrive finishes the row block."""
    PARTIAL: tl.constexpr = R_TILE + KH_TILE + K_TILE
    rows = block * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    ranks, spaces, inners = tl.arange(0, R_TILE), tl.arange(0, K_TILE), tl.arange(0, KH_TILE)
    y = tl.zeros([ROWS, R_TILE], COMPUTE)
    u = tl.zeros([ROWS, KH_TILE], COMPUTE)
    g = tl.zeros([ROWS, K_TILE], COMPUTE)
    for offset in range(0, PART, STEP):
        columns = part * PART + offset + tl.arange(0, STEP)
        p = load_rows(prompt, rows, valid, columns, D, COMPUTE)
        if R > 0:
            y = multiply(p, load_rows(lowrank_b, ranks, ranks < R, columns, D, COMPUTE).T, y, PRECISION)
        if K > 0:
            u = multiply(p, load_rows(space_down, inners, inners < K * H, columns, D, COMPUTE).T, u, PRECISION)
            g = multiply(p, load_rows(gate_weight, spaces, spaces < K, columns, D, COMPUTE).T, g, PRECISION)
    base = partial + (block * parts + part) * ROWS * PARTIAL
    local = tl.arange(0, ROWS)
    if R > 0:
        store_block(base, local, local < ROWS, ranks, R_TILE, PARTIAL, y)
    if K > 0:
        store_block(base + R_TILE, local, local < ROWS, inners, KH_TILE, PARTIAL, u)
        store_block(base + R_TILE + KH_TILE, local, local < ROWS, spaces, K_TILE, PARTIAL, g)
    if arrive(arrived, parts, AMD):
        finish_projection(
            block, parts, lowrank_a, partial + block * parts * ROWS * PARTIAL, down, mix, softmax, gate,
            num_rows, num_positions, scale,
            D, R, K, H, R_TILE, K_TILE, KH_TILE, ROWS, POSITIONS, ACTIVATION, COMPUTE, PRECISION,
        )  # fmt: skip
        if SIGNAL:
            release(flag, AMD)


@triton.jit
def finish_projection(
    block, parts, lowrank_a, partial, down, mix, softmax, gate, num_rows, num_positions, scale,
    D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    R_TILE: tl.constexpr, K_TILE: tl.constexpr, KH_TILE: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr,
    ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """down = P·[B; U; G]ᵀ; mix = [T, w ∘ σ(P·Uᵀ)], what [c·B; V] is multiplied by; softmax = [highest score, sum]."""
    PARTIAL: tl.constexpr = R_TILE + KH_TILE + K_TILE
    DOWN: tl.constexpr = R + K * H + K
    MIX: tl.constexpr = R + K * H
    rows = block * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    local = tl.arange(0, ROWS)
    if R > 0:
        ranks = tl.arange(0, R_TILE)
        y = tl.zeros([ROWS, R_TILE], COMPUTE)
        for part in range(parts):
            y += load_written(partial + part * ROWS * PARTIAL, local, local < ROWS, ranks, R_TILE, PARTIAL)
        store_block(down, rows, valid, ranks, R, DOWN, y)
        score_scale = scale / D**0.5
        highest = tl.full([ROWS], float("-inf"), COMPUTE)
        total = tl.zeros([ROWS], COMPUTE)
        t = tl.zeros([ROWS, R_TILE], COMPUTE)
        for start in range(0, num_positions, POSITIONS):
            positions = start + tl.arange(0, POSITIONS)
            a = load_rows(lowrank_a, positions, positions < num_positions, ranks, R, COMPUTE)
            score = multiply(y, a.T, tl.zeros([ROWS, POSITIONS], COMPUTE), PRECISION) * score_scale
            score = tl.where((positions < num_positions)[None, :], score, float("-inf"))
            higher = tl.maximum(highest, tl.max(score, 1))
            probability = tl.exp(score - higher[:, None])
            shrink = tl.exp(highest - higher)
            t = multiply(probability, a, t * shrink[:, None], PRECISION)
            total = total * shrink + tl.sum(probability, 1)
            highest = higher
        store_block(mix, rows, valid, ranks, R, MIX, t / total[:, None])
        tl.store(softmax + 2 * rows, highest, valid)
        tl.store(softmax + 2 * rows + 1, total, valid)
    if K > 0:
        inners, spaces = tl.arange(0, KH_TILE), tl.arange(0, K_TILE)
        u = tl.zeros([ROWS, KH_TILE], COMPUTE)
        g = tl.zeros([ROWS, K_TILE], COMPUTE)
        for part in range(parts):
            base = partial + part * ROWS * PARTIAL + R_TILE
            u += load_written(base, local, local < ROWS, inners, KH_TILE, PARTIAL)
            g += load_written(base + KH_TILE, local, local < ROWS, spaces, K_TILE, PARTIAL)
        store_block(down + R, rows, valid, inners, K * H, DOWN, u)
        store_block(down + R + K * H, rows, valid, spaces, K, DOWN, g)
        weight = softmax_spaces(g, K, K_TILE)
        store_block(gate, rows, valid, spaces, K, K, weight)
        spread = space_of_column(K_TILE, H, KH_TILE, COMPUTE)
        weight_of_column = multiply(weight, spread, tl.zeros([ROWS, KH_TILE], COMPUTE), PRECISION)
        store_block(mix + R, rows, valid, inners, K * H, MIX, weight_of_column * activate(u, ACTIVATION))


@triton.jit
def write_prompt(
    block, first_column, first_row, last_row, prompt, lowrank_b, space_up, starts, kept_starts, mix, out,
    length, num_rows, prompt_start, scale, unit,
    D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, H: tl.constexpr, R_TILE: tl.constexpr, KH_TILE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STARTS: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P* for ROWS prompt rows and BLOCK_D columns, into the batch rows first_row … last_row; and where these start."""
    MIX: tl.constexpr = R + K * H
    rows = block * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    columns = first_column + tl.arange(0, BLOCK_D)
    total = load_rows(prompt, rows, valid, columns, D, COMPUTE)
    if R > 0:
        ranks = tl.arange(0, R_TILE)
        t = load_written(mix, rows, valid, ranks, R, MIX) * scale
        total = multiply(t, load_rows(lowrank_b, ranks, ranks < R, columns, D, COMPUTE), total, PRECISION)
    if K > 0:
        inners = tl.arange(0, KH_TILE)
        inner = load_written(mix + R, rows, valid, inners, K * H, MIX)
        total = multiply(inner, load_rows(space_up, inners, inners < K * H, columns, D, COMPUTE), total, PRECISION)
    total = tl.sum(tl.reshape(total * unit, [1, ROWS, BLOCK_D]), 0)  # out of the dot's layout, as in write_text
    inside = valid[:, None] & (columns < D)[None, :]
    for row in range(first_row, last_row):
        start = prompt_start
        if STARTS:
            start = tl.load(starts + row).to(tl.int32)
            if block + first_column == 0:
                tl.store(kept_starts + row, start)
        out_row = tl.full((), 1, tl.int64) * row * (num_rows + length) + start + rows
        tl.store(out + out_row[:, None] * D + columns[None, :], total, inside)
