"""A readers–writer lock for one backbone: many calls at once, or one change of its adapters."""

import contextlib
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["AdapterLock", "lock_of"]


class AdapterLock:
    """Lets any number of threads call, or one thread change.

    A change waits until no other thread is in a call, and calls that come later wait for it. `calling` is re-entrant.
    Copies and pickles of a model get a lock of their own.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._calls: dict[int, int] = {}  # by thread, how many calls it is in, one within another
        self._changing: int | None = None  # the thread that changes
        self._waiting = 0  # changes that wait

    def __reduce__(self) -> tuple[type["AdapterLock"], tuple[()]]:
        return AdapterLock, ()

    def calling(self) -> contextlib.AbstractContextManager[None]:
        """Within, no other thread changes the adapters. A compiled pass holds no lock, which a graph cannot."""
        return contextlib.nullcontext() if torch.compiler.is_compiling() else self._calling()

    @contextlib.contextmanager
    def _calling(self) -> Iterator[None]:
        thread = threading.get_ident()
        with self._condition:
            # A call within a call must not wait for a change that waits for the outer one.
            if thread not in self._calls and self._changing != thread:
                self._condition.wait_for(lambda: self._changing is None and not self._waiting)
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
                if thread in self._calls:
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


_locks: weakref.WeakKeyDictionary[nn.Module, AdapterLock] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def lock_of(backbone: nn.Module) -> AdapterLock:
    """The lock of a backbone, one for all models that are wrapped around it: an active adapter's head stands in it."""
    with _making:
        return _locks.setdefault(backbone, AdapterLock())
