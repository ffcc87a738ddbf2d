"""Microbenchmarks: what is measured, how it is checked, what it costs on paper. The clocks are elsewhere.

A point is a kernel stem, one way of computing it and its sizes: a base point, and along each axis a smaller and a
larger value (on a GPU partly one) with everything else as in the base. Beside the stems stand the peers' embedding
steps on the same batch.
`micro_benchmark.py` times the points on a CPU through pytest-benchmark, `gpu.py` on a GPU through Triton's do_bench.

| stem | what runs |
|---|---|
| lowrank_update | prompt_embed with the low-rank update of the text alone |
| token_update | prompt_embed with the token-conditioned update alone |
| reconstruct_prompt | P* from prompt, fusion and spaces |
| prompt_embed | everything |
| embedding_step | the peers: embedding + concatenation (the floor), PEFT's prompt tuning, DePT's formula, PEFT's LoRA |
"""

import dataclasses
import functools
import os
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig, TaskType, inject_adapter_in_model
from peft.tuners.prompt_tuning import PromptEmbedding
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from ept_kernels import prompt_embed, reconstruct_prompt
from ept_kernels.prompt_embed import traffic

from .kernel_traffic import Count, kernel_calls

__all__ = [
    "BASE", "FLOOR", "PEERS", "STEMS", "WAYS", "CannotRun", "Case", "Point", "Work", "WrongResult",
    "copy_bandwidth", "launches", "named", "points", "row", "timed", "work",
]  # fmt: skip

WAYS = ("forward", "backward", "both")
VOCABULARY = 8192
Inputs = dict[str, Any]  # tensors by the names of the arguments; None for a part that is off

# Stem -> the sizes that it depends on; it has no parts of other sizes.
STEMS = {
    "lowrank_update": ("d", "n", "r", "batch", "length"),
    "token_update": ("d", "q", "batch", "length"),
    "reconstruct_prompt": ("d", "s", "n", "r", "k", "h"),
    "prompt_embed": ("d", "s", "n", "r", "k", "h", "q", "batch", "length"),
}
PEERS = ("embedding + concatenation", "prompt tuning 20", "prompt tuning 100", "DePT", "LoRA r = 4, 12 layers")
FLOOR = PEERS[0]
LORA_RANK, LORA_LAYERS = 4, 12

