"""NamedTuples to and from the flat arguments that torch.library wants, and when its operators can be left out."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.nn import Parameter

_SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "SymInt", bool: "bool", str: "str",
}  # fmt: skip


def schema_of(*parts: type[tuple], returns: int, **single: Any) -> str:
    """The schema of an operator that takes the fields of the NamedTuples, then `single`, and returns tensors."""
    fields = [field for part in parts for field in get_type_hints(part).items()] + list(single.items())
    arguments = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in fields)
    return f"({arguments}) -> ({', '.join(['Tensor'] * returns)})"


def unflatten(flat: Any, *parts: type[tuple]) -> list[Any]:
    """The NamedTuples made of the flat values in their order, then what is left over, one by one."""
    flat = list(flat)
    made: list[Any] = []
    for part in parts:
        size = len(part._fields)  # type: ignore[attr-defined]
        made.append(part(*flat[:size]))
        del flat[:size]
    return made + flat


class Call:
    """What is known of the calls whose tensors and settings are alike: their arguments passed the checks."""

    __slots__ = ("contiguous", "replays")

    def __init__(self, contiguous: bool) -> None:
        self.contiguous = contiguous  # all tensors, in row-major order
        self.replays: dict[Any, Any] = {}  # their launches, as common/triton_repeat.py recorded them


class Calls:
    """The calls of one function that passed its checks, by shape, dtype, strides and device of each tensor and by settings."""

    MOST = 1024  # kept; after that many they start anew

    def __init__(self, check: Callable[..., None]) -> None:
        self._check = check
        self._calls: dict[Any, Call] = {}

    def checked(self, tensors: Sequence[Tensor | None], settings: Hashable, *arguments: Any) -> Call | None:
        """Calls `check(*arguments)` unless that passed before. None where something traces or transforms the tensors."""
        if not is_eager(*tensors):
            self._check(*arguments)
            return None
        key = (settings, *[None if t is None else (t.shape, t.dtype, t.stride(), t.device) for t in tensors])
        call = self._calls.get(key)
        if call is None:
            self._check(*arguments)
            if len(self._calls) >= self.MOST:
                self._calls.clear()
            call = self._calls[key] = Call(all(t is None or t.is_contiguous() for t in tensors))
        return call


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors, and nothing traces, transforms or intercepts what is done to them."""
    if is_traced() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    for t in tensors:  # noqa: SIM110  all(…) takes twice the time
        if t is not None and type(t) is not Tensor and type(t) is not Parameter:
            return False
    return True


def is_traced() -> bool:
    """Whether torch.compile, torch.jit or a transform of functorch follows what is done."""
    return torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active()


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Applies an autograd function in an eager call, past `Function.apply`, which looks for what `is_eager` has ruled out."""
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
