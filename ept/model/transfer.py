"""Starting an adapter from trained ones of the same backbone: their weighted sum, and how well each one suits new rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["leave_one_out_error", "weighted_sum"]

RIDGES = (0.01, 0.1, 1.0)  # of the features' mean squared size


def weighted_sum(sources: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The sum of tensors of the same names and shapes, each source's times its weight.

    D and W enter a product, so the sum means something where all sources were trained from one start: unit j of one is
    then unit j of the others.
    """
    first, *others = sources
    total = {name: weights[0] * tensor for name, tensor in first.items()}
    for source, weight in zip(others, weights[1:], strict=True):
        total = {name: tensor + weight * source[name] for name, tensor in total.items()}
    return total


def leave_one_out_error(features: Tensor, targets: Tensor) -> Tensor:
    """[…] the share of the targets' variance that a ridge regression misses on rows that it has not seen.

    Every row is predicted from all the others, in closed form; the best of three ridges counts. 0 is a perfect
    prediction, 1 that of the targets' mean.

    Args:
        features: [… , n, d] what a head reads of n rows.
        targets: [… , n, c] values, or a column of zeros and ones for each class.

    Raises:
        ValueError: fewer than 2 rows, or targets that are all equal.
    """
    x, y = features.double(), targets.double()
    rows = x.shape[-2]
    if rows < 2:
        raise ValueError(f"{rows} row: leaving one out needs at least 2")
    spread = (y - y.mean(-2, keepdim=True)).square().sum((-2, -1))
    if not (spread > 0).all():
        raise ValueError("all targets are equal, which tells nothing of any adapter: give rows of several labels")
    x = x - x.mean(-2, keepdim=True)
    products = x @ x.mT
    size = products.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(rows, dtype=x.dtype, device=x.device)
    errors = []
    for ridge in RIDGES:
        # The large constant stands for an intercept without a penalty.
        inverse = torch.linalg.inv(products + ridge * size * eye + 1e3 * size)
        missed = inverse @ y / inverse.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        errors.append(missed.square().sum((-2, -1)) / spread)
    return torch.stack(errors).amin(0)
