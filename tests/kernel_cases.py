"""Cases for the Triton kernels, the checks that every run of one has to pass, and fenced, poisoned buffers."""

import contextlib
import itertools
import os
import random

import numpy as np
import pytest
import torch
from test_prompt_embed import PARTS, double, make_case

from ept_kernels import ACTIVATIONS, prompt_embed, prompt_embed_inputs

SHAPES = {
    "one": dict(s=1, n=1, r=1, k=1, h=1, q=1, d=8, length=1, batch=1),
    "odd": dict(s=5, n=21, r=3, k=3, h=2, q=5, d=33, length=37, batch=3),
    "no text": dict(s=17, n=20, r=6, k=2, h=3, q=2, d=40, length=0, batch=2),
    "tiles": dict(s=17, n=34, r=17, k=5, h=7, q=18, d=68, length=18, batch=3),
    "long": dict(s=16, n=16, r=16, k=4, h=4, q=16, d=32, length=34, batch=9),
}
SWITCHES = {"on": {}, "no update": dict(lowrank_update=False), "no fusion": dict(fusion=False)}


def mask_of(kind: str, batch: int, length: int, g: torch.Generator) -> torch.Tensor | None:
    """Padding on the left or on the right, holes, everything padded in one row; None for no mask."""
    if kind == "none":
        return None
    real = torch.randint(length + 1, (batch, 1), generator=g)
    real[0] = 0  # a row of nothing but padding
    columns = torch.arange(length).expand(batch, -1)
    masks = dict(left=columns >= length - real, right=columns < real)
    mask = masks[kind] if kind in masks else torch.rand(batch, length, generator=g) > 0.3
    return mask.to([torch.bool, torch.int64, torch.int32][length % 3])


MASKS = ("none", "left", "right", "holes")


def kernel_case(seed, *, shape, dtype, source_dtype, parts, mask, start, activation, switch, inputs, e, sizes=None):
    """Keyword arguments of prompt_embed or, with `inputs`, of prompt_embed_inputs. `sizes` in place of a named shape."""
    sizes = sizes or SHAPES[shape]
    case = make_case(seed, parts=parts, dtype=dtype, e=e, **sizes)
    g = torch.Generator().manual_seed(seed)
    case["attention_mask"] = mask_of(mask, sizes["batch"], sizes["length"], g)
    embeddings = case["embedding_weight"] = case["embedding_weight"].to(source_dtype)
    if inputs:
        case["inputs_embeds"] = embeddings[case.pop("input_ids")]
        del case["embedding_weight"]
    else:
        case["input_ids"] = case["input_ids"].to([torch.int64, torch.int32][seed % 2])
    by_row = torch.randint(
        sizes["length"] + 1, (sizes["batch"],), generator=g, dtype=[torch.int64, torch.int32][seed % 2]
    )
    where = {"first": 0, "second": min(1, sizes["length"]), "last": sizes["length"], "by row": by_row}[start]
    return case | SWITCHES[switch] | dict(activation=activation, prompt_start=where)


# dtype of the trained tensors, dtype of E. The second row is the main case in a form that the interpreter rounds right.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float32),
]
AXES = dict(
    shape=tuple(SHAPES), dtypes=DTYPES, parts=tuple(PARTS), mask=MASKS, start=("first", "second", "last", "by row"),
    activation=ACTIVATIONS, switch=tuple(SWITCHES), inputs=(False, True), e=(1.0, 0.055),
)  # fmt: skip


def matrix(cases, short):
    """Pytest's parameters (seed, axes), those from `short` on in the long form alone; EPT_SHARD says which part runs here."""
    shard, shards = map(int, os.environ.get("EPT_SHARD", "0/1").split("/"))
    return [
        pytest.param(seed, axes, id=label(axes), marks=[] if seed < short else [pytest.mark.full])
        for seed, axes in enumerate(cases)
        if seed % shards == shard
    ]


def label(case):
    return "-".join(str(value).removeprefix("torch.").replace(" ", "_") for value in case.values())


def covering_cases(strength_seed: int, at_least: int, axes: dict[str, tuple] = AXES) -> list[dict]:
    """Cases in which every pair of values of two axes occurs, then random ones until there are `at_least`."""
    rng = random.Random(strength_seed)
    pairs = {
        ((x, a), (y, b))
        for x, y in itertools.combinations(axes, 2)
        for a in range(len(axes[x]))
        for b in range(len(axes[y]))
    }
    chosen = []
    while pairs or len(chosen) < at_least:
        candidates = [{axis: rng.randrange(len(values)) for axis, values in axes.items()} for _ in range(30)]
        news = [{p for p in itertools.combinations(c.items(), 2) if p in pairs} for c in candidates]
        best = max(range(len(candidates)), key=lambda i: len(news[i]))
        pairs -= news[best]
        chosen.append({axis: axes[axis][i] for axis, i in candidates[best].items()})
    for case in chosen:
        case["dtype"], case["source_dtype"] = case.pop("dtypes")
    return chosen


