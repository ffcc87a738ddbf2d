"""What the arguments of `layer_update` must be; each message names the argument and the remedy."""

import math

import torch
from torch import Tensor

from ..common.checks import (
    check_activation,
    check_same_device,
    check_scale,
    check_shape,
    check_trained,
    describe,
    has_readable_values,
    value_range,
)

MEANING = "the size of the layer's hidden states"


def check_update(
    hidden: Tensor,
    down: Tensor,
    up: Tensor,
    hidden_scale: float | Tensor,
    activation: str,
    adapter_index: Tensor | None,
) -> None:
    """All arguments, but for the values of tensors."""
    check_activation(activation)
    if hidden.dim() != 3:
        raise ValueError(f"hidden must be [batch, columns, d], not {tuple(hidden.shape)}")
    d = hidden.shape[2]
    if adapter_index is None and down.dim() == 3 and len(down) == len(hidden):
        check_shape("down", down, (len(hidden), "q", d))  # a pair for each row
    else:
        check_shape("down", down, ("q", d) if adapter_index is None else ("adapters", "q", d))
    check_shape("up", up, tuple(down.shape))
    check_trained(hidden.device, hidden=hidden, down=down, up=up)
    if adapter_index is not None:
        _check_index(adapter_index, len(hidden))
        check_same_device("adapter_index", adapter_index, hidden=hidden)
    if isinstance(hidden_scale, Tensor):
        _check_scales(hidden_scale, None if adapter_index is None else len(down), hidden)
    else:
        check_scale("hidden_scale", hidden_scale, MEANING)


def check_values(hidden_scale: float | Tensor, adapter_index: Tensor | None, adapters: int) -> None:
    """The values of tensors where reading them costs nothing."""
    if adapter_index is not None and adapter_index.numel() and has_readable_values(adapter_index):
        low, high = value_range(adapter_index)
        if low < -1 or high >= adapters:
            raise IndexError(
                f"adapter_index holds {low if low < -1 else high}, but the adapters have numbers 0 … {adapters - 1}: "
                "use those, or -1 for a row that stays as it is"
            )
    if isinstance(hidden_scale, Tensor) and has_readable_values(hidden_scale):
        for value in hidden_scale.aminmax():
            scale = value.item()
            if not 0 < scale < math.inf:
                check_scale("hidden_scale", scale, MEANING)


def _check_index(adapter_index: Tensor, batch: int) -> None:
    if adapter_index.is_floating_point() or adapter_index.is_complex() or adapter_index.dtype == torch.bool:
        raise TypeError(f"adapter_index must hold integers, one for each batch row, not {describe(adapter_index)}")
    check_shape("adapter_index", adapter_index, (batch,))


def _check_scales(hidden_scale: Tensor, adapters: int | None, hidden: Tensor) -> None:
    if hidden_scale.dim() == 0:
        shape: tuple[int, ...] = ()
    elif adapters is None:
        raise ValueError(
            f"hidden_scale must be a number or a 0-d tensor, not {tuple(hidden_scale.shape)}: "
            "one for each adapter needs adapter_index"
        )
    else:
        shape = (adapters,)
    check_shape("hidden_scale", hidden_scale, shape)
    if not hidden_scale.is_floating_point():
        raise TypeError(f"hidden_scale must be a number or a floating-point tensor, not {describe(hidden_scale)}")
    if hidden_scale.dim() > 0:
        check_same_device("hidden_scale", hidden_scale, hidden=hidden)
