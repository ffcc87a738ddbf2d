"""What a prediction of a kernel's cost consists of. Plain arithmetic: needs neither torch nor a GPU."""

import dataclasses

PEAK_BANDWIDTH = {"H100": 3.35e12, "MI300X": 5.3e12}  # bytes per second, from the vendors' data sheets


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Launches, bytes that cross the memory bus, and floating-point operations."""

    launches: int
    memory: dict[str, int]  # bytes, by what they are
    flops: int

    @property
    def total(self) -> int:
        return sum(self.memory.values())


def seconds(traffic: Traffic, gpu: str) -> float:
    """The time of the bytes alone at peak bandwidth: a lower bound, and a prediction until measured."""
    return traffic.total / PEAK_BANDWIDTH[gpu]
