"""Device functions that the kernels of all stems use: dots, loads and stores, activations, hand-over between programs.

Every dot is taken in the compute type (fp32, or fp64 where an input is fp64), whatever the inputs are stored in, so
each value is rounded once, on its way out.
"""

import triton
import triton.language as tl


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b. PRECISION is "tf32x3" on NVIDIA's tensor cores, "ieee" (fp32 MFMA) on AMD's."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def load_rows(base, rows, valid, columns, WIDTH: tl.constexpr, COMPUTE: tl.constexpr):
    """Rows of a row-major matrix of WIDTH columns in the compute type, zero where a row or column is not there."""
    inside = valid[:, None] & (columns < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0).to(COMPUTE)


@triton.jit
def load_written(base, rows, valid, columns, wide, STRIDE: tl.constexpr):
    """Columns below `wide` of a small matrix that another program of this launch has written: past the L1 cache."""
    inside = valid[:, None] & (columns < wide)[None, :]
    return tl.load(base + rows[:, None] * STRIDE + columns[None, :], mask=inside, other=0.0, cache_modifier=".cg")


@triton.jit
def store_block(base, rows, valid, columns, wide, STRIDE: tl.constexpr, value):
    inside = valid[:, None] & (columns < wide)[None, :]
    tl.store(base + rows[:, None] * STRIDE + columns[None, :], value, mask=inside)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x * sigmoid(x)
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    elif ACTIVATION == "gelu":
        return x * gauss_cdf(x)
    else:
        return x


@triton.jit
def activation_slope(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        gate = sigmoid(x)
        return gate * (1.0 + x * (1.0 - gate))
    elif ACTIVATION == "relu":
        return tl.where(x > 0.0, 1.0, 0.0).to(x.dtype)
    elif ACTIVATION == "gelu":
        return gauss_cdf(x) + x * tl.exp(x * x * -0.5) * 0.3989422804014327  # 1/√(2π)
    else:
        return tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def sigmoid(x):
    """From exp(-|x|), which never overflows."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0 / (1.0 + small), small / (1.0 + small))


@triton.jit
def gauss_cdf(x):
    return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))  # 1/√2


@triton.jit
def softmax_spaces(logits, K: tl.constexpr, K_TILE: tl.constexpr):
    """softmax over the first K of K_TILE columns; the others come out as zero."""
    logits = tl.where((tl.arange(0, K_TILE) < K)[None, :], logits, float("-inf"))
    weight = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weight / tl.sum(weight, 1)[:, None]


@triton.jit
def space_of_column(K_TILE: tl.constexpr, H: tl.constexpr, KH_TILE: tl.constexpr, COMPUTE: tl.constexpr):
    """[K_TILE, KH_TILE], 1 where the column belongs to the space: spreads the gate, and sums over a space's columns."""
    return (tl.arange(0, K_TILE)[:, None] == (tl.arange(0, KH_TILE) // H)[None, :]).to(COMPUTE)


@triton.jit
def finish_stores(AMD: tl.constexpr):
    """All stores of the program are done before any of its warps goes on.

    A barrier orders a program's warps, and the release of the one that raises the flag covers what the barrier
    ordered before it. On AMD Triton's barrier does not wait for outstanding stores, so each wave does that itself.
    """
    if AMD:
        lanes = tl.arange(0, 64)
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1", "=v,v", [lanes], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()


@triton.jit
def arrive(counter, expected, AMD: tl.constexpr):
    """Whether this program is the last of `expected` to arrive; the counter is then back at zero."""
    finish_stores(AMD)
    last = tl.atomic_add(counter, 1, sem="acq_rel") == expected - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def release(counter, AMD: tl.constexpr):
    finish_stores(AMD)
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def wait(counter, count):
    """Spins until `count` programs have released. Only ever called for programs with lower tickets."""
    while tl.atomic_add(counter, 0, sem="acquire") < count:
        pass
