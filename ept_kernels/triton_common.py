"""What the forward and the backward kernels share: device functions, hand-over between programs, sizes of tiles.

Every dot is taken in the compute type (fp32, or fp64 where an input is fp64), whatever the inputs are stored in, so
each value is rounded once, on its way out. All sizes follow from the shapes by rule: nothing is tuned at run time, and
the order of every sum is fixed by the shapes alone, never by the number of multiprocessors.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROMPT_TILE = 16  # prompt rows per program: the smallest tile of a dot, so that a short prompt wastes least
TEXT_TILE = 16  # text slots per program, for the same reason; every batch row of the tile shares one A·B
SCORE_TILE = 32  # rows of A per step of the softmax over the N positions
SMALLEST_DOT = 16  # tl.dot takes no side below this
VECTOR_BYTES = 16  # a thread's widest load
NUM_WARPS = 4

LAUNCH_MODES = ("single", "sequence")


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


def divided_up(size: int, by: int) -> int:
    """Tiles of `by` that hold `size`. (triton.cdiv is for kernels: on the host its wrapper takes 20 times as long.)"""
    return -(-size // by)


def power_of_two(size: int) -> int:
    """The smallest that is not below `size`; triton.next_power_of_2 is no host function either."""
    return 1 << max(size - 1, 0).bit_length()


def tile_of(size: int) -> int:
    """The power of two that holds `size` columns of a dot."""
    return max(SMALLEST_DOT, power_of_two(size))


def column_tile(d: int, itemsize: int) -> int:
    """Columns per slice: one 16-byte load per thread and TEXT_TILE rows, no more than the matrix has."""
    threads = 32 * NUM_WARPS
    return min(tile_of(d), threads * VECTOR_BYTES // (TEXT_TILE * itemsize))


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def interpreting() -> bool:
    """Whether Triton's Python interpreter runs these kernels: decided when this module was imported."""
    return not isinstance(wait, triton.JITFunction)


def backend_flags(dtype: torch.dtype) -> dict:
    """AMD and PRECISION for the device that the next launch goes to."""
    amd = not interpreting() and _is_amd(triton.runtime.driver.active)
    tensor_cores = not interpreting() and not amd and dtype == torch.float32
    return dict(AMD=amd, PRECISION="tf32x3" if tensor_cores else "ieee")


@functools.cache
def _is_amd(driver: Any) -> bool:
    return driver.get_current_target().backend == "hip"


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device; the tensors may be on another."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def launch_mode() -> str:
    """EPT_LAUNCH: "single" (one launch, work by ticket) or "sequence" (a launch per role, no waiting inside any)."""
    mode = os.environ.get("EPT_LAUNCH", "single")
    if mode not in LAUNCH_MODES:
        raise ValueError(f"EPT_LAUNCH={mode!r} is unknown: choose one of {', '.join(map(repr, LAUNCH_MODES))}")
    return mode


class Counters:
    """Zeros that kernels count in and leave at zero, one buffer for each stream, so that no launch needs a memset.

    A buffer belongs to one stream, where launches follow each other. A launch under CUDA-graph capture takes a buffer
    of its own for good (the graph may be replayed beside anything) from a reserve that the first ordinary launch made;
    when the reserve is used up, or was never made, a captured memset takes its place. A launch that raises leaves
    its counts in doubt, and its buffer is dropped.
    """

    SIZE = 256  # counters per buffer; a longer prompt gets a larger buffer
    RESERVE = 64  # captured launches per device without a memset: 64 KiB

    def __init__(self):
        self.of_stream = {}
        self.reserve = {}

    @contextlib.contextmanager
    def take(self, size: int, device: torch.device) -> Iterator[Tensor]:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        size = -(-size // self.SIZE) * self.SIZE
        key = (device, stream, size)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            reserve = self.reserve.get(device)
            yield reserve.pop() if reserve and size == self.SIZE else self._zeros(size, device)
            return
        if key not in self.of_stream:
            self.of_stream[key] = self._zeros(size, device)
            if device.type == "cuda" and device not in self.reserve:
                self.reserve[device] = list(self._zeros(self.RESERVE * self.SIZE, device).view(self.RESERVE, -1))
                torch.cuda.current_stream(device).synchronize()  # the reserve is used on other streams
        try:
            yield self.of_stream[key]
        except BaseException:
            del self.of_stream[key]
            raise

    @staticmethod
    def _zeros(size: int, device: torch.device) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, device=device)


counters = Counters()
