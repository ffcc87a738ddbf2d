"""layer_update's kernels on the GPU of this machine: first part of `make gpu`; alone in under two minutes.

python tests/gpu_layer_update.py           # prints as it goes; the results also to $OUT/layer_update.json
python tests/gpu_layer_update.py --tune    # and what other sizes of tiles would take

1. the results at the widths that are timed, against the plain formula in float64; the same bits twice; graph capture;
2. times of captured launches beside a copy of the same bytes: everything is read from memory, because the graph goes
   through as many inputs as do not fit the L2 cache together;
3. the matrix of the interpreter's tests, on all cores.
"""

import argparse
import itertools
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from kernel_cases import covering_cases, too_far
from layer_cases import AXES, double, errors, layer_case, run

from ept_kernels import layer_update
from ept_kernels.common import triton_rows
from ept_kernels.common.triton_launch import Counters
from ept_kernels.layer_update import traffic, triton_backward, triton_forward
from ept_kernels.layer_update.arguments import Settings, Update

CASES = 60
MOST_WORKERS = 16  # processes, each with a context of its own on the GPU
# On a GPU the plain formula's fp32 products are fp32's own, the second launch's three of TF32 each.
TIMES = 4.0
UNITS = 4  # q of EPTConfig.deep()
COLD = 600e6  # bytes of the inputs that a graph goes through, ten times an L2 cache
REPLAYS = 9
# batch, columns, d: forward moves 31 MB and 252 MB
SIZES = {
    "30 MB, d = 768": (32, 320, 768),
    "30 MB, d = 4096": (4, 480, 4096),
    "250 MB, d = 768": (64, 1280, 768),
    "250 MB, d = 4096": (8, 1920, 4096),
}
CHECKED = {"d = 768": (8, 160, 768), "d = 4096": (9, 65, 4096)}


def on_gpu(case: dict) -> dict:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in case.items()}


def check_case(seed: int, axes: dict) -> dict:
    case = on_gpu(layer_case(seed, **axes))
    try:
        return errors(case, run(case, "triton"), times=TIMES)
    except Exception as error:  # the other cases go on
        return dict(raised=f"{type(error).__name__}: {error}")


def check_matrix(number: int, workers: int) -> dict:
    cases = covering_cases(0, number, AXES)[:number]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        faults = list(pool.map(check_case, range(number), cases))
    return dict(cases=number, wrong={f"{i} {cases[i]}": fault for i, fault in enumerate(faults) if fault})


def timed_case(batch: int, columns: int, d: int, adapters: int | None = None) -> dict:
    g = torch.Generator("cuda").manual_seed(0)
    stack = () if adapters is None else (adapters,)

    def draw(*shape, std):
        return torch.randn(*shape, generator=g, device="cuda") * std

    case = dict(hidden=draw(batch, columns, d, std=3.0).bfloat16(), hidden_scale=3.0)
    case |= dict(down=draw(*stack, UNITS, d, std=d**-0.5), up=draw(*stack, UNITS, d, std=0.3))
    if adapters is not None:
        case["adapter_index"] = torch.arange(batch, device="cuda") % adapters
    return case


