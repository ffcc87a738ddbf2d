"""What `make bench-gpu` runs within eight minutes on one GPU, and the short table at its end.

First the kernels of all parts are compiled on all cores. Then each part runs in a process of its own, which is ended
when its time is over; what it has measured by then stands in the tables. Needs neither PEFT nor anything to download.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ept.machine import describe

from .kernels.gpu_clock import triton_clock
from .kernels.micro import Rows, microbenchmarks
from .kernels.points import Point, points, points_of_presets
from .kernels.work import work
from .quiet import quiet
from .steps.decoding import NEW_TOKENS, decoding
from .steps.inference import mixed
from .steps.methods import PROMPT_TUNING, build, is_here
from .steps.shapes import GPU_SHAPES, SMALL_SHAPES, Shape, backbone, batch_of
from .steps.step import training_step
from .steps.training import PRESETS, captured_training, training
from .tables import records
from .tables.short import short_table

__all__ = ["PARTS", "on_gpu"]

METHODS = (*PRESETS, PROMPT_TUNING, "LoRA")
ADAPTERS = (8, 32)
MOST_COMPILERS = 16  # processes, each with a context of its own on the GPU
COMPILING_SECONDS = 110


@dataclasses.dataclass(frozen=True)
class Run:
    """Where and on what a run measures; `small` takes tiny shapes, to try the script out."""

    device: str
    small: bool
    directory: Path
    machine: dict[str, Any]

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return SMALL_SHAPES if self.small else GPU_SHAPES

    def keep(self, table: str, rows: Rows) -> None:
        """Writes the rows at once, so that they survive whatever comes."""
        if rows:
            records.update(self.directory / f"{table}.csv", [row | self.machine for row in rows])

    def many_rows(self, shape: Shape) -> Shape:
        """The shape with a row for each of 32 adapters, of short texts."""
        return dataclasses.replace(shape, batch=32, length=min(shape.length, 128))


# ---------------------------------------------------------------------- parts


def _stems(run: Run) -> int:
    return _micro(run, points_of_presets(run.small))


def _sweep(run: Run) -> int:
    return _micro(run, points(run.device))


def _micro(run: Run, chosen: list[Point]) -> int:
    """Times the points. Returns 1 if a result was wrong."""
    clock = triton_clock if run.device == "cuda" else _wall_clock
    _, wrong, skipped = microbenchmarks(chosen, run.device, clock, lambda rows: run.keep("micro", rows))
    for line in wrong + skipped:
        print(line)
    return int(bool(wrong))


def _wall_clock(call: Callable[[], Any], captured: bool) -> dict[str, float]:
    """Three rounds on the wall; nothing is captured on a CPU."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    low, median, high = sorted(seconds)
    return {"low": low, "median": median, "high": high, "rounds": 3}


def _steps(run: Run, shape: Shape) -> int:
    for method in METHODS:
        if not is_here(method):
            print(f"{shape.name}: {method} is left out, PEFT is not installed")
    for rows, ratios in training(shape, run.device, shape.rounds, methods=METHODS):
        run.keep("end_to_end", rows)
        run.keep("ratios", ratios)
    for rows, ratios, reason in captured_training(shape, run.device, shape.rounds):
        run.keep("end_to_end", rows)
        run.keep("ratios", ratios)
        if reason is not None:
            print(f"{shape.name}: {reason}")
    return 0


def _mixed(run: Run) -> int:
    for shape in (run.shapes[0], run.shapes[-1]):
        for preset in PRESETS:
            run.keep("ratios", mixed(run.many_rows(shape), run.device, shape.rounds, counts=ADAPTERS, preset=preset))
    return 0


def _decoding(run: Run) -> int:
    new_tokens = 3 if run.small else NEW_TOKENS
    for rows, ratios in decoding(run.many_rows(run.shapes[-1]), run.device, 3, new_tokens=new_tokens):
        run.keep("decoding", rows)
        run.keep("ratios", ratios)
    return 0


# Part -> its function, and the seconds that it has at most. "steps" is a part for each shape.
PARTS: dict[str, tuple[Callable[..., int], int]] = {
    "stems": (_stems, 70),
    "steps": (_steps, 75),
    "mixed": (_mixed, 45),
    "decoding": (_decoding, 60),
    "sweep": (_sweep, 420),
}
USUAL = ("stems", "steps", "mixed", "decoding")


# ---------------------------------------------------------------------- compiling