# The base, and the values of each axis beside it.
BASE = {
    "cpu": traffic.Shapes(batch=8, length=128, d=768, s=20, n=256, r=30, k=4, h=2, q=24, source_bytes=4),
    "cuda": traffic.Shapes(batch=32, length=256, d=768, s=60, n=256, r=30, k=4, h=8, q=24, source_bytes=2),
}
AXES: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": dict(
        d=(384, 1536), s=(4, 60), n=(128, 1024), r=(8, 60), k=(2, 8), h=(4, 16), q=(8, 48), batch=(2, 32), length=(32, 512)
    ),
    # One value where another size is another kernel to compile.
    "cuda": dict(
        d=(4096,), s=(4, 100), n=(128, 1024), r=(64,), k=(8,), h=(16,), q=(64,), batch=(8, 128), length=(64, 1024)
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Point:
    stem: str
    impl: str  # "reference", "torch", "compile" (of "torch"), "triton", or a peer's name
    axis: str  # the size that differs from the base's, or "base"
    sizes: traffic.Shapes

    def __str__(self) -> str:
        value = "" if self.axis == "base" else f"={getattr(self.sizes, self.axis)}"
        return f"{self.stem}-{self.impl}-{self.axis}{value}"


class CannotRun(Exception):
    """Something that an implementation needs is not here; the message says what."""


class WrongResult(AssertionError):
    """A result or a gradient is further from float64 than it may be."""


def points(device: str) -> list[Point]:
    """Every point of a device type, the implementations of the same sizes beside each other."""
    base, axes = BASE[device], AXES[device]
    impls = ("reference", "torch", "compile") + (("triton",) if device == "cuda" else ())
    found = []
    for stem, depends in STEMS.items():
        for axis, sizes in _along(base, {axis: axes[axis] for axis in depends}):
            found += [Point(stem, impl, axis, _only(sizes, stem)) for impl in impls]
    for axis, sizes in _along(base, {axis: axes[axis] for axis in ("d", "batch", "length")}):
        found += [Point("embedding_step", peer, axis, _of_peer(sizes, peer)) for peer in PEERS]
    return found


def named(device: str, part: str) -> list[Point]:
    """The points whose name holds `part`. ValueError if there are none."""
    found = [point for point in points(device) if part in str(point)]
    if not found:
        raise ValueError(f"{part!r}: no microbenchmark has this in its name; names are like {points(device)[0]}")
    return found


def _along(base: traffic.Shapes, axes: dict[str, tuple[int, ...]]) -> list[tuple[str, traffic.Shapes]]:
    along = [("base", base)]
    for axis, values in axes.items():
        for value in values:
            change: dict[str, Any] = {axis: value}
            along.append((axis, dataclasses.replace(base, **change)))
    return along


def _only(sizes: traffic.Shapes, stem: str) -> traffic.Shapes:
    """The sizes with the parts that the stem does not have at zero."""
    depends = STEMS[stem]
    absent: dict[str, Any] = {size: 0 for size in ("n", "r", "k", "h", "q") if size not in depends}
    if "length" not in depends:
        absent |= {"batch": 1, "length": 0, "masked": False}
    return dataclasses.replace(sizes, **absent)


def _of_peer(sizes: traffic.Shapes, peer: str) -> traffic.Shapes:
    absent: dict[str, Any] = {"n": 0, "r": 0, "k": 0, "h": 0, "q": 0}
    if peer == "DePT":
        absent |= {"n": sizes.length, "r": sizes.r}
    elif peer.startswith("prompt tuning"):
        absent |= {"s": int(peer.split()[-1])}
    elif peer.startswith("LoRA"):
        absent |= {"s": 0, "r": LORA_RANK}
    return dataclasses.replace(sizes, **absent, masked=False)


# ---------------------------------------------------------------------- what runs


@dataclasses.dataclass(eq=False)
class Case:
    """Inputs, of which those that ask for a gradient are trained, and the plain formula of what is to come out."""

    inputs: Inputs
    formula: Callable[[Inputs], Tensor]

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.inputs.items() if t is not None and t.requires_grad}

    @functools.cached_property
    def truth(self) -> dict[str, Tensor]:
        """The formula in float64 on the same numbers."""
        double = {
            name: t.detach().double().requires_grad_(t.requires_grad) if t is not None and t.is_floating_point() else t
            for name, t in self.inputs.items()
        }
        return _results(self.formula, double)

    @functools.cached_property
    def plain(self) -> dict[str, Tensor]:
        """The formula in the dtypes that are measured."""
        return _results(self.formula, self.inputs)


