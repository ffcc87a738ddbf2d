"""What the plugin serves: read from the environment, so that every process of an engine reads the same.

| variable | meaning |
|---|---|
| EPT_VLLM_ADAPTER | the directory of one adapter, for every request |
| EPT_VLLM_SLOTS | `{"rows": R, "rank": q}`: each request names its adapter; what one of them may have at most |

Without either the plugin does nothing.
"""

import functools
import json
import os
from dataclasses import dataclass, fields

from ept.serving.served_dir import ServedAdapter

__all__ = ["ADAPTER_VARIABLE", "SLOTS_VARIABLE", "OneAdapter", "Served", "Slots", "is_asked_for", "served"]

ADAPTER_VARIABLE, SLOTS_VARIABLE = "EPT_VLLM_ADAPTER", "EPT_VLLM_SLOTS"


@dataclass(frozen=True)
class OneAdapter:
    """One adapter for every request: its directory, and what that says."""

    directory: str
    adapter: ServedAdapter

    @property
    def shapes(self) -> tuple:
        """What the model's graph depends on."""
        return self.adapter.rows, self.adapter.rank, self.adapter.activation, self.adapter.updated_layers


@dataclass(frozen=True)
class Slots:
    """Adapters by request: how large each slot is.

    Attributes:
        rows: of the prompt and of the low-rank update, s + N, at most.
        rank: q at most.
    """

    rows: int
    rank: int

    @property
    def shapes(self) -> tuple:
        """What the model's graph depends on."""
        return self.rows, self.rank

    def check(self, adapter: ServedAdapter, name: str) -> None:
        """Raises ValueError if an adapter does not fit a slot."""
        for what, size, limit in (("rows", adapter.rows, self.rows), ("rank", adapter.rank, self.rank)):
            if size > limit:
                raise ValueError(
                    f"the adapter {name} has {what} {size}, more than the {limit} of {SLOTS_VARIABLE}: raise it there"
                )
        if adapter.activation != "silu":
            raise ValueError(
                f"the adapter {name} has the activation {adapter.activation}, and slots are computed with silu: serve it "
                f"alone, by {ADAPTER_VARIABLE}"
            )


Served = OneAdapter | Slots


def is_asked_for() -> bool:
    """Whether one of the variables is set."""
    return bool(os.environ.get(ADAPTER_VARIABLE) or os.environ.get(SLOTS_VARIABLE))


@functools.cache
def served() -> Served:
    """Returns what this engine serves, read once in each process.

    Raises:
        ValueError, FileNotFoundError: a variable cannot be read, or the adapter is damaged.
    """
    directory, slots = os.environ.get(ADAPTER_VARIABLE), os.environ.get(SLOTS_VARIABLE)
    if bool(directory) == bool(slots):
        raise ValueError(f"set one of {ADAPTER_VARIABLE} and {SLOTS_VARIABLE}")
    return OneAdapter(directory, ServedAdapter.read(directory)) if directory else _slots(str(slots))


def _slots(text: str) -> Slots:
    names = {field.name for field in fields(Slots)}
    try:
        sizes = json.loads(text)
    except ValueError:
        sizes = None
    if not isinstance(sizes, dict) or set(sizes) != names or not all(type(n) is int and n > 0 for n in sizes.values()):
        raise ValueError(f'{SLOTS_VARIABLE}={text!r} cannot be read: give {{"rows": 8, "rank": 4}}, positive numbers')
    return Slots(**sizes)
