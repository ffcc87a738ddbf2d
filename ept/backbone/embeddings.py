"""A backbone's word embeddings: the module, its weight, its width and its size."""

from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = [
    "device_of",
    "embedding_rms",
    "embedding_width",
    "is_plain",
    "lacks_weights",
    "placeholder_columns",
    "weight_of",
]


def is_plain(embedding: nn.Module) -> bool:
    """Whether the module is a table look-up and nothing else, so that the fused path may read its weight."""
    hooked = embedding._forward_hooks or embedding._forward_pre_hooks
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None or hooked:
        return False
    return embedding.weight.is_floating_point() and not embedding.weight.is_meta  # accelerate may keep it elsewhere


def weight_of(embedding: nn.Module) -> Tensor:
    """E [vocab, d], as transformers names it in every embedding module; also where accelerate keeps it elsewhere."""
    weight = cast(Tensor, embedding.weight)
    elsewhere = _offloaded(embedding)
    return weight if not weight.is_meta or elsewhere is None else elsewhere["weight"]


def device_of(embedding: nn.Module) -> torch.device:
    """The device of the ids that the module looks up."""
    return weight_of(embedding).device


def lacks_weights(model: nn.Module) -> bool:
    """Whether a model is on the meta device, so that nothing can be computed; one whose weights are offloaded is not."""
    return any(
        _offloaded(module) is None and any(parameter.is_meta for parameter in module.parameters(recurse=False))
        for module in model.modules()
    )


def _offloaded(module: nn.Module) -> Any:
    """The tensors by name that accelerate's hook puts into a module for each call; None where it keeps none."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # several stand in one
    return next((each.weights_map for each in hooks if getattr(each, "weights_map", None) is not None), None)


def embedding_width(embedding: nn.Module) -> int:
    width = getattr(embedding, "embedding_dim", None)
    return weight_of(embedding).shape[1] if width is None else width


@torch.no_grad()
def placeholder_columns(ids: tuple[int, ...], embedding: nn.Module, embeds: Tensor) -> Tensor | None:
    """[batch, L] whether embeddings [batch, L, d] are those of placeholders; None without any.

    transformers finds the columns of images so, to the bit, where it gets embeddings in place of ids.
    """
    rows = len(weight_of(embedding))
    known = torch.tensor([i for i in ids if i < rows], dtype=torch.int64, device=embeds.device)
    if not len(known):
        return None if not ids else torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    same = [(embeds == placeholder).all(-1) for placeholder in embedding(known).to(embeds.dtype)]
    return torch.stack(same).any(0)


@torch.no_grad()
def embedding_rms(embedding: nn.Module) -> float:
    """e: the root mean square of what the embedding module gives, over its whole vocabulary."""
    weight = weight_of(embedding)
    if weight.is_meta:
        raise ValueError("the backbone is on the meta device: load its weights first, or give embed_scale")
    total, count = 0.0, 0
    for ids in torch.arange(len(weight), device=weight.device).split(8192):
        rows = embedding(ids).double()
        total, count = total + rows.square().sum().item(), count + rows.numel()
    if not total > 0:
        raise ValueError(
            "the backbone's word embeddings are all zero or NaN: load its weights first, or give embed_scale"
        )
    return (total / count) ** 0.5
