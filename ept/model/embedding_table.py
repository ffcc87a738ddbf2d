"""The token-conditioned update as a table of embeddings."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ept.backbone.embeddings import weight_of

if TYPE_CHECKING:
    from ept.model.model import EPTModel

__all__ = ["embedding_table"]


@torch.no_grad()
def embedding_table(model: "EPTModel") -> Tensor:
    """The token-conditioned update as a new table of embeddings, E + e·σ(E/e·Dᵀ)·W [vocab, d] in E's dtype.

    A backbone that looks its input up in this table needs D and W no more. It is for the input alone: where the
    backbone's output layer shares the table (`tie_word_embeddings`), that must keep the old one.
    """
    layer, embedding = model.ept, model.base_model.get_input_embeddings()
    if layer.token_down is None:
        raise ValueError("this adapter has no token-conditioned update: the backbone's own embeddings are the table")
    rows = []
    weight = weight_of(embedding)
    for ids in torch.arange(len(weight), device=weight.device).split(8192):
        # Beyond the last position there is only the token-conditioned update.
        beyond = ids.new_full((1, len(ids)), layer.config.max_text_length)
        rows.append(layer.continue_text(embedding(ids).unsqueeze(0), beyond)[0])
    return torch.cat(rows)
