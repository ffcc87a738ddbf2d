"""Whether the gate still uses its spaces."""

import math

from torch import Tensor

__all__ = ["gate_health"]


def gate_health(gate: Tensor) -> dict[str, float]:
    """Returns each space's mean weight over the prompt rows, and the rows' mean entropy over ln K (1: uniform, 0: one space).

    A space whose mean weight goes to 0 is dead. Empty for an adapter without spaces.
    """
    num_spaces = gate.shape[1]
    if num_spaces == 0:
        return {}
    health = {f"gate_mean_{k}": mean for k, mean in enumerate(gate.mean(0).tolist())}
    if num_spaces > 1:
        entropy = -(gate * gate.clamp_min(1e-12).log()).sum(1).mean() / math.log(num_spaces)
        health["gate_entropy"] = entropy.item()
    return health
