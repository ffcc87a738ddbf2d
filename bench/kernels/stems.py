"""The kernels' stems: their seeded arguments, and one function for each way of computing them."""

import functools
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from ept_kernels import layer_update, prompt_embed, reconstruct_prompt
from ept_kernels.prompt_embed import traffic

from .checked import CannotRun, Case, Inputs, results
from .kernel_traffic import kernel_calls
from .points import BASE, sizes_of_stem

__all__ = ["compiled", "stem_case", "stem_function", "text_inputs", "why_no_compiler"]

VOCABULARY = 8192


@functools.lru_cache(maxsize=1)  # the implementations of one point come one after another, and share the truth
def stem_case(stem: str, sizes: traffic.Shapes, device: str, adapters: int = 0) -> Case:
    """A stem's seeded arguments, and its specification as the formula."""
    return Case(_inputs(stem, sizes, device, adapters), stem_function(stem, "reference"))


def _inputs(stem: str, x: traffic.Shapes, device: str, adapters: int = 0) -> Inputs:
    """Weights in fp32 of the sizes that a trained adapter has, E and hidden states in bf16 on a GPU, rows padded."""
    g = torch.Generator(device).manual_seed(0)

    def weight(*shape: int) -> Tensor | None:
        if 0 in shape:
            return None
        return (torch.randn(shape, generator=g, device=device) / shape[-1] ** 0.5).requires_grad_()

    if stem == "layer_update":
        hidden = torch.randn(x.batch, x.length, x.d, generator=g, device=device).to(_dtype(x)).requires_grad_()
        of_each = (adapters,) if adapters else ()
        index = (torch.arange(x.batch) % adapters).to(device) if adapters else None
        down, up = weight(*of_each, x.q, x.d), weight(*of_each, x.q, x.d)
        return dict(hidden=hidden, down=down, up=up, adapter_index=index)
    inputs = dict(
        prompt=weight(x.s, x.d), lowrank_a=weight(x.n, x.r), lowrank_b=weight(x.r, x.d),
        space_down=weight(x.k, x.h, x.d), space_up=weight(x.k, x.h, x.d), gate_weight=weight(x.k, x.d),
    )  # fmt: skip
    if stem == "reconstruct_prompt":
        return inputs
    inputs |= dict(token_down=weight(x.q, x.d), token_up=weight(x.q, x.d))
    return text_inputs(x, g, device) | inputs


def _dtype(x: traffic.Shapes) -> torch.dtype:
    return torch.bfloat16 if x.source_bytes == 2 else torch.float32


def text_inputs(x: traffic.Shapes, g: torch.Generator, device: str) -> Inputs:
    """Ids, the mask of rows that are half to wholly text, and E."""
    table = torch.randn(VOCABULARY, x.d, generator=g, device=device).to(_dtype(x))
    lengths = torch.randint(-(-x.length // 2), x.length + 1, (x.batch, 1), generator=g, device=device)
    mask = (torch.arange(x.length, device=device) < lengths).long() if x.masked else None
    ids = torch.randint(VOCABULARY, (x.batch, x.length), generator=g, device=device)
    return {"input_ids": ids, "attention_mask": mask, "embedding_weight": table}


@functools.cache
def stem_function(stem: str, impl: str) -> Callable[[Inputs], Tensor]:
    """The public function of a stem, called with one implementation."""
    if stem == "layer_update":
        return lambda inputs: layer_update(**inputs, impl=impl)
    if stem == "reconstruct_prompt":
        return lambda inputs: reconstruct_prompt(**inputs, scale=1.0, impl=impl)[0]
    return lambda inputs: prompt_embed(**inputs, scale=1.0, fusion=stem != "lowrank_update", impl=impl)


def compiled(stem: str, device: str) -> tuple[Callable[[Inputs], Tensor], tuple[int, int]]:
    """torch.compile of impl="torch" for sizes that may change, so that a sweep compiles about once; and the kernel
    calls in its code at the base, forward and backward. `CannotRun` without a compiler."""
    reason = why_no_compiler(device)
    if reason is not None:
        raise CannotRun(f"torch.compile cannot run here: {reason}")
    return _compiled(stem, device)


@functools.cache
def _compiled(stem: str, device: str) -> tuple[Callable[[Inputs], Tensor], tuple[int, int]]:
    from torch._inductor.utils import run_and_get_code

    torch._functorch.config.donated_buffer = False  # the backward is timed alone, so its graph is kept
    torch._dynamo.config.recompile_limit = 64
    eager = stem_function(stem, "torch")
    function = torch.compile(lambda inputs: eager(inputs), dynamic=True)
    base = _inputs(stem, sizes_of_stem(BASE[device], stem), device)
    _, codes = run_and_get_code(results, function, base)
    forward, backward = map(kernel_calls, codes)
    return function, (forward, backward)


def why_no_compiler(device: str) -> str | None:
    """What torch.compile lacks; None where it can run."""
    if device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        return "it needs a C++ compiler (g++ or clang++), and none is installed"
    return None