def run(case: dict, impl: str, grad_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The result and the gradient of every trained tensor (and of inputs_embeds) for a random gradient of the result.

    That one is rounded to `grad_dtype`, so that runs in different dtypes get the same.
    """
    function = prompt_embed_inputs if "inputs_embeds" in case else prompt_embed
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in case.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "embedding_weight"
    }
    out = function(**case | leaves, impl=impl)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grads = torch.autograd.grad(out, list(leaves.values()), weight.to(grad_dtype).to(out), allow_unused=True)
    grads = [torch.zeros_like(t) if grad is None else grad for t, grad in zip(leaves.values(), grads, strict=True)]
    return dict(out=out.detach()) | dict(zip(leaves, grads, strict=True))


FEW = 64  # numbers


def source_dtype(case: dict) -> torch.dtype:
    return case["embedding_weight" if "embedding_weight" in case else "inputs_embeds"].dtype


def errors(
    case: dict, got: dict[str, torch.Tensor], truncates: bool = False, times: float = 2.0
) -> dict[str, tuple[float, float]]:
    """(error, allowed) of each result that is off by more than allowed, in norm.

    Allowed is `times` the error of the plain formula in the same dtypes. The floor below it is half a unit in the last
    place of the result's dtype, what rounding the exact value costs anybody; a whole unit where the interpreter
    `truncates` (its casts to bfloat16); two units for a result of few numbers, where the plain formula's error is one
    draw that may come out near zero, while the result ends a chain of at least four roundings. In float64 the plain
    formula is the truth, so the difference holds the roundings of both: sums of up to 150 terms in chains of four
    products, allowed 16 units.
    """
    truth, plain = run(double(case), "reference", source_dtype(case)), run(case, "reference", source_dtype(case))
    return too_far(got, plain, truth, truncates, times)


def too_far(
    got: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], truth: dict[str, torch.Tensor],
    truncates: bool = False, times: float = 2.0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """`errors` of results by name, given those of the plain formula and those in float64."""
    wrong = {}
    for name, value in got.items():
        units = 2.0 if value.numel() < FEW else 0.5
        if value.dtype == torch.bfloat16 and truncates:
            units = max(units, 1.0)
        if value.dtype == torch.float64:
            units = 16.0
        floor = units * torch.finfo(value.dtype).eps
        error = (value.double() - truth[name]).norm().item()
        allowed = times * max((plain[name].double() - truth[name]).norm().item(), floor * truth[name].norm().item())
        if not error <= allowed:
            wrong[name] = (error, allowed)
    return wrong


FENCE = 64  # numbers before and after every buffer


@contextlib.contextmanager
def fenced_buffers():
    """Every torch.empty and its kin inside is full of NaN (integers: of a huge number) and fenced; fences are checked.

    Yields the list of buffers.
    """
    buffers = []
    kept = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def fence(wanted: torch.Tensor) -> torch.Tensor:
        has_nan = wanted.is_floating_point() or wanted.dtype == torch.bool  # which is true then
        poison = float("nan") if has_nan else torch.iinfo(wanted.dtype).max
        whole = torch.full((wanted.numel() + 2 * FENCE,), poison, dtype=wanted.dtype)
        buffers.append((whole, whole.clone()))
        return whole[FENCE : FENCE + wanted.numel()].view(wanted.shape)

    torch.empty, torch.empty_like, torch.Tensor.new_empty = (
        lambda *args, make=make, **kwargs: fence(make(*args, **kwargs)) for make in kept
    )
    try:
        yield buffers
    finally:
        torch.empty, torch.empty_like, torch.Tensor.new_empty = kept
    for whole, before in buffers:
        for side in (slice(0, FENCE), slice(len(whole) - FENCE, None)):
            torch.testing.assert_close(whole[side], before[side], rtol=0, atol=0, equal_nan=True)


@contextlib.contextmanager
def counted_accesses():
    """Bytes that active lanes load and store inside, as (address, bytes) pairs of whole tensors: see `bytes_of`."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    loads, stores = [], []
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def count(into, ptrs, mask):
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        into.append((np.atleast_1d(ptrs.data)[np.atleast_1d(mask.data)].ravel(), size))

    def counting_load(self, ptrs, mask, *rest):
        count(loads, ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def counting_store(self, ptrs, value, mask, *rest):
        count(stores, ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    Builder.create_masked_load, Builder.create_masked_store = counting_load, counting_store
    try:
        yield loads, stores
    finally:
        Builder.create_masked_load, Builder.create_masked_store = load, store


@contextlib.contextmanager
def last_programs(**counts):
    """Inside, each launch runs the last of its programs alone, so many as `counts` says by the kernel's name.

    What the kernels read and write may then be too large to be filled: only the pages of those programs are touched.
    """
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    kept = GridExecutor.__call__

    def call(self, *args, **flags):
        count = counts[self.fn.__name__]
        skipped, self.grid = self.grid[0] - count, (count,)
        interpreter_builder.set_grid_idx = lambda x, y, z: setattr(interpreter_builder, "grid_idx", (skipped + x, y, z))
        try:
            return kept(self, *args, **flags)
        finally:
            del interpreter_builder.set_grid_idx

    GridExecutor.__call__ = call
    try:
        yield
    finally:
        GridExecutor.__call__ = kept


def bytes_of(accesses, tensor=None):
    """Bytes of the accesses to a tensor, or of all of them."""
    low, high = (0, 2**63) if tensor is None else (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
    return sum(size * int(((pointers >= low) & (pointers < high)).sum()) for pointers, size in accesses)
