"""A readers–writer lock for one backbone: many calls at once, or one change of its adapters."""

import contextlib
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["calling", "changing", "lock_of"]


PATIENCE = 5.0  # seconds that a call waits behind a change which itself waits for other calls


class AdapterLock:
    """Lets any number of threads call, or one thread change.

    A change waits until no other thread is in a call. Calls that come meanwhile wait for it, so that it gets its turn; but
    for `PATIENCE` only, since a call that goes on may itself be waiting for one of them (in a thread that a logits
    processor or a streamer started). `calling` is re-entrant.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._calls: dict[int, int] = {}  # by thread, how many calls it is in, one within another
        self._changing: int | None = None  # the thread that changes
        self._waiting = 0  # changes that wait

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Within, no other thread changes the adapters."""
        thread = threading.get_ident()
        with self._condition:
            # A call within a call must not wait for a change that waits for the outer one.
            if thread not in self._calls and self._changing != thread:
                self._condition.wait_for(lambda: self._changing is None and not self._waiting, PATIENCE)
                self._condition.wait_for(lambda: self._changing is None)
            self._calls[thread] = self._calls.get(thread, 0) + 1
        try:
            yield
        finally:
            with self._condition:
                self._calls[thread] -= 1
                if not self._calls[thread]:
                    del self._calls[thread]
                    self._condition.notify_all()

    @contextlib.contextmanager
    def changing(self, what: str) -> Iterator[None]:
        """Within, this thread alone uses the model. RuntimeError, which names `what`, inside a call of the same thread."""
        thread = threading.get_ident()
        with self._condition:
            nested = self._changing == thread
            if not nested:
                if self.is_calling():
                    raise RuntimeError(
                        f"{what} inside a call of the model would change it half-way: do it outside the call"
                    )
                self._waiting += 1
                try:
                    self._condition.wait_for(lambda: self._changing is None and not self._calls)
                finally:
                    self._waiting -= 1
                self._changing = thread
        try:
            yield
        finally:
            if not nested:
                with self._condition:
                    self._changing = None
                    self._condition.notify_all()

    def is_calling(self) -> bool:
        """Whether this thread is in a call."""
        return threading.get_ident() in self._calls


_locks: weakref.WeakKeyDictionary[nn.Module, AdapterLock] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def lock_of(backbone: nn.Module) -> AdapterLock:
    """The lock of a backbone, one for all models that are wrapped around it: an active adapter's head stands in it."""
    with _making:
        return _locks.setdefault(backbone, AdapterLock())


def calling(backbone: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within, no other thread changes the adapters of the models around a backbone.

    A compiled graph cannot hold a lock, so it takes none.
    """
    return contextlib.nullcontext() if torch.compiler.is_compiling() else lock_of(backbone).calling()


def changing(backbone: nn.Module, what: str) -> contextlib.AbstractContextManager[None]:
    """Within, this thread alone uses the models around a backbone; `what` it does is for the error inside a call."""
    return lock_of(backbone).changing(what)
