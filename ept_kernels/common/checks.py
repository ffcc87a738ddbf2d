"""Checks of arguments that every stem makes. Each raises with the argument's name and what to pass in its place."""

import math

import torch
from torch import Tensor

from .reference import ACTIVATIONS


def check_activation(activation: str) -> None:
    """ValueError for an unknown activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown: choose one of {', '.join(map(repr, ACTIVATIONS))}")


def check_scale(name: str, scale: float, meaning: str) -> None:
    """ValueError for a number that is not positive and finite."""
    if not 0 < scale < math.inf:
        raise ValueError(f"{name}={scale} must be positive and finite: it is {meaning}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    """ValueError for another shape. Letters stand for any positive size."""
    if tensor.shape == shape:
        return
    fits = tensor.dim() == len(shape) and all(
        n >= 1 if isinstance(want, str) else n == want for n, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must be [{', '.join(map(str, shape))}], not {tuple(tensor.shape)}")


def check_trained(device: torch.device, **tensors: Tensor | None) -> None:
    """TypeError for a tensor that is not of floating point, ValueError for one on another device."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, not {describe(tensor)}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the rest on {device}: move them to one device")


def check_same_device(name: str, tensor: Tensor, **others: Tensor) -> None:
    """ValueError for tensors that are not where the named one is."""
    for other, value in others.items():
        if value.device != tensor.device:
            raise ValueError(f"{name} is on {tensor.device}, but {other} on {value.device}: move them to one device")


def check_all_or_none(**tensors: Tensor | None) -> None:
    """ValueError if some of the tensors are there and others are None."""
    missing = [name for name, t in tensors.items() if t is None]
    if missing and len(missing) < len(tensors):
        present = [name for name in tensors if name not in missing]
        raise ValueError(f"{', '.join(present)} given without {', '.join(missing)}: pass all of them, or None for all")


def has_readable_values(tensor: Tensor) -> bool:
    """Whether reading the values costs nothing: on the CPU, and neither traced nor transformed."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def value_range(integers: Tensor) -> tuple[int, int]:
    """The smallest and the largest value, without an operation of torch where there is one for each row."""
    if integers.dim() == 1:
        values = integers.tolist()
        return min(values), max(values)
    low, high = integers.aminmax()
    return int(low.item()), int(high.item())


def describe(tensor: Tensor) -> str:
    """Its dtype and shape, for a message."""
    return f"{tensor.dtype} {tuple(tensor.shape)}"