def check_timed(size: tuple[int, int, int]) -> dict:
    """What is wrong at a size: errors, different bits, or a graph whose replay differs."""
    faults = {}
    for adapters in (None, 8):
        case = timed_case(*size, adapters)
        got, again = run(case, "triton"), run(case, "triton")
        faults |= too_far(got, run(case, "torch"), run(double(case), "torch"), times=TIMES)
        faults |= {f"{name} differs from run to run": True for name in got if not torch.equal(got[name], again[name])}
    case = timed_case(*size)
    static = {name: case[name].requires_grad_() for name in ("hidden", "down", "up")}
    grad = torch.randn_like(case["hidden"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer_update(**case | static, impl="triton")
        grads = torch.autograd.grad(out, list(static.values()), grad)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    replayed = [out.detach(), *grads]
    want = layer_update(**case | static, impl="triton")
    expected = [want.detach(), *torch.autograd.grad(want, list(static.values()), grad)]
    if not all(map(torch.equal, replayed, expected)):
        faults["replay differs"] = True
    return faults


def graph_seconds(calls: list) -> float:
    """Seconds of one of the calls, of which a graph holds all."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    seconds = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / len(calls))
    return sorted(seconds)[REPLAYS // 2]


class Inputs:
    """As many inputs of one size as do not fit the L2 cache together."""

    def __init__(self, size: tuple[int, int, int], adapters: int | None = None):
        batch, columns, d = size
        count = max(2, int(COLD // (batch * columns * d * 2 * 2)))
        self.settings = Settings(3.0)
        self.updates, self.grads, self.z = [], [], []
        for _ in range(count):
            case = timed_case(*size, adapters)
            update = Update(case["hidden"], case["down"], case["up"], case.get("adapter_index"))
            self.updates.append(update)
            self.grads.append(torch.randn_like(update.hidden))
            self.z.append(triton_forward.forward(update, self.settings, save=True).z)
        self.shapes = traffic.Shapes(batch, columns, d, UNITS, adapters=adapters or 1)

    def copy(self) -> float:
        return graph_seconds(
            [lambda g=g, u=u: g.copy_(u.hidden) for g, u in zip(self.grads, self.updates, strict=True)]
        )

    def forward(self, save: bool = True) -> float:
        return graph_seconds([lambda u=u: triton_forward.forward(u, self.settings, save) for u in self.updates])

    def backward(self, weight_grad: bool = True) -> float:
        arguments = zip(self.grads, self.updates, self.z, strict=True)
        return graph_seconds(
            [
                lambda g=g, u=u, z=z: triton_backward.backward(g, u, z, self.settings, True, weight_grad)
                for g, u, z in arguments
            ]
        )

    def eager(self) -> float:
        def call(u):
            return layer_update(u.hidden, u.down, u.up, hidden_scale=3.0, adapter_index=u.adapter_index, impl="torch")

        return graph_seconds([lambda u=u: call(u) for u in self.updates])


def times(name: str, size: tuple[int, int, int]) -> dict:
    """Microseconds at a size, and shares of the bandwidth of a copy of the same bytes as the forward's."""
    inputs = Inputs(size)
    moved, back = (model(inputs.shapes) for model in (traffic.forward, traffic.backward))
    seconds = dict(
        copy=inputs.copy(), forward=inputs.forward(), inference=inputs.forward(save=False),
        backward=inputs.backward(), backward_to_hidden=inputs.backward(weight_grad=False), eager=inputs.eager(),
    )  # fmt: skip
    bandwidth = 2 * inputs.shapes.hidden / seconds["copy"]
    row = {f"{key}_us": round(1e6 * value, 2) for key, value in seconds.items()}
    row |= dict(
        copy_tb_per_s=round(bandwidth / 1e12, 3),
        forward_share=round(moved.total / seconds["forward"] / bandwidth, 3),
        backward_share=round(back.total / seconds["backward"] / bandwidth, 3),
    )
    for adapters in (8, 32):
        row[f"forward_{adapters}_adapters_us"] = round(1e6 * Inputs(size, adapters).forward(save=False), 2)
    return row


def tune(name: str, size: tuple[int, int, int]) -> dict:
    """Microseconds with other sizes of tiles than the kernels take."""
    inputs, rows = Inputs(size), {}
    kept = triton_rows.PER_THREAD, triton_rows.warps_of
    for numbers, warps in itertools.product((16, 32, 64), (2, 4, 8, 16)):
        triton_rows.PER_THREAD, triton_rows.warps_of = numbers, lambda tile_d, warps=warps: warps
        triton_forward.warps_of = triton_rows.warps_of
        if numbers * 32 * warps < triton_forward.power_of_two(size[2]):
            continue
        row = (inputs.forward(), inputs.backward(weight_grad=False))
        key = f"{numbers} per thread, {warps} warps"
        rows[key] = [round(1e6 * x, 2) for x in row]
        print(name, key, rows[key], flush=True)
    triton_rows.PER_THREAD, triton_rows.warps_of = kept
    triton_forward.warps_of = triton_rows.warps_of
    names = ("TOKEN_TILE", "COLUMN_TILE", "STEPS", "MOST_SHARES")
    kept = [getattr(triton_backward, constant) for constant in names]
    for values in (
        (16, 64, 8, 64),
        (32, 64, 4, 64),
        (16, 128, 8, 64),
        (32, 128, 4, 64),
        (16, 64, 4, 128),
        (16, 64, 16, 32),
    ):
        for constant, value in zip(names, values, strict=True):
            setattr(triton_backward, constant, value)
        key = ", ".join(f"{constant} {value}" for constant, value in zip(names, values, strict=True))
        rows[key] = round(1e6 * inputs.backward(), 2)
        print(name, key, rows[key], flush=True)
    for constant, value in zip(names, kept, strict=True):
        setattr(triton_backward, constant, value)
    return rows


def check(cases: int = CASES, workers: int = MOST_WORKERS, tuned: bool = False) -> dict:
    """Everything, printed as it comes and returned."""
    Counters.RESERVE = 1024  # captured launches; beyond it a memset would stand beside each
    result = dict(device=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__)
    result["wrong"] = {name: faults for name, size in CHECKED.items() if (faults := check_timed(size))}
    print("wrong at the widths that are timed:", result["wrong"] or "nothing", flush=True)
    result["times"] = {}
    for name, size in SIZES.items():
        result["times"][name] = times(name, size)
        print(name, result["times"][name], flush=True)
        _save(result)
    if tuned:
        result["tuned"] = {name: tune(name, size) for name, size in SIZES.items()}
        _save(result)
    result["matrix"] = check_matrix(cases, min(workers, os.cpu_count() or 1))
    print("matrix:", json.dumps(result["matrix"], indent=1), flush=True)
    _save(result)
    return result


def _save(result: dict) -> None:
    if "OUT" in os.environ:
        Path(os.environ["OUT"], "layer_update.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--cases", type=int, default=CASES)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here")
    outcome = check(options.cases, tuned=options.tune)
    sys.exit(bool(outcome["wrong"] or outcome["matrix"]["wrong"]))
