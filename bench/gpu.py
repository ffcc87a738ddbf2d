"""The clock of the microbenchmarks on a GPU: Triton's do_bench, with a cold L2 cache before every run.

The second column, `graph`, is a replay of one captured CUDA graph: the time without what the host needs to launch. The
backward of a graph is that of both ways less the forward's, because autograd runs a backward on the stream of its
forward, which a capture on another stream may not touch.
"""

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from tqdm import tqdm

from . import micro

__all__ = ["Clock", "microbenchmarks", "triton_clock"]

WARMUP_MS, REPEAT_MS = 5, 10  # of the call itself; clearing the cache takes longer
MOST_COMPILERS = 16  # processes, each with a context of its own on the GPU

# Seconds of a call, as lower quartile, median and upper quartile, how often it ran, and of its captured graph.
Clock = Callable[[Callable[[], Any], bool], dict[str, float]]


def triton_clock(call: Callable[[], Any], captured: bool) -> dict[str, float]:
    """Times of a call by do_bench; with `captured` also the median of its CUDA graph ("graph")."""
    from triton.testing import do_bench

    times = do_bench(call, warmup=WARMUP_MS, rep=REPEAT_MS, return_mode="all")
    low, median, high = (
        torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    )
    found = {"low": low / 1e3, "median": median / 1e3, "high": high / 1e3, "rounds": len(times)}
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        found["graph"] = do_bench(graph.replay, warmup=WARMUP_MS, rep=REPEAT_MS, return_mode="median") / 1e3
    return found


def _compile(point: micro.Point) -> None:
    """Leaves the point's kernels in Triton's cache on disk; what is wrong with it is said when it is timed."""
    with contextlib.suppress(micro.WrongResult, micro.CannotRun):
        micro.work(point, "cuda").check()


def compile_ahead(points: list[micro.Point]) -> None:
    """Compiles the kernels of the points on all cores: one after another they would take longer than all timing."""
    ours = [point for point in points if point.impl == "triton"]
    workers = min(len(ours), os.cpu_count() or 1, MOST_COMPILERS)
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            list(tqdm(pool.map(_compile, ours), total=len(ours), desc="compiling", unit="point"))


def microbenchmarks(
    points: list[micro.Point], device: str, clock: Clock = triton_clock
) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Rows of micro.csv, what was wrong and what was skipped, a line each. A point that is wrong has no row."""
    rows, wrong, skipped = [], [], []
    if device == "cuda":
        from ept_kernels.common.triton_launch import Counters

        Counters.RESERVE = 2 * len(points)  # a capture beyond it would hold a memset beside the launch
        compile_ahead(points)
    bandwidth = micro.copy_bandwidth(device)
    for point in tqdm(points, desc="microbenchmarks", unit="point"):
        try:
            work = micro.work(point, device)
            error = work.check()
        except micro.WrongResult as fault:
            wrong.append(f"{point}: {fault}")
            continue
        except micro.CannotRun as reason:
            skipped.append(f"{point}: {reason}")
            continue
        graphs: dict[str, float] = {}
        for way in micro.WAYS:
            row = micro.row(point, way, error, micro.launches(point, way, work, device), bandwidth)
            times: dict[str, Any] = clock(work.call(way), device == "cuda" and way != "backward")
            if "graph" in times:
                graphs[way] = times.pop("graph")
            rows.append(micro.timed(row, **times))
        if graphs:
            graphs["backward"] = graphs["both"] - graphs["forward"]
            for row in rows[-len(micro.WAYS) :]:
                row["graph_ms"] = 1e3 * graphs[row["way"]]
    return rows, wrong, skipped
