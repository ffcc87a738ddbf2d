"""In which type a study's backbone is computed on this machine."""

import torch

from ept.backbone.precision import cpu_has_bfloat16

__all__ = ["fast_dtype"]


def fast_dtype(dtype: str, device: str | None = None) -> str:
    """The type to compute in: float32 in place of bfloat16 on a CPU without its instructions.

    Stage `precision` is to show whether scores depend on it; one of its runs is on record.

    Args:
        device: None takes an accelerator where there is one.
    """
    is_cpu = not torch.accelerator.is_available() if device is None else torch.device(device).type == "cpu"
    return "float32" if dtype == "bfloat16" and is_cpu and not cpu_has_bfloat16() else dtype
