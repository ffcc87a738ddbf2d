"""The microbenchmarks on a CPU, by pytest-benchmark: `make bench` runs this file and makes a table of its JSON.

A point whose results are wrong fails here and has no time; one that cannot run is skipped with the reason.
"""

import functools
import os
import time

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .checked import WAYS, CannotRun, Work
from .costs import copy_bandwidth, launches, row
from .points import Point, named
from .work import work

SECONDS = 0.07  # for a point, at most
FEWEST, MOST = 5, 30  # rounds
NAMED = "EPT_BENCH_POINTS"  # environment variable: only points whose name holds this


@pytest.fixture(scope="session")
def bandwidth(pytestconfig: pytest.Config) -> float:
    timer = str(pytestconfig.getoption("benchmark_timer"))  # "time.perf_counter" or "time.process_time"
    return copy_bandwidth("cpu", getattr(time, timer.removeprefix("time.")))


@pytest.fixture(scope="session", autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("point", named("cpu", os.environ.get(NAMED, "")), ids=str)
def test_micro(point: Point, way: str, bandwidth: float, benchmark: BenchmarkFixture) -> None:
    try:
        of_point, error = checked(point)
    except CannotRun as reason:
        pytest.skip(str(reason))
    call = of_point.call(way)
    call()
    started = time.perf_counter()
    call()
    rounds = round(SECONDS / (time.perf_counter() - started))
    benchmark.extra_info = row(point, way, error, launches(point, way, of_point, "cpu"), bandwidth)
    benchmark.pedantic(call, rounds=min(MOST, max(FEWEST, rounds)), warmup_rounds=1)


@functools.lru_cache(maxsize=1)  # the three ways of a point come one after another
def checked(point: Point) -> tuple[Work, float]:
    """A point's work, and its error over what is allowed."""
    of_point = work(point, "cpu")
    return of_point, of_point.check()
