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

from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..common.triton_launch import (
    NUM_WARPS,
    PROMPT_TILE,
    SMALLEST_DOT,
    TEXT_TILE,
    backend_flags,
    column_tile,
    counters,
    divided_up,
    launch,
    launching_on,
    power_of_two,
    tile_of,
    triton_dtype,
)
from .arguments import Settings, Text, Weights
from .triton_backward_reduce import reduce_kernel
from .triton_backward_weights import weights_kernel
from .triton_forward import Kept

WEIGHTS_TILE = 4096  # numbers of dB, dU, dV and dG that a program of the second launch adds up in registers
POSITION_TILE = 16  # rows of A per step; twice as many spill on sm_100, with two products of each in registers
WEIGHTS_WARPS = 8  # on NVIDIA, where its operands would spill in the registers of four; AMD's four have as many lanes
WEIGHTS_STAGES = 1  # its loops are short and full of dots: loading ahead would only spill
UNROLL = 8  # batch rows in flight while dX is summed: 8 × 16 bytes per thread
TOKEN_BATCH = 2  # batch rows per program that needs all of d at once
SLOT_SHARES = 4  # programs that share the slots of a slice of dB (and dW, dD)
TOKEN_SHARES = 16  # the same where dX itself is read again


class Gradients(NamedTuple):
    """The gradient of every trained tensor and of the text's embeddings, each in its tensor's dtype; empty for None."""

    weights: Weights
    source: Tensor

    @property
    def flat(self) -> tuple[Tensor, ...]:
        """All of them, the source's last."""
        return cast(tuple[Tensor, ...], (*self.weights, self.source))


def backward(
    grad_out: Tensor,
    grad_gate: Tensor | None,
    text: Text,
    weights: Weights,
    kept: Kept,
    settings: Settings,
    input_grad: bool,
) -> Gradients:
    """The gradients in two launches, for the arguments of `forward` and what it kept.

    Mask and starts themselves are not asked for: `kept` has them. Without `input_grad` the text's embeddings get none.
    """
    grads = empty_grads(text, weights, input_grad)
    if grad_out.numel() == 0:
        for grad in grads.flat:
            grad.zero_()
        return grads
    batch, length, d = text.shape
    s, n, r, q, (k, h) = len(weights.prompt), weights.positions, weights.rank, weights.token_rank, weights.spaces
    update, fusion = settings.lowrank_update and r > 0, settings.fusion and r > 0
    dtype = kept.down.dtype
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
    position_items = divided_up(n, POSITION_TILE) if b_rank else 0
    common = dict(
        D=d, R=r, K=k, H=h, Q=q, **tiles, ROWS=PROMPT_TILE, SLOTS=TEXT_TILE, POSITIONS=POSITION_TILE,
        BATCH=TOKEN_BATCH, MASK=kind_of_mask(kept), STARTS=kept.starts.numel() > 0, UPDATE=update, FUSION=fusion,
        ACTIVATION=settings.activation, COMPUTE=triton_dtype(dtype),
    )  # fmt: skip

    new_empty = kept.down.new_empty
    y_sum = new_empty(s, d)
    small = new_empty(s, (2 * r if fusion else 0) + k * h + k)
    attention_mean = new_empty(len(kept.softmax))
    partial = new_empty(blocks * slices * PROMPT_TILE * (tiles["R_TILE"] + tiles["KH_TILE"]))
    dc = new_empty(0 if q else covered, d)
    da_partial = new_empty(da_parts, covered, r)
    inner_grad = torch.empty_like(kept.inner)
    between = (y_sum, small, attention_mean, dc, da_partial, inner_grad)  # what the first launch leaves for the second
    sizes = (batch, length, s, n, covered)
    with launching_on(grad_out), counters.take(max(blocks, weights_slices), grad_out.device) as counter:
        flags = backend_flags(dtype)
        launch(
            reduce_kernel, blocks * slices + text_tiles * da_parts,
            grad_out, grad_gate, *weights, *kept, *between, partial, grads.source, counter,
            *sizes, settings.prompt_start, settings.scale, settings.embed_scale, blocks * slices, text_tiles,
            BLOCK_D=block_d, UNROLL_BY=UNROLL, GATE_GRAD=grad_gate is not None and k > 0, INPUT_GRAD=input_grad,
            num_warps=NUM_WARPS, **common, **flags,
        )  # fmt: skip
        partial = new_empty(shares + fusion, b_rank + 2 * q, d)
        launch(
            weights_kernel, weights_slices * (1 + shares) + position_items,
            text.ids, text.source, grad_out, *weights, *kept, *between, partial, counter, *grads.weights,
            *sizes, text_slots, settings.prompt_start, text.source.stride(-2), settings.scale, settings.embed_scale,
            shares, da_parts, weights_slices, weights_slices * shares, GATHER=text.ids is not None, BLOCK_D=weights_d,
            num_warps=NUM_WARPS if flags["AMD"] else WEIGHTS_WARPS, num_stages=WEIGHTS_STAGES, **common, **flags,
        )  # fmt: skip
    return grads


def kind_of_mask(kept: Kept) -> str:
    """ "none", "slots" or "flags": what the forward kept."""
    if kept.slots.numel() == 0:
        return "none"
    return "slots" if kept.lengths.numel() else "flags"


def empty_grads(text: Text, weights: Weights, input_grad: bool) -> Gradients:
    """The tensors that `backward` fills, for real and for fake inputs."""
    none = weights.prompt.new_empty(0)
    grads = Weights(*(none.new_empty(0) if weight is None else torch.empty_like(weight) for weight in weights))
    return Gradients(grads, torch.empty_like(text.source) if input_grad else text.source.new_empty(0))
