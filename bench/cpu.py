"""What `make bench` runs, one part after another, and the headline at its end."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ept.machine import describe

from .kernels.costs import timed
from .kernels.points import named
from .quiet import quiet
from .steps.by_length import BY_LENGTH, by_length
from .steps.inference import inference, mixed
from .steps.ratios import FEWEST_ROUNDS
from .steps.shapes import SHAPES, Shape
from .steps.training import training
from .tables import records

__all__ = ["CLOCKS", "on_cpu", "timed_entry"]

# On a machine that others use, the process's own time on the processor says more than the time on the wall.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def on_cpu(options: argparse.Namespace) -> int:
    """Everything on the CPU. Returns 1 if a result was wrong."""
    points, shapes = named("cpu", options.points), _shapes(options.shapes)  # a mistake in them is told before anything
    threads = options.threads or min(2, os.cpu_count() or 1)
    torch.set_num_threads(threads)
    started, machine = time.time(), describe()  # before the first table: the commit is that of what runs
    directory = options.output_dir or records.directory(machine["device"])
    headline: dict[str, Any] = machine | {"clock": options.clock}
    failed = False
    if "micro" in options.parts:
        rows, failed = _micro_on_cpu(options.points, threads, options.clock)
        records.write(directory / "micro.csv", [row | machine | {"clock": options.clock} for row in rows])
        headline["micro"] = {"timed": len(rows), "of": 3 * len(points), "wrong": failed}
    if "end_to_end" in options.parts:
        headline |= _steps(shapes, options, directory, machine)
    headline |= {"seconds": round(time.time() - started), "load": [round(x, 2) for x in os.getloadavg()]}
    print(json.dumps(headline))
    return int(failed)


def _shapes(chosen: list[str] | None) -> list[Shape]:
    """The shapes of these names, or all. ValueError if there is none of a name."""
    names = [shape.name for shape in SHAPES]
    if set(chosen or ()) - set(names):
        raise ValueError(f"--shapes {' '.join(chosen or ())}: choose among {', '.join(names)}")
    return [shape for shape in SHAPES if chosen is None or shape.name in chosen]


def _steps(
    shapes: list[Shape], options: argparse.Namespace, directory: Path, machine: dict[str, Any]
) -> dict[str, Any]:
    """Writes end_to_end.csv and ratios.csv, prints the ratios, and returns their part of the headline."""
    quiet()

    def rounds(usual: int) -> int:
        return max(FEWEST_ROUNDS, round(usual * options.rounds))

    clock, machine = CLOCKS[options.clock], machine | {"clock": options.clock}
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for shape in shapes:
        *_, (of_shape, of_pairs) = training(shape, "cpu", rounds(shape.rounds), clock)
        rows += of_shape
        ratios += of_pairs
        if shape.paper:
            ratios += inference(shape, "cpu", rounds(2 * shape.rounds), clock)
            ratios += mixed(shape, "cpu", rounds(2 * shape.rounds), clock)
        if shape.name == "MiniLM":
            ratios += by_length("cpu", rounds(BY_LENGTH.rounds), clock)
        # After each shape, so that an interrupted run leaves what it has.
        records.write(directory / "end_to_end.csv", [row | machine for row in rows])
        records.write(directory / "ratios.csv", [row | machine for row in ratios])
    return _judged(ratios)


def _judged(ratios: list[dict[str, Any]]) -> dict[str, Any]:
    """Prints the ratios, and returns those that have goals and the names of those that miss them."""
    judged: dict[str, float] = {}
    missed = []
    for row in ratios:
        name, goal = f"{row['method']} / {row['over']}, {row['shape']}", ""
        if row["goal"]:
            goal = f"goal {row['goal']:.2f} {'met' if row['met'] else 'missed'}"
            judged[name] = round(row["median"], 3)
            missed += [] if row["met"] else [name]
        print(f"{name:62}{row['median']:7.3f}  ({row['low']:.3f} … {row['high']:.3f})  {goal}")
    return {"ratios": judged, "missed": missed}


def _micro_on_cpu(part: str, threads: int, clock: str) -> tuple[list[dict[str, Any]], bool]:
    """Rows of the microbenchmarks as pytest-benchmark times them in a process of its own; whether a result was wrong."""
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "benchmark.json"
        command = [
            sys.executable, "-m", "pytest", str(root / "bench" / "kernels" / "micro_benchmark.py"), "-q", "-rfs",
            "-p", "no:cacheprovider", "--benchmark-disable-gc", "--benchmark-columns=median,iqr,rounds",
            f"--benchmark-json={result}",
            *(["--benchmark-timer=time.process_time"] if clock == "cpu" else []),
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "EPT_BENCH_POINTS": part}
        done = subprocess.run(command, env=environment, cwd=root)
        entries = json.loads(result.read_text())["benchmarks"] if result.exists() else []
    if not entries:
        raise ValueError("pytest-benchmark timed nothing: see its messages above")
    return [timed_entry(entry) for entry in entries], done.returncode != 0


def timed_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """A row of micro.csv from a benchmark in pytest-benchmark's JSON."""
    stats = entry["stats"]
    return timed(entry["extra_info"], stats["q1"], stats["median"], stats["q3"], stats["rounds"])
