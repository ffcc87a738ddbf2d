"""NamedTuples to and from the flat arguments that torch.library wants, and when its operators can be left out."""

from typing import Any, get_type_hints

import torch
from torch import Tensor

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


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors, and nothing traces, transforms or intercepts what is done to them."""
    watched = (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )
    return not watched and all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