def _results(function: Callable[[Inputs], Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """The result and the gradient of every leaf, for one fixed gradient of the result."""
    leaves = {name: t for name, t in inputs.items() if t is not None and t.requires_grad}
    out = function(inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out)
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"the result": out.detach()} | {f"the gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}


@dataclasses.dataclass(eq=False)
class Work:
    """One way of computing a case."""

    case: Case
    function: Callable[[Inputs], Tensor]
    compiled_calls: tuple[int, int] | None = None  # kernel calls in compiled code, forward and backward

    def check(self) -> float:
        """The largest error over what is allowed among the result and the gradients; `WrongResult` if it is above 1.

        Errors are in norm against the formula in float64 on the same numbers. Allowed is three times what the formula
        itself is off by in the dtypes that are measured, and never less than three times half a unit in the last place,
        which rounding the exact value costs anybody. Three, where two is the rule of the tests: the gradients of a few
        tensors pass through as few as s·K = 8 numbers, so that the formula's own error is a draw that scatters.
        """
        truth, plain = self.case.truth, self.case.plain
        worst = 0.0
        for what, value in _results(self.function, self.case.inputs).items():
            floor = torch.finfo(value.dtype).eps / 2 * truth[what].norm().item()
            error = (value.double() - truth[what]).norm().item()
            allowed = 3 * max((plain[what].double() - truth[what]).norm().item(), floor)
            share = error / allowed if allowed else float(error > 0)
            if not share <= 1:  # also a NaN
                raise WrongResult(f"{what} is off by {share:.3g} times what is allowed: no time is given for it")
            worst = max(worst, share)
        return worst

    def call(self, way: str) -> Callable[[], Any]:
        """What is timed. The forward is that of training: it keeps what the backward needs."""
        function, inputs, leaves = self.function, self.case.inputs, list(self.case.leaves.values())
        if way == "forward":
            return lambda: function(inputs)
        out = function(inputs)
        grad = torch.randn_like(out)
        if way == "backward":
            return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)
        return lambda: torch.autograd.grad(function(inputs), leaves, grad)


def work(point: Point, device: str) -> Work:
    """What runs at a point, or `CannotRun`."""
    if point.stem == "embedding_step":
        return _peer(point.impl, point.sizes, device)
    if point.impl != "compile":
        return Work(_case(point.stem, point.sizes, device), _stem_function(point.stem, point.impl))
    reason = why_no_compiler(device)
    if reason is not None:
        raise CannotRun(f"torch.compile cannot run here: {reason}")
    function, calls = _compiled(point.stem, device)
    return Work(_case(point.stem, point.sizes, device), function, calls)


@functools.lru_cache(maxsize=1)  # the implementations of one point come one after another, and share the truth
def _case(stem: str, sizes: traffic.Shapes, device: str) -> Case:
    return Case(_stem_inputs(stem, sizes, device), _stem_function(stem, "reference"))


def _stem_inputs(stem: str, x: traffic.Shapes, device: str) -> Inputs:
    """Seeded arguments: weights in fp32 of the sizes that a trained adapter has, E in bf16 on a GPU, rows padded."""
    g = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor | None:
        if 0 in shape:
            return None
        return (torch.randn(shape, generator=g) / shape[-1] ** 0.5).to(device).requires_grad_()

    inputs = dict(
        prompt=weight(x.s, x.d), lowrank_a=weight(x.n, x.r), lowrank_b=weight(x.r, x.d),
        space_down=weight(x.k, x.h, x.d), space_up=weight(x.k, x.h, x.d), gate_weight=weight(x.k, x.d),
    )  # fmt: skip
    if stem == "reconstruct_prompt":
        return inputs
    inputs |= dict(token_down=weight(x.q, x.d), token_up=weight(x.q, x.d))
    return _text(x, g, device) | inputs


def _text(x: traffic.Shapes, g: torch.Generator, device: str) -> Inputs:
    """Ids, the mask of rows that are half to wholly text, and E."""
    table = torch.randn(VOCABULARY, x.d, generator=g).to(device, torch.bfloat16 if x.source_bytes == 2 else None)
    lengths = torch.randint(-(-x.length // 2), x.length + 1, (x.batch, 1), generator=g)
    mask = (torch.arange(x.length) < lengths).long().to(device) if x.masked else None
    ids = torch.randint(VOCABULARY, (x.batch, x.length), generator=g).to(device)
    return {"input_ids": ids, "attention_mask": mask, "embedding_weight": table}


@functools.cache
def _stem_function(stem: str, impl: str) -> Callable[[Inputs], Tensor]:
    if stem == "reconstruct_prompt":
        return lambda inputs: reconstruct_prompt(**inputs, scale=1.0, impl=impl)[0]
    return lambda inputs: prompt_embed(**inputs, scale=1.0, fusion=stem != "lowrank_update", impl=impl)


@functools.cache
def _compiled(stem: str, device: str) -> tuple[Callable[[Inputs], Tensor], tuple[int, int]]:
    """torch.compile of impl="torch" for sizes that may change, so that a sweep compiles about once; and the kernel
    calls in its code at the base, forward and backward."""
    torch._functorch.config.donated_buffer = False  # the backward is timed alone, so its graph is kept
    torch._dynamo.config.recompile_limit = 64
    eager = _stem_function(stem, "torch")
    function = torch.compile(lambda inputs: eager(inputs), dynamic=True)
    base = _stem_inputs(stem, _only(BASE[device], stem), device)
    _, codes = run_and_get_code(_results, function, base)
    forward, backward = map(kernel_calls, codes)
    return function, (forward, backward)


def why_no_compiler(device: str) -> str | None:
    """What torch.compile lacks; None where it can run."""
    if device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        return "it needs a C++ compiler (g++ or clang++), and none is installed"
    return None


def _peer(name: str, x: traffic.Shapes, device: str) -> Work:
    g = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=g) / shape[-1] ** 0.5).to(device).requires_grad_()

    if name.startswith("LoRA"):
        return _lora(x, g, device)
    text, scale = _text(x, g, device), 8.0 / max(x.r, 1) ** 0.5
    if name == "DePT":
        inputs = text | dict(prompt=weight(x.s, x.d), lowrank_a=weight(x.n, x.r), lowrank_b=weight(x.r, x.d))

        def dept(i: Inputs) -> Tensor:
            embeds = F.embedding(i["input_ids"], i["embedding_weight"])
            embeds = embeds + (i["lowrank_a"] @ i["lowrank_b"] * scale).to(embeds.dtype)
            return torch.cat([i["prompt"].to(embeds.dtype).expand(len(embeds), -1, -1), embeds], 1)

        return Work(Case(inputs, dept), dept)

    def joined(i: Inputs) -> Tensor:
        embeds = F.embedding(i["input_ids"], i["embedding_weight"])
        return torch.cat([i["prompt"].to(embeds.dtype).expand(len(embeds), -1, -1), embeds], 1)

    if name == FLOOR:
        return Work(Case(text | dict(prompt=weight(x.s, x.d)), joined), joined)
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=x.s, token_dim=x.d, num_transformer_submodules=1
    )
    encoder = PromptEmbedding(config, None).to(device)
    rows = torch.arange(x.s, device=device)

    def prompt_tuning(i: Inputs) -> Tensor:  # PeftModel.get_prompt and forward, without the backbone
        embeds = F.embedding(i["input_ids"], i["embedding_weight"])
        prompts = encoder(rows.unsqueeze(0).expand(len(embeds), -1)).to(embeds.dtype)
        return torch.cat((prompts, embeds), dim=1)

    return Work(Case(text | dict(prompt=encoder.embedding.weight), joined), prompt_tuning)


