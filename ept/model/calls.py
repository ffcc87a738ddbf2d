"""What a call of an EPTModel means to the hooks on the modules that it runs.

Nothing on a shared module changes during a call. A call enters a `Call`, which is thread-local and re-entrant: a hook
reads the one that its own thread entered last. Within `BARE`, or outside of any, the hooks do nothing.
"""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from ept.layer.base import LayerUpdates
from ept.model.routing import Routing

__all__ = ["BARE", "Call", "Decoding", "Disabled", "bare", "current", "entered"]


class Decoding(Protocol):
    """What changes the arguments of the wrapped model's forward while it generates."""

    def arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Call:
    """One call: the adapters that its rows belong to, and the modules that it runs.

    Attributes:
        routing: the rows by adapter; None within the bare backbone.
        backbone: the wrapped model, whose forward `decoding` changes.
        layers: the layers after the first that updates act on, in order.
        updates: each adapter's updates in these layers, in the order of `routing`; None for one without.
        heads: for each head of the backbone that is not the rows' own, those of `routing`'s adapters.
        decoding: what embeds the new tokens while the model generates.
    """

    routing: Routing | None = None
    backbone: nn.Module | None = None
    layers: tuple[nn.Module, ...] = ()
    updates: tuple[LayerUpdates | None, ...] = ()
    heads: dict[nn.Module, list[nn.Module]] = field(default_factory=dict)
    decoding: Decoding | None = None

    def updates_layer(self, number: int, layer: nn.Module) -> bool:
        """Whether the call has an update for this layer, the one of that number after the first."""
        if number >= len(self.layers) or self.layers[number] is not layer:
            return False  # a layer that was put into another module since leaves the work to that one
        return any(updates is not None and number < len(updates.down) for updates in self.updates)

    def update(self, number: int, hidden: Tensor) -> Tensor:
        """Hidden states [batch, columns, d] at the input of the layer `number` after the first, updated row by row."""
        assert self.routing is not None
        routing = self.routing.for_rows(len(hidden))
        parts = routing.split(hidden)
        return routing.join(
            [
                part if updates is None else updates.apply(number, part)
                for part, updates in zip(parts, self.updates, strict=True)
            ]
        )


BARE = Call()
_thread = threading.local()


def _stack() -> list[Call]:
    """The calls that this thread has entered, the innermost last."""
    if not hasattr(_thread, "calls"):
        _thread.calls = []
    return _thread.calls


def current() -> Call:
    """The call that this thread entered last; `BARE` outside of any."""
    calls = _stack()
    return calls[-1] if calls else BARE


@contextlib.contextmanager
def entered(call: Call) -> Iterator[None]:
    """Within, the hooks act for this call."""
    calls = _stack()
    calls.append(call)
    try:
        yield
    finally:
        calls.pop()


def bare() -> contextlib.AbstractContextManager[None]:
    """Within, the hooks do nothing: what runs is the bare backbone."""
    return entered(BARE)


class Disabled:
    """Whether a model's adapter is switched off, thread by thread. Copies and pickles start with it on."""

    def __init__(self) -> None:
        self._thread = threading.local()

    def __reduce__(self) -> tuple[type["Disabled"], tuple[()]]:
        return Disabled, ()

    def here(self) -> bool:
        """Whether it is in this thread."""
        return getattr(self._thread, "depth", 0) > 0

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Within, it is off for this thread."""
        self._thread.depth = getattr(self._thread, "depth", 0) + 1
        try:
            yield
        finally:
            self._thread.depth -= 1
