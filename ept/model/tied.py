"""State dicts of models with tied weights: a tensor that has two names is written once."""

from typing import Any

from torch import Tensor, nn

__all__ = ["write_tied_once"]


def write_tied_once(model: nn.Module) -> None:
    """Makes a model's state dict leave out second names of a tensor, which safetensors refuses, and its loading know them."""
    model.register_state_dict_post_hook(_leave_out)
    model.register_load_state_dict_pre_hook(_put_back)


def _second_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter but its first, and that first one."""
    first: dict[int, str] = {}
    second = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            second[name] = known
    return second


def _leave_out(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name, first in _second_names(model).items():
        if prefix + first in state:
            state.pop(prefix + name, None)


def _put_back(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name, first in _second_names(model).items():
        if prefix + first in state:
            state.setdefault(prefix + name, state[prefix + first])
