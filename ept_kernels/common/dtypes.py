"""Which dtype an implementation computes in."""

from typing import TypeVar

import torch
from torch import Tensor

Tensors = TypeVar("Tensors", bound=tuple)  # a NamedTuple of tensors and None


def widest(*tensors: Tensor | None) -> torch.dtype:
    """The floating-point dtype that holds the numbers of all the tensors, as torch.promote_types has it.

    That function is an operation of torch's, which a call that lasts microseconds can do without.
    """
    dtypes = {t.dtype for t in tensors if t is not None}
    if len(dtypes) == 1:
        return dtypes.pop()
    return torch.float64 if torch.float64 in dtypes else torch.float32  # also for bfloat16 beside float16


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """float32 for half-precision dtypes, float32 and float64 as they are."""
    return dtype if dtype == torch.float64 else torch.float32


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The same NamedTuple with every tensor in the dtype."""
    return type(tensors)(*(None if t is None else t.to(dtype) for t in tensors))  # type: ignore[arg-type]
