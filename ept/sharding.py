"""Tensors that training in several processes spreads over them, by FSDP2 or DeepSpeed's ZeRO-3: made whole, and written.

Both are collective operations: every process must do them.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

__all__ = ["load_optimizer_state", "put", "whole", "whole_optimizer_state", "whole_shape"]


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its entries, on every process; a tensor that is not spread is returned as it is."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if _is_partitioned(tensor):
        from deepspeed import zero

        with zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


def whole_shape(tensor: Tensor) -> torch.Size:
    return cast(Any, tensor).ds_shape if _is_partitioned(tensor) else tensor.shape  # DeepSpeed's own attribute


@torch.no_grad()
def put(tensor: Tensor, value: Tensor) -> None:
    """Copies `value`, whole and the same on every process, into a tensor that may be spread."""
    if _is_partitioned(tensor):
        from deepspeed import zero

        with zero.GatheredParameters([tensor], modifier_rank=0):
            tensor.copy_(value)
    else:
        tensor.copy_(_spread_like(value, tensor))


def _is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 has the parameter in its hands."""
    return hasattr(tensor, "ds_status")


def _spread_like(value: Tensor, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return value
    value = value.to(device=tensor.device, dtype=tensor.dtype)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements)


def whole_optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The optimiser's state_dict() as one process alone has it."""
    saved = optimizer.state_dict()
    state = {
        index: {name: whole(value) if isinstance(value, Tensor) else value for name, value in held.items()}
        for index, held in saved["state"].items()
    }
    return saved | {"state": state}


def load_optimizer_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Puts what `whole_optimizer_state` gave into an optimiser whose parameters may be spread over other processes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {
            name: _spread_like(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in held.items()
        }
        for index, held in saved["state"].items()
    }
    optimizer.load_state_dict(saved | {"state": state})
