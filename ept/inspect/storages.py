"""Counts the memory of a computation: the storages that are alive while it runs, on real or on fake tensors."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["StorageCounter"]


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of the storages that operations make while it is active.

    What stood before is not counted, nor what an operation allocates and frees inside itself.

    Args:
        vocabulary: storages made for a tensor whose last dimension has this size are also counted as logits.

    Attributes:
        live: bytes that are alive now.
        peak: the most that were alive at once.
        peak_logits: the part of `peak` that is logits.
    """

    def __init__(self, vocabulary: int | None = None):
        super().__init__()
        self.vocabulary = vocabulary
        self.live = self.peak = self.peak_logits = self._live_logits = 0
        self._sizes: dict[int, tuple[int, int]] = {}  # a storage's address -> its bytes, and those that are logits

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A result that shares an input's storage (a view, a change in place) makes none.
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in inputs:
                self._count(tensor)
        if self.live > self.peak:
            self.peak, self.peak_logits = self.live, self._live_logits
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes()
        logits = size if tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary else 0
        self._sizes[key] = size, logits
        weakref.finalize(storage, self._forget, key).atexit = False
        self.live, self._live_logits = self.live + size, self._live_logits + logits

    def _forget(self, key: int) -> None:
        size, logits = self._sizes.pop(key)
        self.live, self._live_logits = self.live - size, self._live_logits - logits
