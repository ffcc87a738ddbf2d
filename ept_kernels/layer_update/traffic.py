"""Bytes, launches and flops of the layer's update, predicted from the shapes. Plain arithmetic, as prompt_embed's.

`memory` counts what has to cross the memory bus once for each launch that reads or writes it. D and W, which every
program reads, come from the caches.
"""

import dataclasses

from ..common.traffic import Traffic


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Symbols of docs/method.md; bytes per number of the hidden states, of D and W, and of the compute type."""

    batch: int
    columns: int
    d: int
    q: int
    adapters: int = 1
    hidden_bytes: int = 2
    weight_bytes: int = 4
    compute_bytes: int = 4

    @property
    def hidden(self) -> int:
        """Bytes of the hidden states."""
        return self.batch * self.columns * self.d * self.hidden_bytes

    @property
    def z(self) -> int:
        """Bytes that the forward keeps beside its inputs."""
        return self.batch * self.columns * self.q * self.compute_bytes

    @property
    def weights(self) -> int:
        """Bytes of D and W."""
        return 2 * self.adapters * self.q * self.d * self.weight_bytes


def forward(x: Shapes) -> Traffic:
    """One launch, 2·batch·columns·d numbers at least."""
    memory = {"x": x.hidden, "out": x.hidden, "z": x.z, "D and W": x.weights}
    return Traffic(1, memory, 4 * x.batch * x.columns * x.d * x.q)


def backward(x: Shapes) -> Traffic:
    """Two launches: g and z by both, x by the second."""
    memory = {
        "g": 2 * x.hidden,
        "x": x.hidden,
        "dx": x.hidden,
        "z": 2 * x.z,
        "u": 2 * x.z,
        "D and W": x.weights,
        "dD and dW": x.weights,
    }
    return Traffic(2, memory, 8 * x.batch * x.columns * x.d * x.q)
