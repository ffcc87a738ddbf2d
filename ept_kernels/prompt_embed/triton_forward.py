"""Forward: the backbone's input in one launch.

    X[b, j] = x + e·c·A[p]·B + e·σ(x/e·Dᵀ)·W      x = E[id[b, j]] or inputs_embeds[b, j]; p = text tokens before j
    P*      = e·(P + c·T·B + (w ∘ σ(P·Uᵀ))·V)     T = softmax(c/√d·(P·Bᵀ)·Aᵀ)·A, w = softmax(P·Gᵀ)

Every program takes a ticket and with it one item of work. Roles in the order of tickets, and who waits for whom:

    order     one batch row: which token stands in which slot (for A·B only)         ─┐
    project   PROMPT_TILE rows of P × a part of d: partial sums of P·[B; U; G]ᵀ;      │
              the last part of a row block adds them up and takes both softmaxes  ─┐  │
    text      TEXT_TILE slots × columns × batch rows of X                          │ ◄┘  (with a mask and A·B only)
    prompt    PROMPT_TILE rows × columns × batch rows of P*                        ◄┘

A program waits for lower tickets only. Those have started, and the ones it waits for wait for nobody, so the launch
ends whatever order the hardware starts programs in. The prompt's chain (project, then prompt) hides behind the text.
Where nobody waits, programs take no tickets. The default preset's prompt is P itself and its text needs no slots:
triton_by_row.py makes that form, with whole rows in registers.

Slots: the text tokens of a row in their order, then its padding in its order. A tile of slots therefore needs the
same rows of A in every batch row, and A·B is computed once for all of them. Without a mask, or without A·B, slot = column.

Bytes of the text part, minimum: each row of E is read once and each row of X written once, 2·batch·L·d elements;
A, B (and D, W), the ids and the slots come on top and are small. A·B is never stored.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_device import wait
from ..common.triton_launch import (
    NUM_WARPS,
    PROMPT_TILE,
    SCORE_TILE,
    SMALLEST_DOT,
    TEXT_TILE,
    backend_flags,
    column_tile,
    compute_dtype,
    counters,
    divided_up,
    launch,
    launch_mode,
    launching_on,
    power_of_two,
    tile_of,
    triton_dtype,
)
from . import triton_by_row
from .arguments import Settings, Text, Weights
from .triton_forward_prompt import project_prompt, write_prompt
from .triton_forward_text import order_row, write_text

ALL, ORDER, PROJECT, TEXT, PROMPT = ROLES = ("all", "order", "project", "text", "prompt")

TICKET, DONE, ORDERED, ARRIVED = (tl.constexpr(i) for i in range(4))  # counters; flags follow the arrivals

ORDER_CHUNK = 1024  # tokens of a row ordered at a time
BATCH_TILE = 8  # batch rows of a text program, which share A·B: eight gathers of 16 bytes in flight per thread
TOKEN_BATCH = 2  # the same with the token-conditioned update, whose program goes through all of d
SMALLEST_SPAN = 2  # batch rows of a text program in small batches
PROMPT_SPAN = 8  # batch rows that a prompt program writes to
PROGRAMS = 528  # of the text, where the batch has rows enough: four for each multiprocessor of an H100
PROJECT_STEP = 2048  # numbers of [B; U; G] per step of a project program: more of them would spill
STAGES = 2  # of loops with dots; a third buffer costs registers that the text needs for occupancy
PROJECT_PART = 128  # columns of d per project program


@triton.jit(
    do_not_specialize=[
        "batch", "length", "num_rows", "num_positions", "prompt_start", "text_tiles", "span", "order_items",
        "project_items", "text_items", "prompt_items",
    ]
)  # fmt: skip
def forward_kernel(
    ids, source, mask, starts, prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, token_down, token_up,
    out, slots, lengths, kept_starts, inner, down, mix, softmax, gate, partial, counter,
    batch, length, num_rows, num_positions, prompt_start, source_stride, scale: tl.float64, embed_scale: tl.float64,
    text_tiles, span, order_items, project_items, text_items, prompt_items,
    D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, H: tl.constexpr, Q: tl.constexpr,
    R_TILE: tl.constexpr, K_TILE: tl.constexpr, KH_TILE: tl.constexpr, Q_TILE: tl.constexpr, BLOCK_D: tl.constexpr,
    PART: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, POSITIONS: tl.constexpr,
    CHUNK: tl.constexpr, BATCH: tl.constexpr, PROMPT_SPAN: tl.constexpr,
    GATHER: tl.constexpr, MASK: tl.constexpr, STARTS: tl.constexpr, UPDATE: tl.constexpr, FUSION: tl.constexpr,
    SAVE: tl.constexpr,
    ROLE: tl.constexpr, ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, AMD: tl.constexpr,
):  # fmt: skip
    SLICES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    FUSION_R: tl.constexpr = R if FUSION else 0
    MIXES: tl.constexpr = FUSION_R + K > 0  # whether P* is more than e·P
    WAITS: tl.constexpr = ROLE == "all" and (MIXES or MASK == "slots")
    scale = tl.full((), scale, COMPUTE)
    unit = tl.full((), embed_scale, COMPUTE)
    blocks = (num_rows + ROWS - 1) // ROWS
    parts = project_items // blocks
    flags = counter + ARRIVED + blocks
    item = tl.atomic_add(counter + TICKET, 1, sem="relaxed") if WAITS else tl.program_id(0)

    if MASK == "slots" and (ROLE == "all" or ROLE == "order"):
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
            tile = item % text_tiles
            rest = item // text_tiles
            parts_of_d: tl.constexpr = 1 if Q > 0 else SLICES
            first_row = rest // parts_of_d * span
            write_text(
                tile, rest % parts_of_d * BLOCK_D, first_row, tl.minimum(first_row + span, batch),
                ids, source, mask, starts, slots, lengths, counter + ORDERED,
                lowrank_a, lowrank_b, token_down, token_up, inner, out,
                batch, length, num_rows, num_positions, prompt_start, source_stride, scale, unit,
                D, R, Q, R_TILE, Q_TILE, SLOTS, BATCH, BLOCK_D, GATHER, MASK, STARTS, UPDATE, SAVE,
                MASK == "slots" and ROLE == "all", ACTIVATION, COMPUTE, PRECISION, AMD,
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
                prompt, lowrank_b, space_up, starts, kept_starts, mix, out, length, num_rows, prompt_start, scale, unit,
                D, FUSION_R, K, H, R_TILE, KH_TILE, ROWS, BLOCK_D, STARTS, COMPUTE, PRECISION,
            )  # fmt: skip

    if WAITS:
        # The last program sets the counters back: every other one has passed its waits.
        total = order_items + project_items + text_items + prompt_items
        if tl.atomic_add(counter + DONE, 1, sem="acq_rel") == total - 1:
            tl.store(counter + TICKET, 0)
            tl.store(counter + DONE, 0)
            tl.store(counter + ORDERED, 0)
            for block in range(blocks):
                tl.store(flags + block, 0)


class Kept(NamedTuple):
    """What the forward leaves for the backward, in the compute type but for the first three; empty where not used.

    slots [batch, L] and lengths [batch] (int32, with a mask; without A·B the slots are 1 on text, and there are no lengths),
    starts [batch] (int32, where rows differ in them), inner = x/e·Dᵀ by slot [batch, L, q] (if it was to be saved),
    down [s, r + K·h + K], mix [s, r + K·h] and softmax [s, 2].
    """

    slots: Tensor
    lengths: Tensor
    starts: Tensor
    inner: Tensor
    down: Tensor
    mix: Tensor
    softmax: Tensor


class Results(NamedTuple):
    """X [batch, s + L, d] in the source's dtype, the gate [s, K] in the prompt's, and what the backward needs."""

    out: Tensor
    gate: Tensor
    kept: Kept


def forward(text: Text, weights: Weights, settings: Settings, save: bool) -> Results:
    """The input of the backbone in one launch. Without `save` the backward cannot follow, and `inner` is not stored."""
    results = empty_results(text, weights, settings, save)
    out, gate, kept = results
    if out.numel() == 0:
        return results
    if triton_by_row.suits(weights):
        of_rows = triton_by_row.Kept(kept.slots, kept.starts, kept.inner)
        triton_by_row.forward_of_one(text, weights, settings, out, of_rows if save else None)
        return results
    batch, length, d = text.shape
    s, r, q, (k, h) = len(weights.prompt), weights.rank, weights.token_rank, weights.spaces
    dtype = kept.down.dtype
    block_d = column_tile(d, text.source.element_size())
    slices, blocks = divided_up(d, block_d), divided_up(s, PROMPT_TILE)
    part = min(PROJECT_PART, tile_of(d))
    mixes = kept.down.numel() > 0
    update = settings.lowrank_update and r > 0
    masking = kind_of_mask(text, weights, settings)
    text_tiles = divided_up(length, TEXT_TILE)
    span = TOKEN_BATCH if q else span_of(batch, text_tiles * slices)
    items = {
        ORDER: batch if masking == "slots" and length else 0,
        PROJECT: blocks * divided_up(d, part) if mixes else 0,
        TEXT: text_tiles * (1 if q else slices) * divided_up(batch, span),
        PROMPT: blocks * slices * divided_up(batch, PROMPT_SPAN),
    }
    tiles = dict(R_TILE=tile_of(r), K_TILE=tile_of(k), KH_TILE=tile_of(k * h), Q_TILE=tile_of(q), BLOCK_D=block_d)
    partial_width = tiles["R_TILE"] + tiles["KH_TILE"] + tiles["K_TILE"]
    step = min(part, max(SMALLEST_DOT, PROJECT_STEP // power_of_two(partial_width)))
    partial = kept.down.new_empty(items[PROJECT] * PROMPT_TILE * partial_width)
    mask = text.mask if text.mask is None or text.mask.dtype != torch.bool else text.mask.view(torch.uint8)
    with launching_on(out), counters.take(3 + 2 * blocks, out.device) as counter:

        def launch_role(role: str, programs: int) -> None:
            launch(
                forward_kernel, programs,
                text.ids, text.source, mask, text.starts, *weights, out, *kept, gate, partial, counter,
                batch, length, s, weights.positions, settings.prompt_start,
                text.source.stride(-2), settings.scale, settings.embed_scale, text_tiles, span, *items.values(),
                D=d, R=r, K=k, H=h, Q=q, **tiles, PART=part, STEP=step, ROWS=PROMPT_TILE, SLOTS=TEXT_TILE,
                POSITIONS=SCORE_TILE, CHUNK=ORDER_CHUNK, BATCH=TOKEN_BATCH if q else BATCH_TILE, PROMPT_SPAN=PROMPT_SPAN,
                GATHER=text.ids is not None, MASK=masking, STARTS=text.starts is not None,
                UPDATE=update, FUSION=settings.fusion and r > 0, SAVE=save, ROLE=role, ACTIVATION=settings.activation,
                COMPUTE=triton_dtype(dtype), **backend_flags(dtype), num_warps=NUM_WARPS,
                num_stages=STAGES,
            )  # fmt: skip

        if launch_mode() == "single":
            launch_role(ALL, sum(items.values()))
        else:
            for role, programs in items.items():
                if programs:
                    launch_role(role, programs)
    return results


def kind_of_mask(text: Text, weights: Weights, settings: Settings) -> str:
    """ "none", "slots" that order the text, or "flags", which will do where no A·B asks for a token's place."""
    if text.mask is None:
        return "none"
    if settings.lowrank_update and weights.rank > 0:
        return "slots"
    return "flags" if weights.token_rank else "none"


