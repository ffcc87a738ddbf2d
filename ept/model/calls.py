"""What a call of an EPTModel means to the hooks on the modules that it runs.

Nothing on a shared module changes during a call. A call enters a `Call`, which is thread-local and re-entrant: a hook
reads the one that its own thread entered last. Within `BARE`, or outside of any, the hooks do nothing.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from ept.layer.constants import LayerUpdates

__all__ = ["BARE", "Call", "Decoding", "Disabled", "bare", "begin", "current", "end", "entered", "site_of"]


class Decoding(Protocol):
    """What changes the arguments of the wrapped model's forward while it generates."""

    def arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Call:
    """One call: what its rows' adapters do to the modules that it runs.

    Attributes:
        entries: the modules by which the wrapped model is entered, the outermost first: itself, whose forward
            `decoding` changes, and the encoder of an encoder-decoder.
        layers: the layers that updates act on, and for each the sites of its calls in one pass, in order: which update
            it is, None for none. Layers that share their weights are called several times.
        updates: the updates in these layers, of all rows each, one after the other.
        heads: for each head of the backbone that is not the rows' own, what gives each row its own head's result.
        decoding: what embeds the new tokens while the model generates.
        batch_dim: which dimension of hidden states has the rows.
    """

    entries: tuple[nn.Module, ...] = ()
    layers: dict[nn.Module, tuple[int | None, ...]] = field(default_factory=dict)
    updates: tuple[LayerUpdates, ...] = ()
    heads: dict[nn.Module, Callable[[Tensor, tuple, dict], Tensor]] = field(default_factory=dict)
    decoding: Decoding | None = None
    batch_dim: int = 0

    def has_update(self, site: int | None) -> bool:
        """Whether any adapter has an update for a site."""
        return site is not None and any(site < len(updates.down) for updates in self.updates)

    def update(self, site: int, hidden: Tensor) -> Tensor:
        """Hidden states [batch, columns, d_layer], or [columns, batch, d_layer], at a site, updated row by row."""
        rows = hidden.transpose(0, self.batch_dim)
        for updates in self.updates:
            rows = updates.apply(site, rows)
        return rows.transpose(0, self.batch_dim)


BARE = Call()


@dataclass
class _Frame:
    """A call that a thread has entered.

    running: which of the call's entries are being run.
    counts: how often the current pass has entered each layer that is called several times.
    foreign: the module for whose sake a bare frame was opened, and `depth` how often it has been entered within.
    """

    call: Call
    running: list[nn.Module] = field(default_factory=list)
    counts: dict[nn.Module, int] = field(default_factory=dict)
    foreign: nn.Module | None = None
    depth: int = 0


class _Thread(threading.local):
    """frames: what a thread has entered, the innermost last.

    They are there before the first call: torch.compile would trace the one that makes them, and another for all others.
    """

    def __init__(self) -> None:
        self.frames: list[_Frame] = []


_thread = _Thread()


def current() -> Call:
    """The call that this thread entered last; `BARE` outside of any."""
    frames = _thread.frames
    return frames[-1].call if frames else BARE


def site_of(layer: nn.Module) -> int | None:
    """The site of the call of a layer that this thread is about to make; None where nothing is updated.

    It is asked once for each call: calls of a layer that shares its weights are counted.
    """
    frames = _thread.frames
    if not frames:
        return None
    frame = frames[-1]
    sites = frame.call.layers.get(layer)
    if sites is None:
        return None
    count = 0
    if len(sites) > 1:
        count = frame.counts.get(layer, 0)
        frame.counts[layer] = count + 1
    site = sites[count] if count < len(sites) else None
    return site if frame.call.has_update(site) else None


@contextlib.contextmanager
def entered(call: Call) -> Iterator[None]:
    """Within, the hooks act for this call."""
    frames = _thread.frames
    depth = len(frames)
    frames.append(_Frame(call))
    try:
        yield
    finally:
        del frames[depth:]


def bare() -> contextlib.AbstractContextManager[None]:
    """Within, the hooks do nothing: what runs is the bare backbone."""
    return entered(BARE)


def begin(module: nn.Module) -> None:
    """Records that an entry of the current call starts to run.

    An entry that starts again while it runs was called from a hook within the pass: a bare frame lasts until it ends.
    """
    frames = _thread.frames
    if not frames:
        return
    frame = frames[-1]
    if frame.foreign is module:
        frame.depth += 1
    elif module in frame.call.entries:
        order = frame.call.entries.index
        if any(order(other) >= order(module) for other in frame.running):
            frames.append(_Frame(BARE, foreign=module, depth=1))
        else:
            if not frame.running:
                frame.counts.clear()
            frame.running.append(module)


def end(module: nn.Module) -> None:
    """Records that an entry has ended, by an error or not."""
    frames = _thread.frames
    if not frames:
        return
    frame = frames[-1]
    if frame.foreign is module:
        frame.depth -= 1
        if not frame.depth:
            frames.pop()
    elif module in frame.running:
        frame.running.remove(module)


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
