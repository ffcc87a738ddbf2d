"""The hooks that a wrapped model keeps for good. They read the thread's `Call` and know nothing of an adapter's tensors.

A layer's hook updates what the layer reads, or what the one before it gives; a head's forward hook gives each row its
own adapter's head; the wrapped model's forward pre-hook embeds the tokens that it generates, and notes who entered it.
Outside of a call they do nothing.
"""

import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ept.backbone.layers import hidden_states_of
from ept.backbone.traits import is_encoder_decoder
from ept.model.calls import Call, begin, current, end, entered, site_of

__all__ = ["entries_of", "hook_entries", "hook_head", "hook_layers", "pass_embeddings_on"]

CHECKPOINT = "_gradient_checkpointing_func"  # transformers', of every layer that can be checkpointed
_installing = threading.Lock()


def hook_layers(layers: Iterable[nn.Module], at: Literal["input", "output"]) -> None:
    """Installs the update hook on layers, once, before what they read or after what they give.

    Wraps the checkpoint function of layers that have one, so that a recomputation enters the call again.
    """
    layers = tuple(layers)
    if not all(map(_is_hooked, layers)):
        with _installing:
            for layer in layers:
                _hook_layer(layer, at)


def _is_hooked(layer: nn.Module) -> bool:
    attributes = vars(layer)  # what wraps a layer passes on the layer's attributes
    function = attributes.get(CHECKPOINT)
    return "_ept_layer_hook" in attributes and (function is None or isinstance(function, _KeepsCall))


def _hook_layer(layer: nn.Module, at: Literal["input", "output"]) -> None:
    if "_ept_layer_hook" not in vars(layer):
        layer._ept_layer_hook = True  # type: ignore[assignment]
        if at == "input":
            layer.register_forward_pre_hook(_update_input, with_kwargs=True)
        else:
            layer.register_forward_hook(_update_output)
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


def _update_input(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    site = site_of(layer)
    if site is None:
        return None
    call, hidden = current(), hidden_states_of(args, kwargs)
    if layer.training and getattr(layer, "gradient_checkpointing", False) and torch.is_grad_enabled():
        # transformers checkpoints a layer's forward alone: without this the update would keep its steps for the backward.
        hidden = checkpoint(call.update, site, hidden, use_reentrant=False, preserve_rng_state=False)
    else:
        hidden = call.update(site, hidden)
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def _update_output(layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
    site = site_of(layer)
    return None if site is None else current().update(site, output)


def hook_head(head: nn.Module) -> nn.Module:
    """Installs the routing hook on a head and on the linear maps in it, once, and returns the head. Copies of a head keep it."""
    for module in head.modules():
        if (module is head or type(module) is nn.Linear) and _route_head not in module._forward_hooks.values():
            module.register_forward_hook(_route_head, with_kwargs=True)
    return head


def _route_head(head: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
    """The rows' own adapters' results [batch, …, labels of the widest head] in place of the active adapter's.

    Heads with fewer labels than the widest get -inf at the end, so that softmax and argmax are those of the row alone.
    """
    own = current().heads.get(head)
    if own is None:
        return None
    features, *others = args
    return own(features, tuple(others), kwargs).to(output.dtype)


def hook_entries(backbone: nn.Module) -> None:
    """Installs the hooks that note when a wrapped model, and the encoder in it, are entered and left, once."""
    for entry in entries_of(backbone):
        if _begin not in entry._forward_pre_hooks.values():
            entry.register_forward_pre_hook(_begin, with_kwargs=True)
            entry.register_forward_hook(_end, always_call=True)


def pass_embeddings_on(backbone: Any) -> None:
    """Lets a model's `generate` take `inputs_embeds`, where its own preparation passes them on but does not name them."""
    parameters = inspect.signature(backbone.prepare_inputs_for_generation).parameters
    passes = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    if passes and "inputs_embeds" not in parameters:
        backbone.prepare_inputs_for_generation = types.MethodType(_prepare_with_embeddings, backbone)


def _prepare_with_embeddings(backbone: Any, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
    return type(backbone).prepare_inputs_for_generation(backbone, *args, inputs_embeds=inputs_embeds, **kwargs)


def entries_of(backbone: Any) -> tuple[nn.Module, ...]:
    """The modules by which a wrapped model is entered, the outermost first."""
    return (backbone, backbone.get_encoder()) if is_encoder_decoder(backbone) else (backbone,)


def _begin(entry: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    begin(entry)
    call = current()
    if call.decoding is None or call.entries[0] is not entry:
        return None
    return args, call.decoding.arguments(kwargs)


def _end(entry: nn.Module, args: tuple, output: Any) -> None:
    end(entry)
