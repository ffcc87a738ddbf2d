"""Deep updates: at the input of every layer after the first, a token-conditioned update with D and W of the layer's own.

What the first layer reads gets that update from the EPT layer; here the hidden states of the others do, column by column:
text and prompt alike, the same in a pass over a whole text and in a decoding step. As an adapter of a few hidden units
(Houlsby et al. 2019; He et al. 2022) it adds to the residual stream, and it starts at zero.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ept.backbone.layers import _hidden
from ept.model.inputs import Group, by_group, in_row_order
from ept_kernels.reference import ACTIVATIONS

__all__ = ["DeepUpdates", "hooked"]


class DeepUpdates:
    """Within it, the layers of a backbone update the hidden states that they read as the adapters of `groups` say.

    It is of the thread that entered it, and the innermost one counts, so that calls from several threads and calls
    within others each have their own. The layers keep one hook each for good; outside, it does nothing.
    """

    def __init__(self, layers: list[nn.Module], groups: list[Group]):
        self.groups, self.layers = groups, hooked(layers)
        depth = max((group.layer.config.deep_layers for group in groups), default=0)
        if depth > len(self.layers):
            raise ValueError(
                f"deep_layers={depth}, but the backbone has {len(self.layers)} layers after the first left: "
                "it has changed since it was wrapped"
            )
        # Drawn once, so that a layer that is run again in the backward pass leaves out what it left out before.
        self.dropout = [group.layer.draw_deep_dropout() for group in groups]

    def __enter__(self) -> "DeepUpdates":
        _entered().append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _entered().pop()

    def update(self, number: int, hidden: Tensor) -> Tensor:
        """Hidden states [batch, columns, d] at the input of the layer `number` after the first, updated."""
        if all(number >= group.layer.config.deep_layers for group in self.groups):
            return hidden
        if self.groups[0].rows is None:
            return self._of(0, number, hidden)
        # Beams and returned sequences repeat a batch's rows.
        times = len(hidden) // sum(len(group.rows) for group in self.groups if group.rows is not None)
        groups = [group.repeated(times) for group in self.groups]
        return in_row_order([self._of(i, number, part) for i, part in enumerate(by_group(hidden, groups))], groups)

    def _of(self, group: int, number: int, hidden: Tensor) -> Tensor:
        """What the group's adapter makes of its rows' hidden states."""
        layer, dropout = self.groups[group].layer, self.dropout[group]
        if number >= layer.config.deep_layers:
            return hidden
        down, up = layer.deep_tensors(number)
        if dropout is not None:
            up = up * dropout[number]
        dtype = torch.promote_types(hidden.dtype, down.dtype)
        down, up = down.to(hidden.device, dtype), up.to(hidden.device, dtype)
        units = ACTIVATIONS[layer.config.activation](F.linear(hidden.to(dtype), down))
        return hidden + (units @ up).to(hidden.dtype)


_threads = threading.local()
_hooking = threading.Lock()


def _entered() -> list[DeepUpdates]:
    """What this thread has entered, the innermost last."""
    if not hasattr(_threads, "entered"):
        _threads.entered = []
    return _threads.entered


def hooked(layers: list[nn.Module]) -> list[nn.Module]:
    """The layers after the first, each with its hook, and with what checkpoints it told to remember what is entered."""
    with _hooking:
        for number, layer in enumerate(layers[1:]):
            own = vars(layer)  # what wraps a layer passes on the layer's attributes
            if "_ept_deep_hook" not in own:
                layer._ept_deep_hook = True  # type: ignore[assignment]
                layer.register_forward_pre_hook(functools.partial(_update, number), with_kwargs=True)
            checkpoint = own.get(CHECKPOINT)
            if checkpoint is not None and not isinstance(checkpoint, _Remembering):
                setattr(layer, CHECKPOINT, _Remembering(checkpoint))
    return layers[1:]


CHECKPOINT = "_gradient_checkpointing_func"  # transformers', of every layer that can be checkpointed


class _Remembering:
    """A checkpoint function whose layer, run again in the backward pass, is within what it was within the first time."""

    def __init__(self, checkpoint: Callable):
        self.checkpoint = checkpoint

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        if not _entered():
            return self.checkpoint(function, *args, **kwargs)
        return self.checkpoint(functools.partial(_within, _entered()[-1], function), *args, **kwargs)


def _within(deep: DeepUpdates, function: Callable, *args: Any, **kwargs: Any) -> Any:
    with deep:
        return function(*args, **kwargs)


def _update(number: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    entered = _entered()
    # A layer that was put into another module since (a checkpoint wrapper) leaves the work to that one.
    if not entered or number >= len(entered[-1].layers) or entered[-1].layers[number] is not module:
        return None
    hidden = _hidden(args, kwargs)
    if module.training and getattr(module, "gradient_checkpointing", False) and torch.is_grad_enabled():
        # transformers checkpoints a layer's forward alone: without this the update would keep its steps for the backward.
        hidden = checkpoint(entered[-1].update, number, hidden, use_reentrant=False, preserve_rng_state=False)
    else:
        hidden = entered[-1].update(number, hidden)
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
