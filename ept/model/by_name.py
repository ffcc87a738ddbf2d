"""State dicts of models with several adapters: each adapter's tensors go to the adapter of its name.

The active adapter's stand under `ept.` and in the wrapped model, those of any other under `inactive_adapters.adapter_NAME.`.
Which one is active may be another when a state dict is loaded than when it was made.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ept.model.adapters import Adapter

__all__ = ["InactiveAdapters", "load_by_name"]


class InactiveAdapters(nn.ModuleList):
    """A model's adapters but the active one; a list whose modules are called by the adapters' names."""

    def append(self, module: nn.Module) -> "InactiveAdapters":
        """Adds an Adapter at the end."""
        if not isinstance(module, Adapter):
            raise TypeError(f"{type(module).__name__} is no Adapter")
        self.add_module(_key(module.name), module)
        return self

    def extend(self, modules: Any) -> "InactiveAdapters":
        """Adds several Adapters at the end."""
        for module in modules:
            self.append(module)
        return self

    def __getitem__(self, number: Any) -> Any:
        return list(self)[number]


def _key(adapter_name: str) -> str:
    """The name as that of a module, which has no dot."""
    return "adapter_" + adapter_name.replace("%", "%25").replace(".", "%2E")


def load_by_name(model: nn.Module) -> None:
    """Makes an EPTModel load state dicts that were made while another adapter was active, or that number the inactive ones."""
    model.register_load_state_dict_pre_hook(_bring_in_place)


def _bring_in_place(model: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Renames a state dict's tensors to where their adapter stands in the model; unknown adapters are left to torch's error."""
    inactive = f"{prefix}inactive_adapters."
    saved = dict.fromkeys(name[len(inactive) :].split(".")[0] for name in state if name.startswith(inactive))
    moves: dict[str, str] = {}
    if all(key.isdecimal() for key in saved):  # none, or numbers, which give the order
        for number, adapter in enumerate(model.inactive_adapters):
            moves[f"{inactive}{number}."] = f"{inactive}{_key(adapter.name)}."
    else:
        names = {_key(name): name for name in model.adapter_names}
        active, *others = [key for key in names if key not in saved] or [""]
        here = _key(model.active_adapter)
        if active != here and not others and saved.keys() <= names.keys():
            for own, parked in _places(model):
                moves[f"{prefix}{own}."] = f"{inactive}{active}.{parked}."
                moves[f"{inactive}{here}.{parked}."] = f"{prefix}{own}."
    moved = {}
    for before, after in moves.items():
        for name in [name for name in state if name.startswith(before)]:
            moved[after + name[len(before) :]] = state.pop(name)
    state.update(moved)


def _places(model: Any) -> Iterator[tuple[str, str]]:
    """Where a part of an adapter stands in a model while the adapter is active, and within its Adapter while it is not."""
    yield "ept", "layer"
    for number, name in enumerate(model.head_names):
        yield f"base_model.{name}", f"heads.{number}"
