"""What the specifications of all stems share, in plain tensor operations."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "identity": lambda x: x,
}


def bottleneck(x: Tensor, down: Tensor, up: Tensor, activation: str) -> Tensor:
    """σ(x·Dᵀ)·W for x [..., d], D and W [q, d]: the addend of steps 2 and 8. Returns [..., d]."""
    return ACTIVATIONS[activation](x @ down.T) @ up
