"""The type of a frozen backbone's weights, and the attention for it, by what the machine computes fast.

Measured on a CPU with bfloat16 instructions: a bfloat16 training step takes 0.4 of its time with eager attention in place
of torch's fused one, half of whose time goes into its backward pass. On one without (plain AVX2) a bfloat16 step was
reported to take up to twenty times as long as in float32; that was not measured here.
"""

import functools
from typing import NamedTuple

import torch

from ept.console import say

__all__ = ["Precision", "cpu_has_bfloat16", "on_cpu", "precision_for"]


class Precision(NamedTuple):
    """How a backbone is loaded: `dtype` and `attention` as `from_pretrained` takes them, and what is to be said of it."""

    dtype: str
    attention: str | None = None
    remark: str | None = None


def cpu_has_bfloat16() -> bool:
    """Tells whether the CPU has instructions that compute in bfloat16 (AVX512-BF16, AMX, or Arm's)."""
    return any(bool(has) and name.endswith("bf16") for name, has in torch.cpu.get_capabilities().items())


def precision_for(dtype: str, saved_dtype: torch.dtype | str | None) -> Precision:
    """Returns how weights are loaded on this machine, and says once what was chosen for a CPU.

    Args:
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        saved_dtype: of the checkpoint; None: not known.
    """
    if torch.accelerator.is_available():
        return Precision(dtype)
    precision = on_cpu(dtype, saved_dtype, has_bfloat16=cpu_has_bfloat16())
    if precision.remark is not None:
        _say_once(precision.remark)
    return precision


def on_cpu(dtype: str, saved_dtype: torch.dtype | str | None, *, has_bfloat16: bool) -> Precision:
    """`precision_for` on a CPU with or without bfloat16 instructions."""
    is_saved_so = str(saved_dtype).removeprefix("torch.") == "bfloat16"
    if dtype != "bfloat16" and not (dtype == "auto" and is_saved_so):
        return Precision(dtype)
    if has_bfloat16:
        return Precision(
            "bfloat16", "eager",
            "this CPU has bfloat16 instructions: weights in bfloat16, with eager attention, the faster one here",
        )  # fmt: skip
    if dtype == "auto":
        return Precision(
            "float32",
            remark="this CPU has no bfloat16 instructions: the weights, saved in bfloat16, are loaded in float32, which is "
            "faster here (asked for by name, bfloat16 is kept)",
        )
    return Precision(
        "bfloat16", "eager",
        "warning: this CPU has no bfloat16 instructions, so bfloat16 is up to 20 times slower here than float32",
    )  # fmt: skip


@functools.cache
def _say_once(remark: str) -> None:
    say(remark)
