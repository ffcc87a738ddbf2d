"""Forward: the updated hidden states in one launch.

    out = x + h·σ(z)·W      z = (x·Dᵀ)/h, the backward keeps it

A program takes ROWS tokens with all of d, which it reads once and holds in registers: for every row of D a sum over d,
and at once the row of W times what became of it. Programs share nothing and wait for nobody.

Bytes: x is read once and out written once, 2·batch·columns·d numbers. D and W come from the caches: 2·q·d numbers for
each program.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_device import activate
from ..common.triton_launch import compute_dtype, divided_up, launch, launching_on, power_of_two, triton_dtype
from ..common.triton_rows import add_outer, group_of, project, rows_of, warps_of
from .arguments import Settings, Update
from .triton_rows import locate


class Results(NamedTuple):
    """The updated hidden states [batch, columns, d], and z [batch, columns, q] in the compute type, or empty."""

    out: Tensor
    z: Tensor


@triton.jit(do_not_specialize=["batch", "columns", "tiles", "adapters"])
def forward_kernel(
    hidden, down, up, index, scales, out, z, batch, columns, tiles, adapters, row_stride, column_stride,
    scale: tl.float64,
    D: tl.constexpr, Q: tl.constexpr, TILE_D: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    INDEXED: tl.constexpr, SCALES: tl.constexpr, SAVE: tl.constexpr, ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    row, column, exists, adapter = locate(
        tl.program_id(0), index, batch, columns, tiles, adapters, ROWS, INDEXED
    )  # fmt: skip
    places = tl.arange(0, TILE_D)
    inside = exists[:, None] & (places < D)[None, :]
    token = row * columns + column
    x = tl.load(
        hidden + (row * row_stride + column.to(tl.int64) * column_stride)[:, None] + places[None, :],
        inside, other=0.0, eviction_policy="evict_first",
    ).to(COMPUTE)  # fmt: skip
    total = x
    if adapter >= 0:
        safe = tl.minimum(adapter, adapters - 1)
        unit = load_unit(scales, safe, scale, SCALES, COMPUTE)
        own_down, own_up = down + safe.to(tl.int64) * Q * D, up + safe.to(tl.int64) * Q * D
        for first in range(0, Q, GROUP):
            products = project(x, own_down, first, places, D, Q, GROUP, COMPUTE)
            for k in tl.static_range(GROUP):
                inner = products[k] / unit
                if SAVE:
                    tl.store(z + token * Q + first + k, inner, exists & (first + k < Q))
                total = add_outer(
                    total, activate(inner, ACTIVATION) * unit, own_up, first + k, places, D, Q, COMPUTE
                )  # fmt: skip
    elif SAVE:
        for k in range(Q):
            tl.store(z + token * Q + k, tl.zeros([ROWS], COMPUTE), exists)
    if INDEXED:  # an index that names no adapter cannot raise here, so it is not taken for another one
        total = tl.where(adapter < adapters, total, float("nan"))
    tl.store(out + token[:, None] * D + places[None, :], total, inside)


@triton.jit
def load_unit(scales, adapter, scale, SCALES: tl.constexpr, COMPUTE: tl.constexpr):
    """h: a number, a tensor of one, or the adapter's."""
    if SCALES == "number":
        return tl.full((), scale, COMPUTE)
    elif SCALES == "one":
        return tl.load(scales).to(COMPUTE)
    else:
        return tl.load(scales + adapter).to(COMPUTE)


def forward(update: Update, settings: Settings, save: bool) -> Results:
    """The update in one launch. Without `save` the backward cannot follow, and z is not stored."""
    results = empty_results(update, save)
    out, z = results
    if out.numel() == 0:
        return results
    batch, columns, _ = out.shape
    tiling = Tiling.of(update)
    with launching_on(out):
        launch(
            forward_kernel, tiling.items,
            update.hidden, update.down, update.up, update.adapter_index, update.scales, out, z,
            batch, columns, tiling.tiles, update.adapters, *update.hidden.stride()[:2], settings.hidden_scale,
            SAVE=save, SCALES=kind_of_scale(update), ACTIVATION=settings.activation, **tiling.flags(update),
        )  # fmt: skip
    return results


def empty_results(update: Update, save: bool) -> Results:
    """The tensors that `forward` fills, for real and for fake inputs."""
    batch, columns, d = update.hidden.shape
    q = update.down.shape[-2]
    dtype = compute_dtype(update.hidden, update.down, update.up)
    out = update.hidden.new_empty(batch, columns, d)
    return Results(out, out.new_empty((batch, columns, q) if save else (0, 0, 0), dtype=dtype))


def kind_of_scale(update: Update) -> str:
    """ "number", "one" tensor of a number, or a number by "adapter"."""
    if update.scales is None:
        return "number"
    return "one" if update.scales.dim() == 0 else "adapter"


class Tiling(NamedTuple):
    """How the tokens are cut: ROWS in a program of `warps`, `tiles` programs for each batch row, `items` in all."""

    rows: int
    tile_d: int
    warps: int
    tiles: int
    items: int

    @classmethod
    def of(cls, update: Update) -> "Tiling":
        """From the shapes alone."""
        batch, columns, d = update.hidden.shape
        tile_d = power_of_two(d)
        warps = warps_of(tile_d)
        length = columns if update.adapter_index is not None else batch * columns
        rows = min(rows_of(tile_d, update.down.shape[-2]), power_of_two(length))
        tiles = divided_up(length, rows)
        return cls(rows, tile_d, warps, tiles, tiles * (batch if update.adapter_index is not None else 1))

    def flags(self, update: Update) -> dict[str, Any]:
        """What forward and backward are compiled for."""
        q, d = update.down.shape[-2:]
        dtype = compute_dtype(update.hidden, update.down, update.up)
        return dict(
            D=d, Q=q, TILE_D=self.tile_d, ROWS=self.rows, GROUP=group_of(q),
            INDEXED=update.adapter_index is not None, COMPUTE=triton_dtype(dtype), num_warps=self.warps,
        )  # fmt: skip
