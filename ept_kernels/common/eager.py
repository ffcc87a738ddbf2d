"""What the implementations in eager torch share."""

import torch
from torch import Tensor

from .reference import ACTIVATIONS


def add_bottleneck(x: Tensor, down: Tensor, up: Tensor, activation: str, skipped: Tensor | None = None) -> Tensor:
    """x + σ(x·Dᵀ)·W in three operations. Returns a new tensor of x's shape.

    x is [rows, d] with D and W [q, d], or [batch, columns, d] with D and W [batch, q, d], a pair for each batch row.
    `skipped` is True where σ(x·Dᵀ) counts as zero; it has as many axes as x, of x's sizes or 1.
    """
    z = x @ down.mT
    if skipped is not None:
        z = z.masked_fill(skipped, 0)  # σ(0) is 0, and what z was has no gradient
    return multiply_onto(x, ACTIVATIONS[activation](z), up)


def multiply_onto(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total + left·right in one operation, for matrices or for batches of them."""
    return (torch.addmm if total.dim() == 2 else torch.baddbmm)(total, left, right)
