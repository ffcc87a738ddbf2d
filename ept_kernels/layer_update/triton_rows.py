"""Where a program's tokens stand, and products of whole rows with few rows of a weight. Forward and backward use both.

q is small (4 by default), so the products are sums over a row that is in registers: a dot of 16 columns at least would
take the row through shared memory, and most of it would be padding.
"""

import triton
import triton.language as tl


@triton.jit
def locate(item, index, batch, columns, tiles, adapters, ROWS: tl.constexpr, INDEXED: tl.constexpr):
    """For ROWS tokens: batch rows, columns, whether they exist, and the adapter, which is one for all of them.

    Without an index the tokens of all batch rows follow each other, and the adapter is 0. With one an item is part of
    one batch row, cut into `tiles` items, and the adapter is -1 where the row stays as it is.
    """
    within = tl.arange(0, ROWS)
    if INDEXED:
        row = item // tiles + tl.zeros_like(within)
        column = item % tiles * ROWS + within
        adapter = tl.load(index + item // tiles).to(tl.int32)
    else:
        token = item * ROWS + within
        row = token // columns
        column = token % columns
        adapter = tl.full((), 0, tl.int32)
    return row.to(tl.int64), column, (row < batch) & (column < columns), adapter


@triton.jit
def load_weight(weight, row, places, D: tl.constexpr, Q: tl.constexpr, COMPUTE: tl.constexpr):
    """Row `row` of a weight [Q, D], zeros past its end."""
    inside = (places < D) & (row < Q)
    return tl.load(weight + row * D + places, inside, other=0.0, eviction_policy="evict_last").to(COMPUTE)


@triton.jit
def project(x, weight, first, places, D: tl.constexpr, Q: tl.constexpr, GROUP: tl.constexpr, COMPUTE: tl.constexpr):
    """x·weightᵀ for the rows first … first + GROUP of the weight: a tuple of one vector for each."""
    products = ()
    for k in tl.static_range(GROUP):
        products = products + (tl.sum(x * load_weight(weight, first + k, places, D, Q, COMPUTE)[None, :], 1),)  # type: ignore[assignment]  # noqa: RUF005
    return products


@triton.jit
def add_outer(total, factor, weight, row, places, D: tl.constexpr, Q: tl.constexpr, COMPUTE: tl.constexpr):
    """total + factor·(row of the weight)."""
    return total + factor[:, None] * load_weight(weight, row, places, D, Q, COMPUTE)[None, :]
