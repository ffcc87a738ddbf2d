"""Checks an installation: versions, devices, which implementation runs and why, and a self-test of seconds."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from typing import Any

import torch
import transformers
from packaging.requirements import Requirement

import ept_kernels
from ept.backbone.precision import cpu_has_bfloat16
from ept.version import __version__
from ept_kernels.availability import why_no_triton

__all__ = ["devices", "self_test", "self_tests", "versions"]

# Sizes of the self-test: no two equal, so that a swapped pair cannot pass.
SIZES = dict(batch=3, length=11, vocab=40, d=48, s=5, n=16, r=3, k=4, h=2, q=6)
ALLOWED = 2  # times the error of the plain formula in the same dtype; as tests/kernel_cases.py


def versions(problems: list[str]) -> list[str]:
    """Returns a line for each package, its version against what setup.py declares; what an extra needs may be missing."""
    lines = [f"ept {__version__}, Python {platform.python_version()} on {platform.platform()}"]
    try:
        declared = importlib.metadata.requires("ept") or []
    except importlib.metadata.PackageNotFoundError:
        lines.append("not installed (it runs from its source), so what it requires is not looked at")
        lines += [f"{package.__name__} {package.__version__}" for package in (torch, transformers)]
        return lines
    for requirement in map(Requirement, declared):
        extra = requirement.marker is not None and "extra" in str(requirement.marker)
        if requirement.marker is not None and not any(
            requirement.marker.evaluate({"extra": name}) for name in ("", "train", "bench", "test")
        ):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{requirement.name} is not installed (wanted: {requirement.specifier or 'any'})")
            if not extra:
                problems.append(f"{requirement.name} is not installed: pip install '{requirement.name}'")
            continue
        line = f"{requirement.name} {version}"
        if line not in lines and not requirement.specifier.contains(version, prereleases=True):
            problems.append(
                f"{line} is not {requirement.specifier}: pip install '{requirement.name}{requirement.specifier}'"
            )
        if line not in lines:
            lines.append(line)
    return lines


def devices(problems: list[str]) -> list[str]:
    """Returns a line for each device, with what impl="auto" takes there."""
    lines = []
    for device in _present():
        if device.type == "cuda":
            about = torch.cuda.get_device_properties(device)
            name = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
        else:
            name = f"{torch.get_num_threads()} threads" if device.type == "cpu" else device.type
        reason = why_no_triton(device) if device.type == "cuda" else f"the tensors are on {device.type}, not on a GPU"
        lines.append(f'{device} ({name}): impl="auto" takes {"triton" if reason is None else f"torch: {reason}"}')
    has, takes = ("has", "bfloat16, with eager attention") if cpu_has_bfloat16() else ("has no", "float32")
    lines.append(f"the CPU {has} bfloat16 instructions: weights that were saved in bfloat16 are loaded in {takes}")
    if torch.version.cuda and not torch.cuda.is_available():
        lines.append(f"torch was built for CUDA {torch.version.cuda}, but finds no GPU")
    return lines


def _present() -> list[torch.device]:
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return devices + ([torch.device("mps")] if torch.backends.mps.is_available() else [])


# ---------------------------------------------------------------------- self-test


def self_tests(problems: list[str]) -> list[str]:
    """Tests every implementation that can run here; returns a line for each, what is wrong goes into `problems`."""
    lines = []
    for device in _present():
        impls = ["torch"] + (["triton"] if device.type == "cuda" and why_no_triton(device) is None else [])
        for impl in impls:
            lines.append(
                _judged(f"{impl} on {device}", lambda impl=impl, device=device: self_test(impl, device), problems)
            )
    if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
        lines.append(_judged("triton in its interpreter", _in_the_interpreter, problems))
    return lines


def _judged(name: str, test: Any, problems: list[str]) -> str:
    try:
        wrong = {what: errors for what, errors in test().items() if not errors[0] <= errors[1]}
    except (RuntimeError, ValueError, TypeError, OSError, ImportError, subprocess.TimeoutExpired) as error:
        problems.append(f"{name} does not run: {' '.join(str(error).split())}")
        return f"{name}: does not run"
    if wrong:
        errors = ", ".join(
            f"{what} is off by {error:.2g} (allowed {most:.2g})" for what, (error, most) in wrong.items()
        )
        problems.append(f'{name} is wrong: {errors}. Use impl="reference", and report it')
        return f"{name}: WRONG"
    return f"{name}: right, forward and backward"


def self_test(impl: str, device: torch.device) -> dict[str, tuple[float, float]]:
    """Returns (error, allowed) of the result and of every gradient of an implementation on small random input in fp32.

    The error is against the reference in float64 on the CPU, relative in norm; allowed is twice the reference's own in
    fp32, and at least one unit in the last place for each of the sums' d terms under the square root, √d·2⁻²³.
    """
    truth = _results("reference", torch.float64, torch.device("cpu"))
    plain = _results("reference", torch.float32, torch.device("cpu"))
    result = _results(impl, torch.float32, device)
    floor = SIZES["d"] ** 0.5 * torch.finfo(torch.float32).eps
    errors = {}
    for name, value in truth.items():
        size = value.norm().item()
        error, plain_error = ((r[name].double() - value).norm().item() / size for r in (result, plain))
        errors[name] = (error, max(ALLOWED * plain_error, floor))
    return errors


def _results(impl: str, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    z, g = SIZES, torch.Generator().manual_seed(0)
    shapes = {
        "prompt": (z["s"], z["d"]), "lowrank_a": (z["n"], z["r"]), "lowrank_b": (z["r"], z["d"]),
        "space_down": (z["k"], z["h"], z["d"]), "space_up": (z["k"], z["h"], z["d"]), "gate_weight": (z["k"], z["d"]),
        "token_down": (z["q"], z["d"]), "token_up": (z["q"], z["d"]),
    }  # fmt: skip
    drawn = {name: torch.randn(shape, generator=g) / shape[-1] ** 0.25 for name, shape in shapes.items()}
    weight = torch.randn(z["vocab"], z["d"], generator=g)
    ids = torch.randint(z["vocab"], (z["batch"], z["length"]), generator=g)
    mask = torch.arange(z["length"]) >= torch.tensor([[0], [4], [9]])
    upstream = torch.randn(z["batch"], z["s"] + z["length"], z["d"], generator=g)
    leaves = {name: t.to(device, dtype).requires_grad_() for name, t in drawn.items()}
    out = ept_kernels.prompt_embed(
        ids.to(device), mask.to(device), weight.to(device, dtype), **leaves,
        scale=0.7, embed_scale=0.5, prompt_start=1, impl=impl,
    )  # fmt: skip
    grads = torch.autograd.grad(out, list(leaves.values()), upstream.to(device, dtype))
    results = {"result": out} | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: t.detach().cpu() for name, t in results.items()}


def _in_the_interpreter() -> dict[str, tuple[float, float]]:
    """Runs `self_test` of the Triton kernels in a process of its own: Triton chooses its interpreter when it is imported."""
    code = (
        "import json, torch; from ept.inspect.self_test import self_test; "
        "print(json.dumps(self_test('triton', torch.device('cpu'))))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])
