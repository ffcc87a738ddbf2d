"""Deep updates: at the input of every layer after the first, a token-conditioned update with D and W of the layer's own.

What the first layer reads gets that update from the EPT layer; here the hidden states of the others do, column by column:
text and prompt alike, the same in a pass over a whole text and in a decoding step. As an adapter of a few hidden units
(Houlsby et al. 2019; He et al. 2022) it adds to the residual stream, and it starts at zero.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ept_kernels.common.reference import ACTIVATIONS

from .backbones import embedding_width, evaluating, positions_of, weight_of
from .config import EPTConfig
from .inputs import Group, by_group, in_row_order

__all__ = ["DeepUpdates", "config_for_budget", "hooked", "layers_after_first", "layers_of", "measure", "path_of_layers"]


def path_of_layers(model: nn.Module) -> str | None:
    """Where the layers stand: the name of the largest list of modules (of an encoder-decoder, its
    encoder's). None where there is no list, or where each layer's parts stand in several lists side by side (XLM)."""
    reader = model.get_encoder() if model.config.is_encoder_decoder else model  # type: ignore[operator, union-attr]
    largest, size = None, 0
    for parent in reader.modules():
        lists = [child for child in parent.children() if isinstance(child, nn.ModuleList) and len(child)]
        for found in lists:
            parameters = sum(p.numel() for p in found.parameters())
            if parameters > size:
                alone = [len(other) for other in lists].count(len(found)) == 1
                largest, size = found if alone else None, parameters
    return next((name for name, module in model.named_modules() if module is largest), None)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Those layers, in order; empty where they are not found."""
    path = path_of_layers(model)
    return [] if path is None else list(cast(nn.ModuleList, model.get_submodule(path)))


def layers_after_first(model: nn.Module) -> int:
    """How many layers can have deep updates. ValueError if none can."""
    layers = len(layers_of(model))
    if layers < 2:
        raise ValueError(
            f"{type(model).__name__} has no deep updates: no layers after the first were found (it has one, or they share "
            "their weights, or they do not stand in one list); set deep_layers=0"
        )
    return layers - 1


def config_for_budget(model: PreTrainedModel, parameters: int, *, preset: str, **settings: Any) -> EPTConfig:
    """`EPTConfig.for_budget` for a backbone, which says how wide it is and how many layers deep_layers=-1 means."""
    if settings.get("deep_layers", -1 if preset == "deep" else 0) < 0:
        settings["deep_layers"] = layers_after_first(model)
    width = embedding_width(model.get_input_embeddings())
    return EPTConfig.for_budget(parameters, width, preset=preset, **settings)


@torch.no_grad()
def measure(model: Any) -> Tensor:
    """[layers − 1] fp32: the size h of the hidden states at the input of every layer after the first.

    The median over the tokens of their root mean square, which a few tokens of enormous size do not move; of 32 tokens
    out of the first 5,000 of the vocabulary. On the meta device, where nothing can be measured: ones.

    Raises:
        TypeError: the layers cannot be told apart, or do not hand on hidden states [batch, L, d] of the embeddings' width.
    """
    layers, embedding, name = layers_of(model), model.get_input_embeddings(), type(model).__name__
    weight, limit = weight_of(embedding), positions_of(model)[0]
    if weight.is_meta:
        return torch.ones(len(layers) - 1)
    # One row: some heads refuse several without a padding token.
    ids = torch.linspace(0, min(len(weight), 5000) - 1, min(32, limit or 32), device=weight.device).long().unsqueeze(0)
    embeds = embedding(ids)
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(_hidden(args, kwargs))

    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    reader = model.get_encoder() if model.config.is_encoder_decoder else model
    try:
        with evaluating(model):
            reader(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), return_dict=True)
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) != len(layers) or any(hidden.shape != embeds.shape for hidden in seen):
        shapes = ", ".join(str(tuple(hidden.shape)) for hidden in seen[:3]) or "none"
        raise TypeError(
            f"{name} has no deep updates: each of its {len(layers)} layers should read hidden states of the embeddings' shape "
            f"{tuple(embeds.shape)} once; {len(seen)} were read, of shapes {shapes}: set deep_layers=0"
        )
    return torch.stack([hidden.float().square().mean(-1).sqrt().median().cpu() for hidden in seen[1:]])


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


def _hidden(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
