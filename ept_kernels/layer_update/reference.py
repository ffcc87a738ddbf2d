"""The specification of step 8 in plain torch: docs/method.md, line by line, in any dtype up to float64."""

import torch
from torch import Tensor

from ..common.reference import bottleneck


def layer_update(hidden: Tensor, down: Tensor, up: Tensor, hidden_scale: float | Tensor, activation: str) -> Tensor:
    """H + h·σ((H/h)·Dᵀ)·W for H [..., d], D and W [q, d]. Returns H's shape."""
    return hidden + hidden_scale * bottleneck(hidden / hidden_scale, down, up, activation)


def layer_update_by_row(
    hidden: Tensor, down: Tensor, up: Tensor, hidden_scale: float | Tensor, activation: str, adapter_index: Tensor
) -> Tensor:
    """`layer_update` of each batch row of H [batch, columns, d] with the adapter that `adapter_index` [batch] names.

    D and W are [adapters, q, d], h is a number or [adapters]. A row with index -1 stays as it is.
    """
    rows = [
        row if index < 0 else layer_update(row, down[index], up[index], _scale_of(hidden_scale, index), activation)
        for row, index in zip(hidden, adapter_index.tolist(), strict=True)
    ]
    return torch.stack(rows) if rows else hidden.clone()


def _scale_of(hidden_scale: float | Tensor, index: int) -> float | Tensor:
    per_adapter = isinstance(hidden_scale, Tensor) and hidden_scale.dim() == 1
    return hidden_scale[index] if per_adapter else hidden_scale  # type: ignore[index]
