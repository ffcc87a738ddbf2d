"""Products of whole rows, which a program holds in registers, with few rows of a weight.

The ranks are small (4 by default), so the products are sums over a row: a dot of 16 columns at least would take the row
through shared memory, and most of it would be padding.
"""

import triton
import triton.language as tl

PER_THREAD = 32  # numbers of a tile in a thread: as many again for the sum, and there is room for six programs per SM
MOST_ROWS = 16  # rows per program where they are short
LOOPED_ROWS = 4  # the same where a weight is looped over, so that the rows stay in registers beside the sum
UNROLLED = 8  # rows of a weight whose code is written out; of more than that two at a time, which keeps registers free


def warps_of(tile_d: int) -> int:
    """Warps of a program: as many as keep two rows in it."""
    return 4 if tile_d <= 1024 else 8 if tile_d <= 4096 else 16


def group_of(rank: int) -> int:
    """Rows of a weight whose code is written out at a time."""
    return rank if rank <= UNROLLED else 2


def rows_of(tile_d: int, ranks: int) -> int:
    """Rows per program, for weights of so many rows."""
    return max(1, min(PER_THREAD * 32 * warps_of(tile_d) // tile_d, MOST_ROWS if ranks <= UNROLLED else LOOPED_ROWS))


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