class _Ready(nn.Linear):
    """A linear layer whose result is its input, at no cost: what is timed behind LoRA is what LoRA adds."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _lora(x: traffic.Shapes, g: torch.Generator, device: str) -> Work:
    """The cost that PEFT's LoRA adds to twelve layers, one after another (query and value of a model of six)."""
    layers = nn.ModuleDict({f"layer{i}": _Ready(x.d, x.d, bias=False) for i in range(LORA_LAYERS)})
    config = LoraConfig(r=LORA_RANK, lora_alpha=8, target_modules=list(layers), lora_dropout=0.0)
    inject_adapter_in_model(config, layers)
    layers.to(device).requires_grad_(False)
    dtype = torch.bfloat16 if x.source_bytes == 2 else torch.float32
    inputs: Inputs = {"x": torch.randn(x.batch, x.length, x.d, generator=g).to(device, dtype).requires_grad_()}
    layer: Any  # as PEFT has changed it
    for name, layer in layers.items():
        for part in (layer.lora_A, layer.lora_B):
            part.default.weight.data = torch.randn(part.default.weight.shape, generator=g).to(device) / x.d**0.5
        inputs |= {f"{name} A": layer.lora_A.default.weight, f"{name} B": layer.lora_B.default.weight}
    for tensor in inputs.values():
        tensor.requires_grad_()

    def peft(i: Inputs) -> Tensor:
        out = i["x"]
        for layer in layers.values():
            out = layer(out)
        return out

    def formula(i: Inputs) -> Tensor:
        out = i["x"]
        for name in layers:
            a, b = i[f"{name} A"], i[f"{name} B"]
            out = out + ((out.to(a.dtype) @ a.T) @ b.T * (8 / LORA_RANK)).to(out.dtype)
        return out

    return Work(Case(inputs, formula), peft)


