"""A backbone's word embeddings: the module, its weight, its width and its size."""

from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["embedding_rms", "embedding_width", "is_plain", "weight_of"]


def is_plain(embedding: nn.Module) -> bool:
    """Whether the module is a table look-up and nothing else, so that the fused path may read its weight."""
    hooked = embedding._forward_hooks or embedding._forward_pre_hooks
    floating = getattr(embedding, "weight", None) is not None and weight_of(embedding).is_floating_point()
    return type(embedding) is nn.Embedding and embedding.max_norm is None and not hooked and floating


def weight_of(embedding: nn.Module) -> Tensor:
    """E [vocab, d], as transformers names it in every embedding module."""
    return cast(Tensor, embedding.weight)


def embedding_width(embedding: nn.Module) -> int:
    width = getattr(embedding, "embedding_dim", None)
    return weight_of(embedding).shape[1] if width is None else width


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
