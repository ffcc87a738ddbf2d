"""The hooks that a wrapped model keeps for good. They read the thread's `Call` and know nothing of an adapter's tensors.

A layer's forward pre-hook updates what the layer reads; a head's forward hook gives each row its own adapter's head; the
wrapped model's forward pre-hook embeds the tokens that it generates, and notes who entered it. Outside of a call they do
nothing.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ept.backbone.layers import hidden_states_of
from ept.model.calls import Call, bare, begin, current, end, entered

__all__ = ["entries_of", "hook_entries", "hook_head", "hook_layers"]

CHECKPOINT = "_gradient_checkpointing_func"  # transformers', of every layer that can be checkpointed
_installing = threading.Lock()


def hook_layers(layers: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    """Installs the update hook on every layer but the first, once, and returns those layers.

    Where layers are checkpointed, their checkpoint function learns to keep the call, too.
    """
    later = tuple(layers[1:])
    if not all(map(_is_hooked, later)):
        with _installing:
            for number, layer in enumerate(later):
                _hook_layer(number, layer)
    return later


def _is_hooked(layer: nn.Module) -> bool:
    attributes = vars(layer)  # what wraps a layer passes on the layer's attributes
    function = attributes.get(CHECKPOINT)
    return "_ept_layer_hook" in attributes and (function is None or isinstance(function, _KeepsCall))


def _hook_layer(number: int, layer: nn.Module) -> None:
    if "_ept_layer_hook" not in vars(layer):
        layer._ept_layer_hook = True  # type: ignore[assignment]
        layer.register_forward_pre_hook(functools.partial(_update, number), with_kwargs=True)
    function = vars(layer).get(CHECKPOINT)
    if function is not None and not isinstance(function, _KeepsCall):
        setattr(layer, CHECKPOINT, _KeepsCall(function))


class _KeepsCall:
    """A checkpoint function whose layer, run again in the backward pass, is in the call of the first time.

    The backward pass may run in another thread, after the call.
    """

    def __init__(self, checkpoint: Callable):
        self.checkpoint = checkpoint

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(functools.partial(_in_call, current(), function), *args, **kwargs)


def _in_call(call: Call, function: Callable, *args: Any, **kwargs: Any) -> Any:
    with entered(call):
        return function(*args, **kwargs)


def _update(number: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    call = current()
    if not call.updates_layer(number, layer):
        return None
    hidden = hidden_states_of(args, kwargs)
    if layer.training and getattr(layer, "gradient_checkpointing", False) and torch.is_grad_enabled():
        # transformers checkpoints a layer's forward alone: without this the update would keep its steps for the backward.
        hidden = checkpoint(call.update, number, hidden, use_reentrant=False, preserve_rng_state=False)
    else:
        hidden = call.update(number, hidden)
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def hook_head(head: nn.Module) -> nn.Module:
    """Installs the routing hook on a head, once, and returns the head. Copies of a head keep it."""
    if _route_head not in head._forward_hooks.values():
        head.register_forward_hook(_route_head, with_kwargs=True)
    return head


def _route_head(head: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
    """The rows' own adapters' results [batch, …, labels of the widest head] in place of the active adapter's.

    Heads with fewer labels than the widest get -inf at the end, so that softmax and argmax are those of the row alone.
    """
    call = current()
    heads = call.heads.get(head)
    if heads is None or call.routing is None:
        return None
    features, *others = args
    rows = call.routing.split(features)
    with bare():  # the active adapter's head may be among them
        parts = [own(part, *others, **kwargs) for own, part in zip(heads, rows, strict=True)]
    widest = max(part.shape[-1] for part in parts)
    return call.routing.join([F.pad(part, (0, widest - part.shape[-1]), value=-torch.inf) for part in parts])


def hook_entries(backbone: nn.Module) -> None:
    """Installs the hooks that note when a wrapped model, and the encoder in it, are entered and left, once."""
    for entry in entries_of(backbone):
        if _begin not in entry._forward_pre_hooks.values():
            entry.register_forward_pre_hook(_begin, with_kwargs=True)
            entry.register_forward_hook(_end, always_call=True)


def entries_of(backbone: Any) -> tuple[nn.Module, ...]:
    """The modules by which a wrapped model is entered, the outermost first."""
    return (backbone, backbone.get_encoder()) if backbone.config.is_encoder_decoder else (backbone,)


def _begin(entry: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    begin(entry)
    call = current()
    if call.decoding is None or call.entries[0] is not entry:
        return None
    return args, call.decoding.arguments(kwargs)


def _end(entry: nn.Module, args: tuple, output: Any) -> None:
    end(entry)
