"""What an eager call of each stem costs on the host, on a CPU: checks, autograd, allocation, and handing over a launch.

    python -m bench.kernels.host [--against DIRECTORY] [--rounds 5] [--output FILE]

A Triton driver stands in for a GPU's: kernels are compiled for sm_90, and their launcher does nothing. What is known of a
GPU after the first call (that Triton runs there) is taken as known; values of ids and indices are looked at, as on a CPU.
Backward is `torch.autograd.grad`; stacks and columns have none. The floor is an autograd function that allocates as many
results and keeps as many tensors.

Figures are microseconds of the thread's CPU time, the least mean of 20 calls among all rounds: what other processes
take does not count. `--against` measures the `ept_kernels` of another checkout in turn, in processes of its own; what an
older one does not have is left out. `--output` keeps the figures as JSON, with machine, versions and commits.
"""

import argparse
import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__: list[str] = []

ROOT = Path(__file__).parents[2]
CALLS, BATCHES = 20, 60
BATCH, LENGTH, D, VOCAB = 2, 16, 64, 100  # small: the CPU's allocator takes longer for large tensors, a GPU's does not
S, N, R, K, H, Q, ADAPTERS = 4, 32, 8, 4, 2, 4, 8


class Launcher:
    """A kernel's launcher that launches nothing."""

    def __init__(self, source: Any, metadata: Any):
        pass

    def __call__(self, *args: Any) -> None:
        pass


def stand_in() -> Any:
    """A Triton driver of an H100 that is not there."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Utils:
        @staticmethod
        def get_device_properties(device: str) -> dict[str, int]:
            return {"max_shared_mem": 228 << 10, "warpSize": 32, "multiprocessor_count": 132, "max_num_regs": 65536}

        @staticmethod
        def load_binary(name: str, binary: bytes, shared: int, device: str) -> tuple[Any, ...]:
            return None, None, 0, 0, 1024

    class Driver(DriverBase):
        launcher_cls, utils = Launcher, Utils()

        def __init__(self) -> None:
            pass

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_current_device(self) -> str:
            return "none"

        def get_current_stream(self, device: str) -> int:
            return 0

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("nothing runs here")

    return Driver()


def weight(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def cases() -> Iterator[tuple[str, Callable[[], Any], list[Tensor]]]:
    """Name, call, and the tensors whose gradients are asked for; those of this checkout's `ept_kernels`, if it is older."""
    import ept_kernels
    from ept_kernels import layer_update, prompt_embed

    ids, mask = torch.randint(VOCAB, (BATCH, LENGTH)), torch.ones(BATCH, LENGTH, dtype=torch.int64)
    table = torch.randn(VOCAB, D).bfloat16()
    pair, tokens = [weight(S, D), weight(N, R), weight(R, D)], [weight(Q, D), weight(Q, D)]
    spaces = [weight(K, H, D), weight(K, H, D), weight(K, D)]
    hidden = torch.randn(BATCH, LENGTH, D).bfloat16().requires_grad_()
    stack, index = [weight(ADAPTERS, Q, D), weight(ADAPTERS, Q, D)], torch.zeros(BATCH, dtype=torch.int64)

    def embed(weights: list[Tensor], named: list[Tensor]) -> Callable[[], Tensor]:
        arguments: list[Any] = [*weights, *[None] * (6 - len(weights))]
        others: dict[str, Any] = dict(zip(("token_down", "token_up"), named, strict=False))
        return lambda: prompt_embed(ids, mask, table, *arguments, scale=1.0, impl="triton", **others)

    yield "prompt_embed, low-rank update", embed(pair, []), pair
    yield "prompt_embed, default preset", embed(pair[:1], tokens), [pair[0], *tokens]
    yield "prompt_embed, all parts", embed([*pair, *spaces], tokens), [*pair, *spaces, *tokens]
    yield "layer_update", lambda: layer_update(hidden, *tokens, hidden_scale=2.0, impl="triton"), [hidden, *tokens]
    yield (
        "layer_update, adapter_index",
        lambda: layer_update(hidden, *stack, hidden_scale=2.0, adapter_index=index, impl="triton"),
        [hidden, *stack],
    )
    if not hasattr(ept_kernels, "prompt_columns"):
        return  # older than stacks of adapters, too
    constants: list[Any] = [*(torch.randn(ADAPTERS, *t.shape) for t in pair), None, None, None]
    of_rows: dict[str, Any] = dict(
        token_down=stack[0].detach(), token_up=stack[1].detach(), adapter_index=index, impl="triton"
    )
    yield "prompt_embed, adapter_index", lambda: prompt_embed(ids, mask, table, *constants, scale=1.0, **of_rows), []
    columns = ept_kernels.prompt_columns
    yield "prompt_columns, labels", lambda: columns(mask, S, labels=ids, impl="triton"), []


