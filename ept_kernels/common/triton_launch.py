"""The host's side of a launch: sizes of tiles, the compiler's flags, the device, counters that programs share.

All sizes follow from the shapes by rule: nothing is tuned at run time, and the order of every sum is fixed by the
shapes alone, never by the number of multiprocessors.

Launches may come from several Python threads. On a GPU they are ordered by their stream. On a CPU (Triton's
interpreter, an emulator) they run one at a time, because both keep the state of the running program in globals.
"""

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_device

PROMPT_TILE = 16  # prompt rows per program: the smallest tile of a dot, so that a short prompt wastes least
TEXT_TILE = 16  # text slots per program, for the same reason; every batch row of the tile shares one A·B
SCORE_TILE = 32  # rows of A per step of the softmax over the N positions
SMALLEST_DOT = 16  # tl.dot takes no side below this
VECTOR_BYTES = 16  # a thread's widest load
NUM_WARPS = 4

LAUNCH_MODES = ("single", "sequence")


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
    """float64 if any tensor has it, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name for a compute type."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def interpreting() -> bool:
    """Whether Triton's Python interpreter runs these kernels: decided when they were imported."""
    return not isinstance(triton_device.wait, triton.JITFunction)


def backend_flags(dtype: torch.dtype) -> dict:
    """AMD and PRECISION for the device that the next launch goes to."""
    amd = not interpreting() and _is_amd(triton.runtime.driver.active)
    tensor_cores = not interpreting() and not amd and dtype == torch.float32
    return dict(AMD=amd, PRECISION="tf32x3" if tensor_cores else "ieee")


@functools.cache
def _is_amd(driver: Any) -> bool:
    return driver.get_current_target().backend == "hip"


_one_at_a_time = threading.RLock()


def launching_on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The context of a launch: the tensor's GPU is the current device, or no other thread launches on the CPU."""
    return device_of(tensor.device)


def device_of(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """`launching_on` by the device itself."""
    return torch.cuda.device(device) if device.type == "cuda" else _one_at_a_time


def launch_mode() -> str:
    """EPT_LAUNCH: "single" (one launch, work by ticket) or "sequence" (a launch per role, no waiting inside any)."""
    mode = os.environ.get("EPT_LAUNCH", "single")
    if mode not in LAUNCH_MODES:
        raise ValueError(f"EPT_LAUNCH={mode!r} is unknown: choose one of {', '.join(map(repr, LAUNCH_MODES))}")
    return mode


@dataclasses.dataclass
class Recording:
    """What a thread launches: compiled kernels with their programs and all arguments; the counters that it takes."""

    launches: list[tuple[Any, int, tuple[Any, ...]]] = dataclasses.field(default_factory=list)
    counters: list[Tensor] = dataclasses.field(default_factory=list)


_of_thread = threading.local()  # `recording`, while this thread records


@contextlib.contextmanager
def recorded() -> Iterator[Recording]:
    """Yields what this thread launches inside."""
    _of_thread.recording = recording = Recording()
    try:
        yield recording
    finally:
        _of_thread.recording = None


def launch(kernel: Any, programs: int, *args: Any, **flags: Any) -> None:
    """Launches `kernel` on a grid of `programs`. Takes run-time arguments by position, the compiler's by name."""
    compiled = kernel[(programs,)](*args, **flags)
    recording = getattr(_of_thread, "recording", None)
    if recording is not None:
        constants = (flags[name] for name in kernel.arg_names[len(args) :])
        recording.launches.append((compiled, programs, (*args, *constants)))


class Counters:
    """Zeros that kernels count in and leave at zero, one buffer for each stream, so that no launch needs a memset.

    A buffer belongs to one stream, where launches follow each other, also those of several threads. A launch under
    CUDA-graph capture takes a buffer of its own for good (the graph may be replayed beside anything) from a reserve
    that the first ordinary launch made; when the reserve is used up, or was never made, a captured memset takes its
    place. A launch that raises leaves its counts in doubt, and its buffer is dropped.
    """

    SIZE = 256  # counters per buffer; a longer prompt gets a larger buffer
    RESERVE = 64  # captured launches per device without a memset: 64 KiB

    def __init__(self) -> None:
        self.of_stream: dict[tuple[torch.device, int, int], Tensor] = {}
        self.reserve: dict[torch.device, list[Tensor]] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def take(self, size: int, device: torch.device) -> Iterator[Tensor]:
        """`size` int32 zeros or more for a launch on the current stream. Enter `launching_on` first."""
        buffer = self.buffer(size, device)
        try:
            yield buffer
        except BaseException:
            self.drop(buffer)
            raise

    def buffer(self, size: int, device: torch.device) -> Tensor:
        """`take` without its end: `drop` the buffer where the launch raises."""
        size = divided_up(size, self.SIZE) * self.SIZE
        buffer: Tensor | None
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            buffer = self._for_capture(size, device)
        else:
            stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
            buffer = self.of_stream.get((device, stream, size))
            if buffer is None:
                buffer = self._of_stream(stream, size, device)
        recording = getattr(_of_thread, "recording", None)
        if recording is not None:
            recording.counters.append(buffer)
        return buffer

    def drop(self, buffer: Tensor) -> None:
        """Its counts are in doubt: the next launch gets another one."""
        with self._lock:
            for key in [key for key, kept in self.of_stream.items() if kept is buffer]:
                del self.of_stream[key]

    def _of_stream(self, stream: int, size: int, device: torch.device) -> Tensor:
        key = (device, stream, size)
        with self._lock:
            if key not in self.of_stream:
                self.of_stream[key] = self._zeros(size, device)
                self._fill_reserve(device)
            return self.of_stream[key]

    def _for_capture(self, size: int, device: torch.device) -> Tensor:
        with self._lock:
            reserve = self.reserve.get(device)
            if reserve and size == self.SIZE:
                return reserve.pop()
        return self._zeros(size, device)

    def _fill_reserve(self, device: torch.device) -> None:
        if device.type == "cuda" and device not in self.reserve:
            self.reserve[device] = list(self._zeros(self.RESERVE * self.SIZE, device).view(self.RESERVE, -1))
            torch.cuda.current_stream(device).synchronize()  # the reserve is used on other streams

    @staticmethod
    def _zeros(size: int, device: torch.device) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, device=device)


counters = Counters()
