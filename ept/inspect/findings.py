"""Examines an adapter: its tensors, what can be computed from them, and the words nearest to its prompt."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ept.backbone.embeddings import weight_of
from ept.config import EPTConfig
from ept.files.adapter_dir import check_weights
from ept.layer.folded import FoldedLayer
from ept.layer.layer import EPTLayer
from ept.pretrained import SavedAdapter

__all__ = ["Findings", "examine"]

Words = list[list[tuple[str, float]]]  # for each prompt row its nearest words with their cosines


@dataclass
class Findings:
    """An adapter's content. Tensors are None where the part is off, or folded away.

    Attributes:
        directory, settings, record: where it is, its adapter_config.json, its run.json (empty if there is none).
        config, embed_dim, layer_dim: the settings, d, and the width of the layers' own updates (None without any).
        folded: whether it holds P* and C in place of the trained tensors.
        prompt: P* [s, d].
        gate: the weights of the spaces, [s, K].
        singular_values: of C in units of e, largest first.
        attention: the fusion's, [s, N].
        words: the words nearest to each prompt row; None without the backbone.
        why_no_words: why they were asked for and are missing.
    """

    directory: str
    settings: dict[str, Any]
    record: dict[str, Any]
    config: EPTConfig
    embed_dim: int
    folded: bool
    prompt: Tensor
    gate: Tensor | None
    singular_values: Tensor | None
    attention: Tensor | None
    words: Words | None = None
    why_no_words: str | None = None
    layer_dim: int | None = None


@torch.no_grad()
def examine(path: str, name_or_path: str | None = None, nearest: int = 3, *, revision: str | None = None) -> Findings:
    """Reads an adapter; its backbone's embeddings, for the nearest words, only if `nearest` is above 0.

    Args:
        path, revision: a directory, or a hub id and its branch, tag or commit.
        name_or_path: the backbone, where it is not in its old place.

    Raises:
        ValueError, OSError: the adapter is damaged, or the backbone that `name_or_path` names cannot be read; one that
            only the adapter names may be gone.
    """
    saved_adapter = SavedAdapter.open(path, revision=revision)
    layer = _layer_of(saved_adapter)
    check_weights(saved_adapter.directory)
    prompt, gate = layer.reconstruct()
    findings = Findings(
        path,
        saved_adapter.settings,
        saved_adapter.record,
        layer.config,
        layer.embed_dim,
        isinstance(layer, FoldedLayer),
        prompt,
        gate if gate.shape[1] else None,
        _singular_values(layer),
        _attention(layer),
        layer_dim=layer.layer_dim,
    )
    if nearest > 0:
        try:
            embeddings, tokenizer = saved_adapter.load_embeddings(name_or_path)
        except (OSError, ValueError) as error:
            if name_or_path is not None:
                raise
            findings.why_no_words = f"no nearest words: {' '.join(str(error).split())[:200]} (`name_or_path`)"
        else:
            findings.words = _nearest_words(prompt, embeddings, tokenizer, nearest)
    return findings


def _layer_of(saved_adapter: SavedAdapter) -> EPTLayer | FoldedLayer:
    """Makes the adapter's layer, without a backbone."""
    prompt = saved_adapter.tensors.get("prompt")
    if prompt is None or prompt.dim() != 2:
        raise ValueError(f"{saved_adapter.directory} holds no prompt [s, d]: it is damaged, copy it again")
    layer_dim = saved_adapter.tensors["deep_down"].shape[-1] if "deep_down" in saved_adapter.tensors else None
    layer_class = FoldedLayer if saved_adapter.settings.get("folded") else EPTLayer
    layer = layer_class(saved_adapter.config, prompt.shape[1], layer_dim=layer_dim)
    try:
        layer.load_state_dict({name: t for name, t in saved_adapter.tensors.items() if not name.startswith("head.")})
    except RuntimeError as error:
        raise ValueError(f"{saved_adapter.directory}: the tensors do not fit the config: {error}") from error
    return layer


def _singular_values(layer: EPTLayer | FoldedLayer) -> Tensor | None:
    """Computes the singular values of C in units of e: at most r of them are not zero."""
    config = layer.config
    if isinstance(layer, FoldedLayer):
        update = layer.text_update
        return None if update is None else torch.linalg.svdvals(update.double() / layer.embed_scale)[: config.rank]
    if layer.lowrank_a is None or layer.lowrank_b is None:
        return None
    _, a = torch.linalg.qr(layer.lowrank_a.double())  # an r by r problem in place of N by d
    _, b = torch.linalg.qr(layer.lowrank_b.double().T)
    return torch.linalg.svdvals(config.scale * a @ b.T)


def _attention(layer: EPTLayer | FoldedLayer) -> Tensor | None:
    """Computes softmax(P·Cᵀ/√d), step 3 of docs/method.md."""
    if isinstance(layer, FoldedLayer) or layer.lowrank_a is None or layer.lowrank_b is None:
        return None
    if not layer.config.fusion:
        return None
    c = layer.config.scale * layer.lowrank_a.double() @ layer.lowrank_b.double()
    return torch.softmax(layer.prompt.double() @ c.T / layer.embed_dim**0.5, dim=1)


def _nearest_words(prompt: Tensor, embeddings: nn.Module, tokenizer: PreTrainedTokenizerBase, nearest: int) -> Words:
    """Finds the vocabulary's words whose embeddings have the largest cosine with each row of P*."""
    vocab = len(weight_of(embeddings))
    table = torch.cat([embeddings(ids) for ids in torch.arange(vocab).split(8192)]).float()
    if table.shape[1] != prompt.shape[1]:
        raise ValueError(
            f"the model has embeddings of width {table.shape[1]}, the adapter of {prompt.shape[1]}: give its own model"
        )
    cosines = F.normalize(prompt.float(), dim=1) @ F.normalize(table, dim=1).T
    best = cosines.topk(min(nearest, vocab), dim=1)
    return [
        [(str(tokenizer.decode([i])).strip() or f"#{i}", v) for i, v in zip(ids, values, strict=True)]
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
