"""Backward: the gradients of triton_forward in two launches, each deterministic, without a program that waits.

With g the gradient of the result, z = (x·Dᵀ)/h as the forward kept it, and Σ over the tokens of an adapter:

    u = (g·Wᵀ) ∘ σ'(z)      dx = g + u·D        dD = Σ uᵀ·x        dW = h·Σ σ(z)ᵀ·g

First launch, `hidden`: ROWS tokens with all of d, as in the forward: u, and dx.
Second launch, `weights`: BLOCK_D columns of one adapter × a share of the tokens: partial dD and dW; the last share to
arrive at a slice adds them up in their order. It is left out where D and W ask for no gradient.

Bytes: g and x are read and dx written by one launch or the other, g once more by the second: 4·batch·columns·d numbers.
The order of every sum is fixed by the shapes, so equal inputs give equal bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_device import (
    activate,
    activation_slope,
    arrive,
    load_rows,
    load_written,
    multiply,
    store_block,
)
from ..common.triton_launch import (
    NUM_WARPS,
    SMALLEST_DOT,
    backend_flags,
    compute_dtype,
    counters,
    divided_up,
    launch,
    launching_on,
    power_of_two,
    tile_of,
    triton_dtype,
)
from ..common.triton_rows import add_outer, project
from .arguments import Settings, Update
from .triton_forward import Tiling, kind_of_scale, load_unit
from .triton_rows import locate

TOKEN_TILE = 16  # tokens per step of the second launch: of 32 the operands would spill on sm_100
COLUMN_TILE = 64  # columns per program of the second launch: a whole memory line of 128 bytes in bf16
WEIGHTS_TILE = 4096  # numbers of dD and dW that a program of the second launch adds up in registers
PROGRAMS = 1024  # of the second launch, as far as the tokens go: seven for each multiprocessor of the largest GPUs
STEPS = 8  # tiles of tokens per program at least, so that few shares are left to be added up
MOST_SHARES = 64  # that the last one adds up
IN_FLIGHT = 8192  # numbers of the shares that a program loads at a time while it adds them up


class Gradients(NamedTuple):
    """Of hidden, down and up, each in its tensor's dtype; empty where none was asked for."""

    hidden: Tensor
    down: Tensor
    up: Tensor


