"""Forward: the backbone's input in one launch.

    X[b, j] = x + e·c·A[p]·B + e·σ(x/e·Dᵀ)·W      x = E[id[b, j]] or inputs_embeds[b, j]; p = text tokens before j
    P*      = e·(P + c·T·B + (w ∘ σ(P·Uᵀ))·V)     T = softmax(c/√d·(P·Bᵀ)·Aᵀ)·A, w = softmax(P·Gᵀ)

Every program takes a ticket and with it one item of work. Roles in the order of tickets, and who waits for whom:

    order     one batch row: which token stands in which slot                        ─┐
    project   PROMPT_TILE rows of P × a part of d: partial sums of P·[B; U; G]ᵀ;      │
              the last part of a row block adds them up and takes both softmaxes  ─┐  │
    text      TEXT_TILE slots × columns × batch rows of X                          │ ◄┘  (with a mask only)
    prompt    PROMPT_TILE rows × columns × batch rows of P*                        ◄┘

A program waits for lower tickets only. Those have started, and the ones it waits for wait for nobody, so the launch
ends whatever order the hardware starts programs in. The prompt's chain (project, then prompt) hides behind the text.

Slots: the text tokens of a row in their order, then its padding in its order. A tile of slots therefore needs the
same rows of A in every batch row, and A·B is computed once for all of them. Without a mask slot = column.

Bytes of the text part, minimum: each row of E is read once and each row of X written once, 2·batch·L·d elements;
A, B (and D, W), the ids and the slots come on top and are small. A·B is never stored.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import (
    NUM_WARPS,
    PROMPT_TILE,
    SCORE_TILE,
    SMALLEST_DOT,
    TEXT_TILE,
    activate,
    arrive,
    backend_flags,
    column_tile,
    compute_dtype,
    counters,
    divided_up,
    launch_mode,
    load_rows,
    load_written,
    multiply,
    on_device,
    power_of_two,
    release,
    softmax_spaces,
    space_of_column,
    store_block,
    tile_of,
    triton_dtype,
    wait,
)

# X, the gate, slots, lengths, inner, down, mix, softmax: see `forward`.
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

ALL, ORDER, PROJECT, TEXT, PROMPT = ROLES = ("all", "order", "project", "text", "prompt")

TICKET, DONE, ORDERED, ARRIVED = (tl.constexpr(i) for i in range(4))  # counters; flags follow the arrivals

ORDER_CHUNK = 1024  # tokens of a row ordered at a time
BATCH_TILE = 2  # batch rows of a text tile: two gathers in flight per thread
BATCH_SPAN = 8  # batch rows per program: enough programs to fill a GPU, and A·B shared by as many
PROJECT_STEP = 2048  # numbers of [B; U; G] per step of a project program: more of them would spill
STAGES = 2  # of loops with dots; a third buffer costs registers that the text needs for occupancy
PROJECT_PART = 128  # columns of d per project program


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
def write_text(
    tile, first_column, last_column, first_row, last_row,
    ids, source, slots, lengths, lowrank_a, lowrank_b, token_down, token_up, inner, out,
    length, num_rows, num_positions, prompt_start, source_stride, scale, unit,
    D: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, R_TILE: tl.constexpr, Q_TILE: tl.constexpr,
    SLOTS: tl.constexpr, BATCH: tl.constexpr, BLOCK_D: tl.constexpr,
    GATHER: tl.constexpr, MASK: tl.constexpr, UPDATE: tl.constexpr, SAVE: tl.constexpr,
    ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X for SLOTS slots of the batch rows first_row … last_row; with the token-conditioned update all of d at once."""
    slot = tile * SLOTS + tl.arange(0, SLOTS)
    ranks = tl.arange(0, R_TILE)
    if UPDATE:
        a = load_rows(lowrank_a, slot, slot < num_positions, ranks, R, COMPUTE) * (scale * unit)
    if Q > 0:
        # One batch tile per program here: the gathered rows are read for σ(x/e·Dᵀ), and again, from the cache, below.
        token_ranks = tl.arange(0, Q_TILE)
        row, token, source_row, text, exists = locate(
            first_row, last_row, slot, ids, slots, lengths, length, source_stride, BATCH, SLOTS, GATHER, MASK
        )
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
        token_mix = activate(z, ACTIVATION) * unit
    for first in range(first_column, last_column, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        if UPDATE:
            b = load_rows(lowrank_b, ranks, ranks < R, columns, D, COMPUTE)
            update = multiply(a, b, tl.zeros([SLOTS, BLOCK_D], COMPUTE), PRECISION)
            # A reduction over an axis of one leaves the layout of the dot for that of the gathers, once.
            update = tl.sum(tl.reshape(update, [1, SLOTS, BLOCK_D]), 0)
        if Q > 0:
            up = load_rows(token_up, token_ranks, token_ranks < Q, columns, D, COMPUTE)
            token_update = multiply(token_mix, up, tl.zeros([BATCH * SLOTS, BLOCK_D], COMPUTE), PRECISION)
            token_update = tl.reshape(token_update, [BATCH, SLOTS, BLOCK_D])
        for start in range(first_row, last_row, BATCH):
            row, token, source_row, text, exists = locate(
                start, last_row, slot, ids, slots, lengths, length, source_stride, BATCH, SLOTS, GATHER, MASK
            )
            inside = exists[:, :, None] & (columns < D)[None, None, :]
            x = tl.load(source + source_row[:, :, None] + columns[None, None, :], inside, other=0.0).to(COMPUTE)
            if UPDATE:
                x += tl.where(text[:, :, None], update[None, :, :], 0.0)
            if Q > 0:
                x += tl.where(text[:, :, None], token_update, 0.0)
            column = token + tl.where(token >= prompt_start, num_rows, 0)
            out_row = (row.to(tl.int64)[:, None] * (num_rows + length) + column) * D
            tl.store(out + out_row[:, :, None] + columns[None, None, :], x, inside)


@triton.jit
def locate(
    first_row, last_row, slot, ids, slots, lengths, length, source_stride,
    BATCH: tl.constexpr, SLOTS: tl.constexpr, GATHER: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """For BATCH × SLOTS: batch rows, tokens, their rows' offsets in the source, whether text, whether there at all."""
    row = first_row + tl.arange(0, BATCH)
    exists = (row < last_row)[:, None] & (slot < length)[None, :]
    index = row.to(tl.int64)[:, None] * length + slot[None, :]
    if MASK:
        token = tl.load(slots + index, exists, other=0, cache_modifier=".cg")
        text = slot[None, :] < tl.load(lengths + row, row < last_row, other=0, cache_modifier=".cg")[:, None]
    else:
        token = tl.broadcast_to(slot[None, :], [BATCH, SLOTS])
        text = exists
    source_index = row.to(tl.int64)[:, None] * length + token
    if GATHER:
        source_index = tl.load(ids + source_index, exists, other=0).to(tl.int64)
    return row, token, source_index * source_stride, text, exists


@triton.jit
def write_prompt(
    block, first_column, first_row, last_row, prompt, lowrank_b, space_up, mix, out,
    length, num_rows, prompt_start, scale, unit,
    D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, H: tl.constexpr, R_TILE: tl.constexpr, KH_TILE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P* for ROWS prompt rows and BLOCK_D columns, into the batch rows first_row … last_row."""
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
        out_row = tl.full((), 1, tl.int64) * row * (num_rows + length) + prompt_start + rows
        tl.store(out + out_row[:, None] * D + columns[None, :], total, inside)


@triton.jit(
    do_not_specialize=[
        "batch", "length", "num_rows", "num_positions", "prompt_start", "text_tiles", "order_items", "project_items",
        "text_items", "prompt_items",
    ]
)  # fmt: skip
def forward_kernel(
    ids, source, mask, prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, token_down, token_up,
    out, slots, lengths, inner, down, mix, softmax, gate, partial, counter,
    batch, length, num_rows, num_positions, prompt_start, source_stride, scale: tl.float64, embed_scale: tl.float64,
    text_tiles, order_items, project_items, text_items, prompt_items,
    D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, H: tl.constexpr, Q: tl.constexpr,
    R_TILE: tl.constexpr, K_TILE: tl.constexpr, KH_TILE: tl.constexpr, Q_TILE: tl.constexpr, BLOCK_D: tl.constexpr,
    PART: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, POSITIONS: tl.constexpr,
    CHUNK: tl.constexpr, BATCH: tl.constexpr, SPAN: tl.constexpr, PROMPT_SPAN: tl.constexpr,
    GATHER: tl.constexpr, MASK: tl.constexpr, UPDATE: tl.constexpr, FUSION: tl.constexpr, SAVE: tl.constexpr,
    ROLE: tl.constexpr, ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, AMD: tl.constexpr,
):  # fmt: skip
    SLICES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    FUSION_R: tl.constexpr = R if FUSION else 0
    MIXES: tl.constexpr = FUSION_R + K > 0  # whether P* is more than e·P
    scale = tl.full((), scale, COMPUTE)
    unit = tl.full((), embed_scale, COMPUTE)
    blocks = (num_rows + ROWS - 1) // ROWS
    parts = project_items // blocks
    flags = counter + ARRIVED + blocks
    item = tl.atomic_add(counter + TICKET, 1, sem="relaxed") if ROLE == "all" else tl.program_id(0)

    if MASK and (ROLE == "all" or ROLE == "order"):
        if item < order_items:
            order_row(item, mask, slots, lengths, counter + ORDERED, length, CHUNK, ROLE == "all", AMD)
        item -= order_items
    if MIXES and (ROLE == "all" or ROLE == "project"):
        if item >= 0 and item < project_items:
            block = item // parts
            project_prompt(
                block, item % parts, parts, prompt, lowrank_a, lowrank_b, space_down, gate_weight,
                partial, down, mix, softmax, gate, counter + ARRIVED + block, flags + block,
                num_rows, num_positions, scale,
                D, FUSION_R, K, H, R_TILE, K_TILE, KH_TILE, PART, ROWS, STEP, POSITIONS, ROLE == "all",
                ACTIVATION, COMPUTE, PRECISION, AMD,
            )  # fmt: skip
        item -= project_items
    if ROLE == "all" or ROLE == "text":
        if item >= 0 and item < text_items:
            if MASK and ROLE == "all":
                wait(counter + ORDERED, batch)
            tile = item % text_tiles
            rest = item // text_tiles
            if Q > 0:
                first_column, last_column = 0, D
                first_row = rest * SPAN
            else:
                first_column = rest % SLICES * BLOCK_D
                last_column = first_column + BLOCK_D
                first_row = rest // SLICES * SPAN
            write_text(
                tile, first_column, last_column, first_row, tl.minimum(first_row + SPAN, batch),
                ids, source, slots, lengths, lowrank_a, lowrank_b, token_down, token_up, inner, out,
                length, num_rows, num_positions, prompt_start, source_stride, scale, unit,
                D, R, Q, R_TILE, Q_TILE, SLOTS, BATCH, BLOCK_D, GATHER, MASK, UPDATE, SAVE,
                ACTIVATION, COMPUTE, PRECISION,
            )  # fmt: skip
        item -= text_items
    if ROLE == "all" or ROLE == "prompt":  # noqa: SIM102  the first is known to the compiler, the second is not
        if item >= 0 and item < prompt_items:
            block = item % blocks
            rest = item // blocks
            first_row = rest // SLICES * PROMPT_SPAN
            if MIXES and ROLE == "all":
                wait(flags + block, 1)
            write_prompt(
                block, rest % SLICES * BLOCK_D, first_row, tl.minimum(first_row + PROMPT_SPAN, batch),
                prompt, lowrank_b, space_up, mix, out, length, num_rows, prompt_start, scale, unit,
                D, FUSION_R, K, H, R_TILE, KH_TILE, ROWS, BLOCK_D, COMPUTE, PRECISION,
            )  # fmt: skip

    if ROLE == "all":
        # The last program sets the counters back: every other one has passed its waits.
        total = order_items + project_items + text_items + prompt_items
        if tl.atomic_add(counter + DONE, 1, sem="acq_rel") == total - 1:
            tl.store(counter + TICKET, 0)
            tl.store(counter + DONE, 0)
            tl.store(counter + ORDERED, 0)
            for block in range(blocks):
                tl.store(flags + block, 0)


def forward(
    ids: Tensor | None,
    source: Tensor,
    mask: Tensor | None,
    prompt: Tensor,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    token_down: Tensor | None,
    token_up: Tensor | None,
    scale: float,
    embed_scale: float,
    activation: str,
    prompt_start: int,
    lowrank_update: bool,
    fusion: bool,
    save: bool,
) -> Results:
    """X [batch, s + L, d] in the source's dtype, the gate [s, K] in the prompt's, and what the backward needs.

    `source` is E [vocab, d] with `ids` [batch, L], or inputs_embeds [batch, L, d] without. The rest of the result:
    slots [batch, L] and lengths [batch] (int32, with a mask), inner = x/e·Dᵀ by slot [batch, L, q] (if `save`),
    down [s, r + K·h + K], mix [s, r + K·h] and softmax [s, 2], all in the compute type; empty where not used.
    """
    out, gate, slots, lengths, inner, down, mix, softmax = empty_results(
        ids, source, mask, prompt, lowrank_a, lowrank_b, space_down, gate_weight, token_down, token_up, fusion, save
    )
    if out.numel() == 0:
        return out, gate, slots, lengths, inner, down, mix, softmax
    batch, length = out.shape[0], out.shape[1] - len(prompt)
    s, d = prompt.shape
    r = 0 if lowrank_b is None else len(lowrank_b)
    k, h, _ = (0, 0, d) if space_down is None else space_down.shape
    q = 0 if token_down is None else len(token_down)
    dtype = down.dtype
    block_d = column_tile(d, source.element_size())
    slices, blocks = divided_up(d, block_d), divided_up(s, PROMPT_TILE)
    part = min(PROJECT_PART, tile_of(d))
    mixes = down.numel() > 0
    span = BATCH_TILE if q else BATCH_SPAN
    text_tiles = divided_up(length, TEXT_TILE)
    items = {
        ORDER: 0 if mask is None or length == 0 else batch,
        PROJECT: blocks * divided_up(d, part) if mixes else 0,
        TEXT: text_tiles * (1 if q else slices) * divided_up(batch, span),
        PROMPT: blocks * slices * divided_up(batch, BATCH_SPAN),
    }
    tiles = dict(R_TILE=tile_of(r), K_TILE=tile_of(k), KH_TILE=tile_of(k * h), Q_TILE=tile_of(q), BLOCK_D=block_d)
    partial_width = tiles["R_TILE"] + tiles["KH_TILE"] + tiles["K_TILE"]
    step = min(part, max(SMALLEST_DOT, PROJECT_STEP // power_of_two(partial_width)))
    partial = down.new_empty(items[PROJECT] * PROMPT_TILE * partial_width)
    with on_device(prompt), counters.take(3 + 2 * blocks, prompt.device) as counter:

        def launch(role: str, programs: int) -> None:
            forward_kernel[(programs,)](
                ids, source, mask if mask is None or mask.dtype != torch.bool else mask.view(torch.uint8),
                prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, token_down, token_up,
                out, slots, lengths, inner, down, mix, softmax, gate, partial, counter,
                batch, length, s, 0 if lowrank_a is None else len(lowrank_a), prompt_start,
                source.stride(-2), scale, embed_scale, text_tiles, *items.values(),
                D=d, R=r, K=k, H=h, Q=q, **tiles, PART=part, STEP=step, ROWS=PROMPT_TILE, SLOTS=TEXT_TILE,
                POSITIONS=SCORE_TILE, CHUNK=ORDER_CHUNK, BATCH=BATCH_TILE, SPAN=span, PROMPT_SPAN=BATCH_SPAN,
                GATHER=ids is not None, MASK=mask is not None, UPDATE=lowrank_update and r > 0,
                FUSION=fusion and r > 0, SAVE=save, ROLE=role, ACTIVATION=activation,
                COMPUTE=triton_dtype(dtype), **backend_flags(dtype), num_warps=NUM_WARPS,
                num_stages=STAGES,
            )  # fmt: skip

        if launch_mode() == "single":
            launch(ALL, sum(items.values()))
        else:
            for role, programs in items.items():
                if programs:
                    launch(role, programs)
    return out, gate, slots, lengths, inner, down, mix, softmax


def empty_results(
    ids: Tensor | None,
    source: Tensor,
    mask: Tensor | None,
    prompt: Tensor,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    space_down: Tensor | None,
    gate_weight: Tensor | None,
    token_down: Tensor | None,
    token_up: Tensor | None,
    fusion: bool,
    save: bool,
) -> Results:
    """The tensors that `forward` fills, for real and for fake inputs."""
    batch, length = source.shape[:2] if ids is None else ids.shape
    s, d = prompt.shape
    r = 0 if lowrank_b is None or not fusion else lowrank_b.shape[0]
    k, h = (0, 0) if space_down is None else space_down.shape[:2]
    q = 0 if token_down is None or not save else token_down.shape[0]
    masked = mask is not None
    dtype = compute_dtype(source, prompt, lowrank_a, lowrank_b, space_down, gate_weight, token_down, token_up)
    kept: dict[str, Any] = dict(dtype=dtype, device=prompt.device)
    return (
        source.new_empty(batch, s + length, d),
        prompt.new_empty(s, k),
        prompt.new_empty((batch, length) if masked else (0, 0), dtype=torch.int32),
        prompt.new_empty(batch if masked else 0, dtype=torch.int32),
        torch.empty((batch, length, q) if q else (0, 0, 0), **kept),
        torch.empty(s, r + k * h + k, **kept),
        torch.empty(s, r + k * h, **kept),
        torch.empty((s, 2) if r else (0, 0), **kept),
    )
