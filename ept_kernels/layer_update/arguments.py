"""The arguments of the layer's update, by what they are. Symbols and shapes as in docs/method.md, step 8."""

from typing import NamedTuple

from torch import Tensor


class Update(NamedTuple):
    """The tensors: H [batch, columns, d], D and W [q, d], or [adapters, q, d] with an index [batch].

    `scales` is h where it is a tensor: 0-d, or [adapters].
    """

    hidden: Tensor
    down: Tensor
    up: Tensor
    adapter_index: Tensor | None = None
    scales: Tensor | None = None

    @property
    def adapters(self) -> int:
        """How many pairs of D and W there are."""
        return 1 if self.adapter_index is None else self.down.shape[0]


class Settings(NamedTuple):
    """h where it is a number, and σ."""

    hidden_scale: float = 1.0
    activation: str = "silu"
