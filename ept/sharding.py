"""Tensors that training in several processes spreads over them (FSDP2's DTensors): made whole, and spread again.

Making one whole is a collective operation: every process must do it.
"""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

__all__ = ["load_optimizer_state", "spread_like", "whole", "whole_optimizer_state"]


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its entries, on every process; a tensor that is not spread is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(value: Tensor, tensor: Tensor) -> Tensor:
    """`value`, whole and the same on every process, spread as `tensor` is."""
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
            name: spread_like(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in held.items()
        }
        for index, held in saved["state"].items()
    }
    optimizer.load_state_dict(saved | {"state": state})
