"""The clock of a GPU: Triton's do_bench, with a cold L2 cache before every run, of calls and of captured CUDA graphs."""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Clock", "triton_clock"]

WARMUP_MS, REPEAT_MS = 5, 20  # of the call itself; clearing the cache takes longer

# Seconds of a call, as lower quartile, median and upper quartile, how often it ran, and of its captured graph ("graph").
Clock = Callable[[Callable[[], Any], bool], dict[str, float]]


def triton_clock(call: Callable[[], Any], captured: bool) -> dict[str, float]:
    """Times of a call by do_bench; with `captured` also the median of its CUDA graph: the time without the host's part.

    A call that cannot be captured (it waits for the GPU) has no "graph", and the reason is printed.
    """
    from triton.testing import do_bench

    times = do_bench(call, warmup=WARMUP_MS, rep=REPEAT_MS, return_mode="all")
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, median, high = torch.tensor(times, dtype=torch.float64).quantile(quartiles).tolist()
    seconds = {"low": low / 1e3, "median": median / 1e3, "high": high / 1e3, "rounds": len(times)}
    if captured:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError as error:
            print(f"no graph: {str(error).splitlines()[0]}")
            return seconds
        seconds["graph"] = do_bench(graph.replay, warmup=WARMUP_MS, rep=REPEAT_MS, return_mode="median") / 1e3
    return seconds
