"""A backbone's layers: where they stand, and the size of what they read."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ept.backbone.embeddings import weight_of
from ept.backbone.probes import evaluating
from ept.backbone.traits import positions_of

__all__ = ["hidden_states_of", "layers_after_first", "layers_of", "measure", "path_of_layers"]


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
        seen.append(hidden_states_of(args, kwargs))

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


def hidden_states_of(args: tuple, kwargs: dict) -> Tensor:
    """What a layer reads, [batch, columns, d], from its forward's arguments."""
    return args[0] if args else kwargs["hidden_states"]