@triton.jit(do_not_specialize=["batch", "columns", "tiles", "adapters"])
def hidden_kernel(
    grad_out, down, up, index, z, u, dx, batch, columns, tiles, adapters,
    D: tl.constexpr, Q: tl.constexpr, TILE_D: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    INDEXED: tl.constexpr, INPUT_GRAD: tl.constexpr, WEIGHT_GRAD: tl.constexpr,
    ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    row, column, exists, adapter = locate(
        tl.program_id(0), index, batch, columns, tiles, adapters, ROWS, INDEXED
    )  # fmt: skip
    places = tl.arange(0, TILE_D)
    inside = exists[:, None] & (places < D)[None, :]
    token = row * columns + column
    grad = tl.load(grad_out + token[:, None] * D + places[None, :], inside, other=0.0).to(COMPUTE)
    total = grad
    if adapter >= 0:
        safe = tl.minimum(adapter, adapters - 1)
        own_down, own_up = down + safe.to(tl.int64) * Q * D, up + safe.to(tl.int64) * Q * D
        for first in range(0, Q, GROUP):
            products = project(grad, own_up, first, places, D, Q, GROUP, COMPUTE)
            for k in tl.static_range(GROUP):
                there = exists & (first + k < Q)
                inner = tl.load(z + token * Q + first + k, there, other=0.0)
                through = products[k] * activation_slope(inner, ACTIVATION)
                if WEIGHT_GRAD:
                    tl.store(u + token * Q + first + k, through, there)
                if INPUT_GRAD:
                    total = add_outer(total, through, own_down, first + k, places, D, Q, COMPUTE)
    if INPUT_GRAD:
        tl.store(dx + token[:, None] * D + places[None, :], total, inside)


@triton.jit(do_not_specialize=["batch", "columns", "groups", "tiles", "adapters", "shares"])
def weights_kernel(
    hidden, grad_out, index, scales, z, u, partial, grad_down, grad_up, counter,
    batch, columns, groups, tiles, adapters, shares, row_stride, column_stride, scale: tl.float64,
    D: tl.constexpr, Q: tl.constexpr, Q_TILE: tl.constexpr, BOTH_TILE: tl.constexpr, BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr, UNROLL: tl.constexpr, INDEXED: tl.constexpr, SCALES: tl.constexpr, ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, AMD: tl.constexpr,
):  # fmt: skip
    SLICES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    part = tl.program_id(0) % SLICES
    share = tl.program_id(0) // SLICES % shares
    wanted = tl.program_id(0) // SLICES // shares
    places = part * BLOCK_D + tl.arange(0, BLOCK_D)
    ranks = tl.arange(0, Q_TILE)
    dd = tl.zeros([Q_TILE, BLOCK_D], COMPUTE)
    dw = tl.zeros([Q_TILE, BLOCK_D], COMPUTE)
    for group in range(groups):
        adapter = wanted
        if INDEXED:
            adapter = tl.load(index + group).to(tl.int32)
        if adapter == wanted:
            for tile in range(share, tiles, shares):
                row, column, exists, _ = locate(
                    group * tiles + tile, index, batch, columns, tiles, adapters, TOKENS, INDEXED
                )  # fmt: skip
                token = row * columns + column
                inside = exists[:, None] & (places < D)[None, :]
                grad = load_rows(grad_out, token, exists, places, D, COMPUTE)
                offset = row * row_stride + column.to(tl.int64) * column_stride
                x = tl.load(hidden + offset[:, None] + places[None, :], inside, other=0.0).to(COMPUTE)
                inner = load_rows(z, token, exists, ranks, Q, COMPUTE)
                through = load_rows(u, token, exists, ranks, Q, COMPUTE)
                dw = multiply(activate(inner, ACTIVATION).T, grad, dw, PRECISION)
                dd = multiply(through.T, x, dd, PRECISION)
    own = partial + wanted.to(tl.int64) * shares * 2 * Q * D
    base = own + share * 2 * Q * D
    store_block(base, ranks, ranks < Q, places, D, D, dd)
    store_block(base + Q * D, ranks, ranks < Q, places, D, D, dw * load_unit(scales, wanted, scale, SCALES, COMPUTE))
    if arrive(counter + wanted * SLICES + part, shares, AMD):
        both = tl.arange(0, BOTH_TILE)  # the rows of dD, then those of dW
        total = tl.zeros([BOTH_TILE, BLOCK_D], COMPUTE)
        for one in tl.range(0, shares, loop_unroll_factor=UNROLL):
            total += load_written(own + one * 2 * Q * D, both, both < 2 * Q, places, D, D)
        of_adapter = wanted.to(tl.int64) * Q * D
        store_block(grad_down + of_adapter, both, both < Q, places, D, D, total)
        store_block(grad_up + of_adapter, both - Q, (both >= Q) & (both < 2 * Q), places, D, D, total)


def backward(
    grad_out: Tensor, update: Update, z: Tensor, settings: Settings, input_grad: bool, weight_grad: bool
) -> Gradients:
    """The gradients in two launches, for the arguments of `forward` and the z that it kept."""
    grads = empty_grads(update, input_grad, weight_grad)
    if grad_out.numel() == 0:
        for grad in grads:
            grad.zero_()
        return grads
    batch, columns, _ = grad_out.shape
    tiling = Tiling.of(update)
    u = torch.empty_like(z) if weight_grad else z.new_empty(0)
    with launching_on(grad_out):
        launch(
            hidden_kernel, tiling.items,
            grad_out, update.down, update.up, update.adapter_index, z, u, grads.hidden,
            batch, columns, tiling.tiles, update.adapters, INPUT_GRAD=input_grad, WEIGHT_GRAD=weight_grad,
            ACTIVATION=settings.activation, **tiling.flags(update),
        )  # fmt: skip
        if weight_grad:
            _launch_weights(grad_out, update, z, u, settings, grads)
    return grads


def _launch_weights(
    grad_out: Tensor, update: Update, z: Tensor, u: Tensor, settings: Settings, grads: Gradients
) -> None:
    batch, columns, d = grad_out.shape
    q, adapters, indexed = update.down.shape[-2], update.adapters, update.adapter_index is not None
    dtype = compute_dtype(update.hidden, update.down, update.up)
    q_tile, both_tile = tile_of(q), power_of_two(2 * q)
    block_d = min(tile_of(d), COLUMN_TILE, max(SMALLEST_DOT, WEIGHTS_TILE // (2 * q_tile)))
    slices = divided_up(d, block_d)
    groups = batch if indexed else 1  # of tokens that have one adapter; without an index all of them
    tiles = divided_up(columns if indexed else batch * columns, TOKEN_TILE)
    shares = max(1, min(PROGRAMS // (slices * adapters), MOST_SHARES, groups * tiles // STEPS, tiles))
    partial = z.new_empty(adapters * shares, 2 * q, d)
    with counters.take(adapters * slices, grad_out.device) as counter:
        launch(
            weights_kernel, slices * shares * adapters,
            update.hidden, grad_out, update.adapter_index, update.scales, z, u, partial, grads.down, grads.up, counter,
            batch, columns, groups, tiles, adapters, shares, *update.hidden.stride()[:2], settings.hidden_scale,
            D=d, Q=q, Q_TILE=q_tile, BOTH_TILE=both_tile, BLOCK_D=block_d, TOKENS=TOKEN_TILE,
            UNROLL=max(1, IN_FLIGHT // (both_tile * block_d)), INDEXED=indexed,
            SCALES=kind_of_scale(update), ACTIVATION=settings.activation, COMPUTE=triton_dtype(dtype),
            num_warps=NUM_WARPS, num_stages=1, **backend_flags(dtype),
        )  # fmt: skip


def empty_grads(update: Update, input_grad: bool, weight_grad: bool) -> Gradients:
    """The tensors that `backward` fills, for real and for fake inputs."""
    hidden, down, up = update.hidden, update.down, update.up
    return Gradients(
        hidden.new_empty(hidden.shape if input_grad else (0,)),
        down.new_empty(down.shape if weight_grad else (0,)),
        up.new_empty(up.shape if weight_grad else (0,)),
    )
