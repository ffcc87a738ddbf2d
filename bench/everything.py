"""What `make bench` and `make bench-gpu` run, one part after another, and the headline at their end."""

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

from . import end_to_end, micro, records
from .fit import quiet

__all__ = ["CLOCKS", "on_cpu", "on_gpu"]

# On a machine that others use, the process's own time on the processor says more than the time on the wall.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def on_cpu(options: argparse.Namespace) -> int:
    """Everything on the CPU. Returns 1 if a result was wrong."""
    threads = options.threads or min(2, os.cpu_count() or 1)
    torch.set_num_threads(threads)
    started, machine = time.time(), describe()  # before the first table: the commit is that of what runs
    directory = options.output_dir or records.directory(machine["device"])
    headline: dict[str, Any] = machine | {"clock": options.clock}
    failed = False
    if "micro" in options.parts:
        points = micro.named("cpu", options.points)
        rows, failed = _micro_on_cpu(options.points, threads, options.clock)
        records.write(directory / "micro.csv", [row | machine | {"clock": options.clock} for row in rows])
        headline["micro"] = {"timed": len(rows), "of": 3 * len(points), "wrong": failed}
    if "end_to_end" in options.parts:
        headline |= _end_to_end("cpu", options, directory, machine)
    headline |= {"seconds": round(time.time() - started), "load": [round(x, 2) for x in os.getloadavg()]}
    print(json.dumps(headline))
    return int(failed)


def _end_to_end(device: str, options: argparse.Namespace, directory: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """Writes end_to_end.csv and ratios.csv, prints the ratios, and returns their part of the headline."""
    quiet()
    known = [shape.name for shape in end_to_end.SHAPES]
    chosen = options.shapes or known
    if set(chosen) - set(known):
        raise ValueError(f"--shapes {' '.join(chosen)}: choose among {', '.join(known)}")

    def rounds(usual: int) -> int:
        return max(end_to_end.FEWEST_ROUNDS, round(usual * options.rounds))

    clock, machine = CLOCKS[options.clock], machine | {"clock": options.clock}
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for shape in end_to_end.SHAPES:
        if shape.name not in chosen:
            continue
        of_shape, of_pairs = end_to_end.training(shape, device, rounds(shape.rounds), clock)
        rows += of_shape
        ratios += of_pairs
        if shape.paper:
            ratios += end_to_end.inference(shape, device, rounds(2 * shape.rounds), clock)
            ratios += end_to_end.mixed(shape, device, rounds(2 * shape.rounds), clock)
        if shape.name == "MiniLM":
            ratios += end_to_end.by_length(device, rounds(end_to_end.BY_LENGTH.rounds), clock)
        # After each shape, so that an interrupted run leaves what it has.
        records.write(directory / "end_to_end.csv", [row | machine for row in rows])
        records.write(directory / "ratios.csv", [row | machine for row in ratios])
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
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "benchmark.json"
        command = [
            sys.executable, "-m", "pytest", str(Path(micro.__file__).with_name("micro_benchmark.py")), "-q", "-rfs",
            "-p", "no:cacheprovider", "--benchmark-disable-gc", "--benchmark-columns=median,iqr,rounds",
            f"--benchmark-json={result}",
            *(["--benchmark-timer=time.process_time"] if clock == "cpu" else []),
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "EPT_BENCH_POINTS": part}
        done = subprocess.run(command, env=environment, cwd=Path(micro.__file__).parents[1])
        entries = json.loads(result.read_text())["benchmarks"] if result.exists() else []
    if not entries:
        raise ValueError("pytest-benchmark timed nothing: see its messages above")
    return [timed_entry(entry) for entry in entries], done.returncode != 0


def timed_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """A row of micro.csv from a benchmark in pytest-benchmark's JSON."""
    stats = entry["stats"]
    return micro.timed(entry["extra_info"], stats["q1"], stats["median"], stats["q3"], stats["rounds"])


def on_gpu(options: argparse.Namespace) -> int:
    """Everything on the GPU. ValueError without one. Returns 1 if a result was wrong."""
    if not torch.cuda.is_available():
        raise ValueError("no GPU here: `make bench` measures on the CPU")
    from .gpu import microbenchmarks

    started, machine = time.time(), describe()
    directory = options.output_dir or records.directory(machine["device"])
    headline: dict[str, Any] = dict(machine)
    wrong: list[str] = []
    if "micro" in options.parts:
        points = micro.named("cuda", options.points)
        rows, wrong, skipped = microbenchmarks(points, "cuda")
        for line in wrong + skipped:
            print(line)
        records.write(directory / "micro.csv", [row | machine for row in rows])
        headline["micro"] = {"timed": len(rows), "of": 3 * len(points), "wrong": bool(wrong)}
    if "end_to_end" in options.parts:
        headline |= _end_to_end("cuda", options, directory, machine)
    headline |= {"seconds": round(time.time() - started)}
    print(json.dumps(headline))
    return int(bool(wrong))
