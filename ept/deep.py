"""Deep prompts: at the input of every layer after the first, the prompt's rows get trained offsets of their own.

As P-tuning v2 (Liu et al. 2022) and VPT-deep (Jia et al. 2022) give each layer a prompt of its own; here what a layer
gets is added to what the layer before has made of the prompt, and starts at zero. The text's rows stay untouched.
"""

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbones import evaluating, positions_of, weight_of

if TYPE_CHECKING:
    from .inputs import Group

__all__ = ["DeepPrompts", "hooked", "layers_after_first", "layers_of", "measure", "path_of_layers"]


def path_of_layers(model: nn.Module) -> str | None:
    """Where the layers that read the prompt stand: the name of the largest list of modules (of an encoder-decoder, its
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
    """The layers that read the prompt, in order; empty where they are not found."""
    path = path_of_layers(model)
    return [] if path is None else list(cast(nn.ModuleList, model.get_submodule(path)))


def layers_after_first(model: nn.Module) -> int:
    """How many layers can have deep prompts. ValueError if none can."""
    layers = len(layers_of(model))
    if layers < 2:
        raise ValueError(
            f"{type(model).__name__} has no deep prompts: no layers after the first were found (it has one, or they share "
            "their weights, or they do not stand in one list); set deep_layers=0"
        )
    return layers - 1


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
            f"{name} has no deep prompts: its {len(layers)} layers should each read hidden states {tuple(embeds.shape)} once, "
            f"but {len(seen)} were read ({shapes}, …): set deep_layers=0"
        )
    return torch.stack([hidden.float().square().mean(-1).sqrt().median().cpu() for hidden in seen[1:]])


class DeepPrompts:
    """Within it, the layers of a backbone add the deep prompts of `groups` at the columns that `rows` names.

    `rows` [batch, width] numbers the prompt's rows from 1 (0: text or padding), each group's after those of the group
    before (`Group.first_row`); None where a pass has no prompt in it, as in decoding after a cached prefix. With
    `after_cache` a layer may read the last of the columns alone.

    It is of the thread that entered it, and the innermost one counts, so that calls from several threads and calls
    within others each add their own. The layers keep one hook each for good; outside, it does nothing.
    """

    def __init__(self, layers: list[nn.Module], groups: "list[Group]", rows: Tensor | None, after_cache: bool = False):
        self.groups, self.rows, self.after_cache = groups, rows, after_cache
        self.layers = hooked(layers)
        self.depth = max((group.layer.config.deep_layers for group in groups), default=0)
        if self.depth > len(self.layers):
            raise ValueError(
                f"deep_layers={self.depth}, but the backbone has {len(self.layers)} layers after the first left: "
                "it has changed since it was wrapped"
            )

    def __enter__(self) -> "DeepPrompts":
        _entered().append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _entered().pop()

    def add(self, number: int, hidden: Tensor) -> Tensor:
        """Hidden states [batch, columns, d] at the input of the layer `number` after the first, with the offsets."""
        if self.rows is None or number >= self.depth:
            return hidden
        rows = self.rows[:, -hidden.shape[1] :] if self.after_cache else self.rows
        # Beams and returned sequences repeat a batch's rows.
        if len(hidden) % len(rows) or rows.shape[1] != hidden.shape[1]:
            raise ValueError(
                f"deep prompts: a layer reads hidden states {tuple(hidden.shape)} where the input has {tuple(self.rows.shape)} "
                "columns: this backbone or this way to run it moves them; set deep_layers=0"
            )
        if len(hidden) != len(rows):
            rows = rows.repeat_interleave(len(hidden) // len(rows), 0)
        offsets = [self._of(group, number) for group in self.groups]
        table = torch.cat([torch.zeros_like(offsets[0][:1]), *offsets])
        return hidden + F.embedding(rows.to(table.device), table, padding_idx=0).to(hidden)

    def _of(self, group: "Group", number: int) -> Tensor:
        """[s, d] what the group's prompt gets at the layer `number` after the first."""
        if number < group.layer.config.deep_layers:
            return group.layer.deep_offset(number)
        return torch.zeros_like(group.layer.prompt)


_threads = threading.local()
_hooking = threading.Lock()


def _entered() -> list[DeepPrompts]:
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
                layer.register_forward_pre_hook(functools.partial(_add, number), with_kwargs=True)
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


def _within(deep: DeepPrompts, function: Callable, *args: Any, **kwargs: Any) -> Any:
    with deep:
        return function(*args, **kwargs)


def _add(number: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    entered = _entered()
    # A layer that was put into another module since (a checkpoint wrapper) leaves the work to that one.
    if not entered or number >= len(entered[-1].layers) or entered[-1].layers[number] is not module:
        return None
    hidden = entered[-1].add(number, _hidden(args, kwargs))
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def _hidden(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
