"""Where a program's tokens stand. Forward and backward use it."""

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
