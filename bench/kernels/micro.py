"""The microbenchmarks: every point is checked, then timed forward, backward and both ways by a clock that is given.

`micro_benchmark.py` gives a CPU's points pytest-benchmark's clock, `bench/gpu.py` a GPU's points that of `gpu_clock.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from .checked import WAYS, CannotRun, WrongResult
from .costs import copy_bandwidth, copy_of, launches, row, taken_by_auto, timed
from .gpu_clock import Clock, triton_clock
from .points import Point
from .work import work

__all__ = ["Rows", "microbenchmarks"]

Rows = list[dict[str, Any]]


def microbenchmarks(
    points: list[Point], device: str, clock: Clock = triton_clock, keep: Callable[[Rows], None] = lambda rows: None
) -> tuple[Rows, list[str], list[str]]:
    """Rows of micro.csv, what was wrong and what was skipped, a line each. A point that is wrong has no row.

    `keep` gets the rows of each point as soon as they are there, so that they survive an interruption.
    """
    rows: Rows = []
    wrong, skipped = [], []
    if device == "cuda":
        from ept_kernels.common.triton_launch import Counters

        Counters.RESERVE = 2 * len(points)  # a capture beyond it would hold a memset beside the launch
    bandwidth = copy_bandwidth(device)
    for point in tqdm(points, desc="microbenchmarks", unit="point"):
        try:
            of_point = _rows(point, device, clock, bandwidth)
        except WrongResult as fault:
            wrong.append(f"{point}: {fault}")
        except CannotRun as reason:
            skipped.append(f"{point}: {reason}")
        else:
            rows += of_point
            keep(of_point)
    return rows, wrong, skipped


def _rows(point: Point, device: str, clock: Clock, bandwidth: float) -> Rows:
    """The checked point's rows, one for each way.

    The graph of the backward is that of both ways less the forward's: autograd runs a backward on the stream of its
    forward, which a capture on another stream may not touch.
    """
    checked = work(point, device)
    error = checked.check()
    rows: Rows = []
    graphs: dict[str, float] = {}
    for way in WAYS:
        times: dict[str, Any] = clock(checked.call(way), device == "cuda" and way != "backward")
        if "graph" in times:
            graphs[way] = times.pop("graph")
        rows.append(timed(row(point, way, error, launches(point, way, checked, device), bandwidth), **times))
    if {"forward", "both"} <= graphs.keys():
        graphs["backward"] = graphs["both"] - graphs["forward"]
        rows = [of_way | {"graph_ms": 1e3 * graphs[of_way["way"]]} for of_way in rows]
    if point.impl == "auto":
        for of_way in rows if device == "cuda" else []:
            copied = clock(copy_of(of_way["bytes_predicted"], device), True)
            of_way["copy_of_as_much_ms"] = 1e3 * copied["graph"]
        eager = work(dataclasses.replace(point, impl="torch"), device)
        rows = [of_way | {"ran": taken_by_auto(checked, eager, device)} for of_way in rows]
    return rows
