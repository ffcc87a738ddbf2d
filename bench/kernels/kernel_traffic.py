"""Operations and bytes of the input stage and of a layer's update, forward and backward: eager torch, torch.compile and
the Triton kernels; and of the norm that a layer begins with, as eager torch computes it.

    python -m bench.kernels.kernel_traffic          # batch 32, length 256, s 60, r 30, K 4, h 8, N 256, bf16, on the CPU

Eager: every dispatched operation that is not a view, with the bytes of its inputs and outputs. torch.compile: calls of
generated and library kernels in the code that it generates (for the CPU: it generates GPU code only beside a GPU).
Ours: ept_kernels.traffic, the bytes that have to cross the memory bus; launches as the launchers make them.
"""

import collections
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ept_kernels import layer_update, prompt_embed
from ept_kernels.layer_update import traffic as layer_traffic
from ept_kernels.prompt_embed import traffic

VIEWS = {"view", "_unsafe_view", "t", "transpose", "expand", "slice", "unsqueeze", "detach", "alias", "permute", "select",
         "squeeze", "split", "_reshape_alias", "as_strided", "unbind"}  # fmt: skip
SHAPE = traffic.Shapes(batch=32, length=256, d=768, s=60, n=256, r=30, k=4, h=8, weight_bytes=2)
LAYER = layer_traffic.Shapes(batch=32, columns=256, d=768, q=4)


class OperationCounter(TorchDispatchMode):
    """Counts the operations that are no views, by name, and the bytes of their inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.operations: collections.Counter[str] = collections.Counter()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.operations[name] += 1
            touched = [t for t in tree_flatten((args, kwargs, result))[0] if isinstance(t, torch.Tensor)]
            if name == "embedding":  # reads the rows that it gathers, not the table
                touched = [touched[1], touched[2], touched[2]]
            self.bytes += sum(t.nbytes for t in touched)
        return result


def arguments(x: traffic.Shapes, dtype=torch.bfloat16, q: int = 0):
    def weight(*shape):
        return torch.randn(shape, dtype=dtype).requires_grad_()

    ids = torch.randint(1000, (x.batch, x.length))
    mask = torch.ones(x.batch, x.length, dtype=torch.int64) if x.masked else None
    weights = [weight(x.s, x.d), weight(x.n, x.r), weight(x.r, x.d)]
    weights += [weight(x.k, x.h, x.d), weight(x.k, x.h, x.d), weight(x.k, x.d)]
    return ids, mask, torch.randn(1000, x.d, dtype=dtype), *weights


def input_stage(x: traffic.Shapes, impl: str) -> tuple[Callable[..., Tensor], tuple[Any, ...], list[Tensor]]:
    """A call of prompt_embed, its arguments, and those that are trained."""
    args = arguments(x)
    return lambda *args: prompt_embed(*args, scale=1.0, impl=impl), args, list(args[3:])


def of_a_layer(x: layer_traffic.Shapes, impl: str) -> tuple[Callable[..., Tensor], tuple[Any, ...], list[Tensor]]:
    """The same of layer_update, with hidden states in bf16 and weights in fp32, which have h in them, as in a model."""
    hidden = torch.randn(x.batch, x.columns, x.d).bfloat16().requires_grad_()
    args = (hidden, torch.randn(x.q, x.d).requires_grad_(), torch.randn(x.q, x.d).requires_grad_())
    return lambda *args: layer_update(*args, impl=impl), args, list(args)


def of_a_norm(
    x: layer_traffic.Shapes, kind: type[nn.Module]
) -> tuple[Callable[..., Tensor], tuple[Any, ...], list[Tensor]]:
    """The same of a frozen norm of those hidden states."""
    hidden = torch.randn(x.batch, x.columns, x.d).bfloat16().requires_grad_()
    return kind(x.d).bfloat16().requires_grad_(False), (hidden,), [hidden]


def eager(function: Callable[..., Tensor], args: tuple[Any, ...], trained: list[Tensor]) -> list[tuple[int, int]]:
    counts = []
    with OperationCounter() as counter:
        out = function(*args)
    counts.append((counter.operations.total(), counter.bytes))
    grad = torch.randn_like(out)
    with OperationCounter() as counter:
        torch.autograd.grad(out, trained, grad)
    counts.append((counter.operations.total(), counter.bytes))
    return counts


def compiled(function: Callable[..., Tensor], args: tuple[Any, ...], trained: list[Tensor]) -> list[int]:
    from torch._inductor.utils import run_and_get_code

    fast = torch.compile(function)

    def step():
        torch.autograd.grad(fast(*args).sum(), trained)

    _, codes = run_and_get_code(step)
    return [kernel_calls(code) for code in codes]


def kernel_calls(code: str) -> int:
    """Calls of generated and library kernels in code that torch.compile generated for the CPU."""
    calls = r"^\s+(?:cpp_fused\w*|extern_kernels\.\w+|aten\.\w+\.\w+|torch\.ops\.\w+\.\w+\.\w+)\("
    return len(re.findall(calls, code, re.M))


def main():
    print(f"torch {torch.__version__}")
    stages: list[tuple[str, Any, Any, Any]] = [
        ("input", SHAPE, input_stage, traffic), ("layer", LAYER, of_a_layer, layer_traffic)
    ]  # fmt: skip
    for name, x, stage, predicted in stages:
        print(f"{name}: {x}")
        for impl in ("reference", "torch"):
            for way, (operations, size) in zip(("forward", "backward"), eager(*stage(x, impl)), strict=True):
                print(f'eager impl="{impl}" {way:8}: {operations:3} operations, {size / 1e6:6.1f} MB')
        for impl in ("reference", "torch"):
            print(f'torch.compile impl="{impl}" (forward, backward): {compiled(*stage(x, impl))} kernel calls')
        for kernel in (predicted.forward, predicted.backward):
            cost = kernel(x)
            print(f"kernels {kernel.__name__:8}: {cost.launches} launches, {cost.total / 1e6:6.1f} MB, {cost.memory}")
    for kind in (LlamaRMSNorm, nn.LayerNorm):
        for way, (operations, size) in zip(("forward", "backward"), eager(*of_a_norm(LAYER, kind)), strict=True):
            elements = LAYER.batch * LAYER.columns * LAYER.d
            print(f"eager {kind.__name__} {way:8}: {operations:3} operations, {size / elements:5.1f} bytes an element")
    x = SHAPE
    for d in (768, 4096):
        for q in (0, 24):
            y = traffic.Shapes(**{**vars(x), "d": d, "q": q, "weight_bytes": 4})
            times = [
                f"{gpu} {traffic.seconds(way(y), gpu) * 1e6:.1f} µs {way.__name__}"
                for gpu in traffic.PEAK_BANDWIDTH
                for way in (traffic.forward, traffic.backward)
            ]
            print(f"predicted, d = {d}, q = {q}, bf16 with fp32 weights: {', '.join(times)}")


if __name__ == "__main__":
    main()
