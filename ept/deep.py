"""Deep prompts: at the input of every layer after the first, the prompt's rows get trained offsets of their own.

As P-tuning v2 (Liu et al. 2022) and VPT-deep (Jia et al. 2022) give each layer a prompt of its own; here what a layer
gets is added to what the layer before has made of the prompt, and starts at zero. The text's rows stay untouched.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from .backbones import positions_of, weight_of

if TYPE_CHECKING:
    from .inputs import Group

__all__ = ["DeepPrompts", "layers_of", "measure"]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers that read the prompt, in order: the largest list of modules (of an encoder-decoder, its encoder's)."""
    reader = model.get_encoder() if model.config.is_encoder_decoder else model  # type: ignore[operator, union-attr]
    lists = [module for module in reader.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return list(max(lists, key=lambda found: sum(p.numel() for p in found.parameters()), default=[]))


@torch.no_grad()
def measure(model: Any) -> Tensor:
    """[layers − 1] fp32: the size h of the hidden states at the input of every layer after the first.

    The median over the tokens of their root mean square, which a few tokens of enormous size do not move; of 32 tokens
    out of the first 5,000 of the vocabulary. On the meta device, where nothing can be measured: ones.

    Raises:
        TypeError: the layers cannot be told apart, or do not hand on hidden states [batch, L, d] of the embeddings' width.
    """
    layers, embedding, name = layers_of(model), model.get_input_embeddings(), type(model).__name__
    if any(p.is_meta for p in model.parameters()):
        return torch.ones(len(layers) - 1)
    weight, limit = weight_of(embedding), positions_of(model)[0]
    ids = torch.linspace(0, min(len(weight), 5000) - 1, 32, device=weight.device).long()
    ids = ids.view(2, 16)[:, : min(16, limit or 16)]
    embeds = embedding(ids)
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(_hidden(args, kwargs))

    training = {module: module.training for module in model.modules()}
    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        model.eval()
        reader = model.get_encoder() if model.config.is_encoder_decoder else model
        reader(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), return_dict=True)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    if len(seen) != len(layers) or any(hidden.shape != embeds.shape for hidden in seen):
        shapes = ", ".join(str(tuple(hidden.shape)) for hidden in seen[:3]) or "none"
        raise TypeError(
            f"{name} has no deep prompts: its {len(layers)} layers should each read hidden states {tuple(embeds.shape)} once, "
            f"but {len(seen)} were read ({shapes}, …): set deep_layers=0"
        )
    return torch.stack([hidden.float().square().mean(-1).sqrt().median().cpu() for hidden in seen[1:]])


class DeepPrompts:
    """Within it, a backbone's layers add the deep prompts of `groups` at the columns that `rows` names.

    `rows` [batch, width] numbers the prompt's rows from 1 (0: text or padding), each group's after those of the group
    before (`Group.first_row`); None where a pass has no prompt in it, as in decoding after a cached prefix.
    """

    def __init__(self, layers: list[nn.Module], groups: "list[Group]", rows: Tensor | None):
        depth = max(group.layer.config.deep_layers for group in groups)
        self.layers, self.groups, self.rows = layers[1 : 1 + depth], groups, rows
        self._checkpointing = [m for layer in layers for m in layer.modules() if _checkpoints(m)]
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> "DeepPrompts":
        for number, layer in enumerate(self.layers):
            hook = functools.partial(self._add, number)
            handle: RemovableHandle = layer.register_forward_pre_hook(hook, with_kwargs=True)
            self._undo.append(handle.remove)
        for module in self._checkpointing:
            name = "_gradient_checkpointing_func"
            original: Any = getattr(module, name)
            setattr(module, name, functools.partial(self._checkpointed, original))
            self._undo.append(functools.partial(setattr, module, name, original))
        return self

    def __exit__(self, *error: Any) -> None:
        while self._undo:
            self._undo.pop()()

    def _checkpointed(self, original: Callable, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """A checkpointed layer runs again in the backward pass, when the forward pass has long been left."""

        def again(*args: Any, **kwargs: Any) -> Any:
            if self._undo:
                return function(*args, **kwargs)
            with self:
                return function(*args, **kwargs)

        return original(again, *args, **kwargs)

    def _add(self, number: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.rows is None:
            return None
        hidden = _hidden(args, kwargs)
        # Beams and returned sequences repeat a batch's rows; columns that a cache holds already are not read again.
        rows = self.rows[:, -hidden.shape[1] :]
        if len(hidden) % len(rows) or rows.shape[1] != hidden.shape[1]:
            raise ValueError(
                f"deep prompts: a layer reads hidden states {tuple(hidden.shape)} where the input has {tuple(self.rows.shape)} "
                "columns: this backbone or this way to run it moves them; set deep_layers=0"
            )
        if len(hidden) != len(rows):
            rows = rows.repeat_interleave(len(hidden) // len(rows), 0)
        table = torch.cat(
            [torch.zeros_like(self.groups[0].layer.prompt[:1]), *(self._of(group, number) for group in self.groups)]
        )
        added = F.embedding(rows.to(table.device), table, padding_idx=0).to(hidden)
        if args:
            return (hidden + added, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden + added}

    def _of(self, group: "Group", number: int) -> Tensor:
        """[s, d] what the group's prompt gets at the layer `number` after the first."""
        if number < group.layer.config.deep_layers:
            return group.layer.deep_offset(number)
        return torch.zeros_like(group.layer.prompt)


def _hidden(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _checkpoints(module: nn.Module) -> bool:
    return getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func")