# ---------------------------------------------------------------------- what it costs


def predicted_bytes(point: Point, way: str) -> int:
    """Bytes that have to cross the memory bus once, by `ept_kernels.traffic`; for LoRA counted here."""
    if way == "both":
        return predicted_bytes(point, "forward") + predicted_bytes(point, "backward")
    x = point.sizes
    if point.impl.startswith("LoRA"):
        # Forward: x read for A, read again and written with what LoRA adds. Backward: dY read for A's and B's
        # gradients, x read, dY read again and dX written.
        moves = 3 if way == "forward" else 4
        weights = 2 * LORA_RANK * x.d * x.weight_bytes * (1 if way == "forward" else 2)
        return LORA_LAYERS * (moves * x.batch * x.length * x.d * x.source_bytes + weights)
    return getattr(traffic, way)(x).total


def launches(point: Point, way: str, work: Work, device: str) -> int:
    """Launches on a GPU as its profiler sees them; on a CPU operations dispatched, views aside, or of compiled code the
    kernel calls in it."""
    if device == "cuda":
        return _launches_on_gpu(work.call(way))
    if work.compiled_calls is not None:
        forward, backward = work.compiled_calls
        return {"forward": forward, "backward": backward, "both": forward + backward}[way]
    call = work.call(way)
    with Count() as count:
        call()
    return count.operations.total()


def _launches_on_gpu(call: Callable[[], Any]) -> int:
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes: more than the caches hold, and long beside a launch


def copy_bandwidth(device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes per second, read and written, of a copy of `COPIED` bytes: the median of nine, by the clock of the run."""
    source = torch.ones(COPIED[device] // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(11):
        started = clock()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return 2 * source.nbytes / sorted(seconds[2:])[4]


def row(point: Point, way: str, check: float, launches: int, bandwidth: float) -> dict[str, Any]:
    """What is known of a point beside its times: columns of bench.records, and the bandwidth that shares are of."""
    x = point.sizes
    sizes = {name: getattr(x, name) for name in ("batch", "length", "d", "s", "n", "r", "k", "h", "q")}
    return {
        "stem": point.stem, "impl": point.impl, "way": way, "axis": point.axis, **sizes,
        "dtype": "bf16" if x.source_bytes == 2 else "fp32", "error_of_allowed": check, "launches": launches,
        "bytes_predicted": predicted_bytes(point, way), "copy_gb_per_s": bandwidth / 1e9,
    }  # fmt: skip


def timed(row: dict[str, Any], low: float, median: float, high: float, rounds: int) -> dict[str, Any]:
    """The row with its times in seconds, and the share of the copy bandwidth that the predicted bytes then had."""
    share = row["bytes_predicted"] / median / (row["copy_gb_per_s"] * 1e9)
    times = {"unit": "ms", "median": 1e3 * median, "low": 1e3 * low, "high": 1e3 * high, "rounds": rounds}
    return row | times | {"of_copy_bandwidth": share}