def _compile(run: Run, kind: str, what: Any, preset: str = "") -> None:
    """Leaves the kernels of a point, or of a preset on a shape, in Triton's cache on disk."""
    quiet()
    if kind == "point":
        work(what, run.device).call("both")()
        return
    shape = run.shapes[what]
    if kind == "mixed":
        mixed(run.many_rows(shape), run.device, 3, counts=(2,), preset=preset)
    elif kind == "decoding":
        list(decoding(run.many_rows(shape), run.device, 3, new_tokens=2))
    else:
        if shape.task == "CAUSAL_LM":  # several processes share the GPU's memory
            shape = dataclasses.replace(shape, batch=shape.batch // 2)
        model, groups = build(preset, shape, backbone(shape, run.device))
        training_step(model, groups, [batch_of(shape, run.device)])()


def compile_ahead(run: Run, parts: tuple[str, ...], seconds: float) -> list[str]:
    """Compiles on all cores for so long; returns a line for each task that failed or was not done.

    One after another the kernels would take longer than all timing.
    """
    tasks: list[tuple[Any, ...]] = []
    shapes = range(len(run.shapes))
    if "steps" in parts:
        tasks += [("step", index, preset) for index in reversed(shapes) for preset in PRESETS]
    if "decoding" in parts:
        tasks.append(("decoding", shapes[-1]))
    for part, chosen in (("stems", points_of_presets(run.small)), ("sweep", points(run.device))):
        if part in parts:
            tasks += [("point", point) for point in chosen if point.impl in ("auto", "triton")]
    if "mixed" in parts:
        tasks += [("mixed", index, preset) for index in (shapes[0], shapes[-1]) for preset in PRESETS]

    def words(kind: str, what: Any, *preset: str) -> str:
        return " ".join([kind, run.shapes[what].name if isinstance(what, int) else str(what), *preset])

    pool = ProcessPoolExecutor(min(os.cpu_count() or 1, MOST_COMPILERS), mp_context=get_context("spawn"))
    waiting = {pool.submit(_compile, run, *task): task for task in tasks}
    lines = []
    try:
        for future in as_completed(list(waiting), timeout=seconds):
            task, error = waiting.pop(future), future.exception()
            if error is not None:
                lines.append(f"compiling {words(*task)}: {type(error).__name__}: {str(error).splitlines()[0]}")
    except TimeoutError:
        lines += [f"compiling {words(*task)}: not done in {seconds:.0f} s" for task in waiting.values()]
    processes = list(pool._processes.values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()
    return lines


# ---------------------------------------------------------------------- the run


def on_gpu(options: argparse.Namespace) -> int:
    """Every part, and the short table. ValueError without a GPU. Returns 1 if a result was wrong or a part failed.

    On a CPU, where the script is only tried out, the parts run in this process.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("no GPU here: `make bench` measures on the CPU")
    started, machine = time.monotonic(), describe() | {"clock": "wall"}
    directory = options.output_dir or records.directory(machine["device"])
    run = Run(options.device, options.small, directory, machine)
    parts = tuple(options.parts or USUAL)
    if parts == USUAL:
        for table in records.TABLES:
            (directory / f"{table}.csv").unlink(missing_ok=True)

    def tell(line: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {line}", flush=True)

    def left() -> float:
        return 60 * options.minutes - (time.monotonic() - started)

    if run.device == "cuda":
        for line in [*compile_ahead(run, parts, min(COMPILING_SECONDS, left() / 3)), "compiled"]:
            tell(line)
    faults = []
    for part, index in _expanded(run, parts):
        name = part if index is None else f"{part}, {run.shapes[index].name}"
        fault = _fault(run, part, index, min(PARTS[part][1], left()))
        tell(f"{name}: {fault or 'done'}")
        faults += [f"{name}: {fault}"] if fault else []
    print("\n".join(["", *short_table(directory), *faults]))
    return int(bool(faults))


def _expanded(run: Run, parts: tuple[str, ...]) -> list[tuple[str, int | None]]:
    """The parts with the shape of each: "steps" stands for one on every shape."""
    expanded: list[tuple[str, int | None]] = []
    for part in parts:
        expanded += [(part, index) for index in range(len(run.shapes))] if part == "steps" else [(part, None)]
    return expanded


def _fault(run: Run, part: str, index: int | None, seconds: float) -> str | None:
    """Runs a part for so long at most; returns what went wrong, or None."""
    if seconds <= 0:
        return "left out, the time is over"
    if run.device == "cuda":
        return limited(_run_part, (run, part, index), seconds)
    return "a result was wrong" if _code(run, part, index) else None


def limited(function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> str | None:
    """Calls a function in a process of its own, which is ended after so long; returns what went wrong, or None.

    A fault on a GPU makes everything fail that the process does there afterwards, so that no two parts share one.
    """
    process = get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return f"ended after {seconds:.0f} s"
    return f"failed (exit code {process.exitcode}): see its messages above" if process.exitcode else None


def _run_part(run: Run, part: str, index: int | None) -> None:
    """Ends the process with the part's code."""
    sys.exit(_code(run, part, index))


def _code(run: Run, part: str, index: int | None) -> int:
    """Runs a part in this process."""
    quiet()
    function = PARTS[part][0]
    return function(run) if index is None else function(run, run.shapes[index])