def floor(weights: list[Tensor], results: int, out: Tensor) -> Callable[[], Tensor]:
    """An autograd function of these tensors that allocates `results` tensors beside its result and computes nothing."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Tensor:
            kept = [torch.empty_strided((4, 4), (4, 1)) for _ in range(results)]
            ctx.save_for_backward(*tensors, *kept)
            return torch.empty_like(out)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return tuple(torch.empty_like(t) for t in ctx.saved_tensors[: len(weights)])

    return lambda: Nothing.apply(*weights)


def microseconds(call: Callable[[], Any]) -> float:
    for _ in range(CALLS):
        call()
    best = float("inf")
    for _ in range(BATCHES):
        started = time.thread_time()
        for _ in range(CALLS):
            call()
        best = min(best, time.thread_time() - started)
    return best / CALLS * 1e6


def both_ways(call: Callable[[], Any], leaves: list[Tensor]) -> list[float]:
    if not leaves:
        return [microseconds(call)]
    out = call()
    grad = torch.zeros_like(out)
    return [microseconds(call), microseconds(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))]


def measure() -> dict[str, list[float]]:
    """Microseconds forward and backward of each case, in this process."""
    import triton

    torch.set_num_threads(1)
    triton.runtime.driver.set_active(stand_in())
    for package in pkgutil.iter_modules(importlib.import_module("ept_kernels").__path__, "ept_kernels."):
        if package.ispkg and importlib.util.find_spec(f"{package.name}.api"):
            importlib.import_module(f"{package.name}.api").resolve = lambda impl, device: impl  # type: ignore[attr-defined]
    rows = {}
    for name, call, leaves in cases():
        rows[name] = both_ways(call, leaves)
        if leaves:
            saved = len(call().grad_fn.saved_tensors)
            rows[f"{name}: floor"] = both_ways(floor(leaves, max(0, saved - len(leaves)), call()), leaves)
    return rows


def in_process_of_its_own(tree: Path) -> dict[str, list[float]]:
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--measure"]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # what the process of a round is told
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure()))
        return
    trees = [ROOT, *([args.against.resolve()] if args.against else [])]
    if args.output:
        from ept.machine import commit, describe  # not where a round runs: it sees `ept_kernels` alone

        # Before the first round: the commits are those of what runs.
        machine, commits = describe() | {"threads": 1}, [commit(tree) for tree in trees]
    best: list[dict[str, list[float]]] = [{} for _ in trees]
    for _ in range(args.rounds):
        for tree, kept in zip(trees, best, strict=True):
            for name, pair in in_process_of_its_own(tree).items():
                before = kept.setdefault(name, [float("inf")] * len(pair))
                kept[name] = [min(one, other) for one, other in zip(before, pair, strict=True)]
    print(f"{'µs, forward and backward':40}" + "".join(f"{str(tree)[-24:]:>26}" for tree in trees))
    for name in best[0]:
        ways = ([*kept.get(name, []), None, None][:2] for kept in best)
        print(f"{name:40}" + "".join(f"{_cell(forward):>18}{_cell(backward):>8}" for forward, backward in ways))
    if args.output:
        run = {"command": "python -m bench.kernels.host --against " + " ".join(commits[1:]), "rounds": args.rounds}
        figures = {"microseconds": dict(zip(commits, best, strict=True))}
        args.output.write_text(json.dumps(machine | run | figures, indent=1) + "\n")


def _cell(microseconds: float | None) -> str:
    return "" if microseconds is None else f"{microseconds:.1f}"


if __name__ == "__main__":
    main()