def span_of(batch: int, programs: int) -> int:
    """Batch rows per text program: the most up to BATCH_TILE with which there are PROGRAMS of them."""
    span = BATCH_TILE
    while span > SMALLEST_SPAN and programs * divided_up(batch, span) < PROGRAMS:
        span //= 2
    return span


def empty_results(text: Text, weights: Weights, settings: Settings, save: bool) -> Results:
    """The tensors that `forward` fills, for real and for fake inputs."""
    batch, length, d = text.shape
    prompt, (k, h) = weights.prompt, weights.spaces
    s, r, q = len(prompt), weights.rank if settings.fusion else 0, weights.token_rank if save else 0
    masking = kind_of_mask(text, weights, settings)
    masked = masking == "slots" or (masking == "flags" and save)
    floats: dict[str, Any] = dict(dtype=compute_dtype(text.source, *weights), device=prompt.device)
    kept = Kept(
        slots=prompt.new_empty((batch, length) if masked else (0, 0), dtype=torch.int32),
        lengths=prompt.new_empty(batch if masking == "slots" else 0, dtype=torch.int32),
        starts=prompt.new_empty(0 if text.starts is None else batch, dtype=torch.int32),
        inner=torch.empty((batch, length, q) if q else (0, 0, 0), **floats),
        down=torch.empty(s, r + k * h + k, **floats),
        mix=torch.empty(s, r + k * h, **floats),
        softmax=torch.empty((s, 2) if r else (0, 0), **floats),
    )
    return Results(text.source.new_empty(batch, s + length, d), prompt.new_empty(s, k), kept)
