"""What a point costs on paper and counted: bytes, launches, the copy that shares are of, and the row of its table."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from ept_kernels.prompt_embed import traffic

from ..tables.records import SIZES
from .checked import Work
from .kernel_traffic import OperationCounter
from .points import LORA_LAYERS, LORA_RANK, Point

__all__ = [
    "COPIED",
    "copy_bandwidth",
    "copy_of",
    "kernels",
    "launches",
    "predicted_bytes",
    "row",
    "taken_by_auto",
    "timed",
]


def predicted_bytes(point: Point, way: str) -> int:
    """Bytes that have to cross the memory bus once, by prompt_embed's traffic; for LoRA and layer_update counted here."""
    if way == "both":
        return predicted_bytes(point, "forward") + predicted_bytes(point, "backward")
    x = point.sizes
    if point.impl.startswith("LoRA"):
        # Forward: x read for A, read again and written with what LoRA adds. Backward: dY read for A's and B's
        # gradients, x read, dY read again and dX written.
        moves = 3 if way == "forward" else 4
        weights = 2 * LORA_RANK * x.d * x.weight_bytes * (1 if way == "forward" else 2)
        return LORA_LAYERS * (moves * x.batch * x.length * x.d * x.source_bytes + weights)
    if point.stem == "layer_update":
        # Forward: hidden read, result written. Backward: the result's gradient and hidden read, hidden's written.
        moves = 2 if way == "forward" else 3
        weights = max(point.adapters, 1) * 2 * x.q * x.d * x.weight_bytes * (1 if way == "forward" else 2)
        return moves * x.batch * x.length * x.d * x.source_bytes + weights
    return getattr(traffic, way)(x).total


def launches(point: Point, way: str, work: Work, device: str) -> int:
    """Launches on a GPU as its profiler sees them; on a CPU operations dispatched, views aside, or of compiled code the
    kernel calls in it."""
    if device == "cpu" and work.compiled_calls is not None:
        forward, backward = work.compiled_calls
        return {"forward": forward, "backward": backward, "both": forward + backward}[way]
    return kernels(work.call(way), device).total()


def kernels(call: Callable[[], Any], device: str) -> Counter[str]:
    """What a call launches, by name: kernels and copies on a GPU, dispatched operations without views on a CPU."""
    if device == "cpu":
        with OperationCounter() as counter:
            call()
        return counter.operations
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return Counter(e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA)


def taken_by_auto(auto: Work, eager: Work, device: str) -> str:
    """Which implementation impl="auto" ran: "torch" if it launches what impl="torch" launches, else "triton"."""
    launched = [kernels(work.call("forward"), device) for work in (auto, eager)]
    return "torch" if launched[0] == launched[1] else "triton"


COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes: more than the caches hold, and long beside a launch


def copy_bandwidth(device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes per second, read and written, of a copy of `COPIED` bytes: the median of nine, by the clock of the run."""
    source = torch.ones(COPIED[device] // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(11):
        started = clock()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return 2 * source.nbytes / sorted(seconds[2:])[4]


def copy_of(size: int, device: str) -> Callable[[], Any]:
    """A copy that reads and writes `size` bytes in all."""
    source = torch.ones(size // 8, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def row(point: Point, way: str, check: float, launches: int, bandwidth: float) -> dict[str, Any]:
    """What is known of a point beside its times: columns of bench.tables.records, and the bandwidth that shares are of."""
    x = point.sizes
    sizes = {name: getattr(x, name) for name in SIZES}
    return {
        "stem": point.stem, "impl": point.impl, "way": way, "axis": point.axis, **sizes,
        "dtype": "bf16" if x.source_bytes == 2 else "fp32", "error_of_allowed": check, "launches": launches,
        "bytes_predicted": predicted_bytes(point, way), "copy_gb_per_s": bandwidth / 1e9,
    } | ({"adapters": point.adapters} if point.adapters else {})  # fmt: skip


def timed(row: dict[str, Any], low: float, median: float, high: float, rounds: int) -> dict[str, Any]:
    """The row with its times in seconds, and the share of the copy bandwidth that the predicted bytes then had."""
    share = row["bytes_predicted"] / median / (row["copy_gb_per_s"] * 1e9)
    times = {"unit": "ms", "median": 1e3 * median, "low": 1e3 * low, "high": 1e3 * high, "rounds": rounds}
    return row | times | {"of_copy_bandwidth": share}
