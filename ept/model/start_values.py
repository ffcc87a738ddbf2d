"""Where a fresh prompt starts: rows of frequent tokens, of given words, or of a trained soft prompt."""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ept.backbone.embeddings import weight_of
from ept.layer.layer import EPTLayer

__all__ = ["init_prompt", "token_counts"]

FREQUENT = 5000  # tokens that init="vocab" draws from, as Lester et al. 2021 do


def token_counts(rows: Iterable[Iterable[int]], vocab_size: int) -> Tensor:
    """[vocab] how often each token occurs in rows of token ids."""
    return torch.bincount(torch.tensor(list(itertools.chain.from_iterable(rows))), minlength=vocab_size)


def init_prompt(
    embedding: nn.Module,
    layer: EPTLayer,
    tokenizer: PreTrainedTokenizerBase | None,
    token_counts: Tensor | None,
    soft_prompt: Tensor | None,
    placeholders: tuple[int, ...] = (),
) -> None:
    """Starts the layer's prompt as its config's `init` says; the other arguments as in `get_ept_model`.

    `placeholders` of images are no words: a row of theirs would be taken for the place of an image.
    """
    config = layer.config
    if (config.init == "decompose") != (soft_prompt is not None):
        raise ValueError('init="decompose" and soft_prompt go together: give both or neither')
    if soft_prompt is not None:
        layer.init_decompose(soft_prompt)
    elif config.init == "text":
        if tokenizer is None:
            raise ValueError('init="text" needs the tokenizer: get_ept_model(model, config, tokenizer=tokenizer)')
        ids = tokenizer(config.init_text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        if len(ids) == 0:
            raise ValueError(f"init_text={config.init_text!r} holds no token")
        layer.init_prompt(embedding(ids.to(weight_of(embedding).device)))
    elif config.init in ("vocab", "adapters"):  # the latter has a fresh start beside the adapters
        ids = _frequent_ids(embedding, tokenizer, token_counts, placeholders)
        chosen = ids[torch.randperm(len(ids))[: config.prompt_length]]
        layer.init_prompt(embedding(chosen.to(weight_of(embedding).device)))


@torch.no_grad()
def _frequent_ids(
    embedding: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    token_counts: Tensor | None,
    placeholders: tuple[int, ...],
) -> Tensor:
    """Ids of frequent tokens: by counts if given, else the first of the vocabulary, which tokenizers sort so."""
    vocab = len(weight_of(embedding))
    allowed = torch.ones(vocab, dtype=torch.bool)
    # Tokens that were never trained keep a small norm; the padding's is often zero.
    norms = torch.cat(
        [embedding(ids).float().norm(dim=1) for ids in torch.arange(vocab).to(weight_of(embedding).device).split(8192)]
    )
    allowed &= (norms > 0.5 * norms.median()).cpu()
    allowed[[i for i in placeholders if i < vocab]] = False
    if tokenizer is not None:
        special = [i for i in tokenizer.all_special_ids if i < vocab]
        allowed[special] = False
    if token_counts is not None:
        if token_counts.dim() != 1 or len(token_counts) > vocab:
            raise ValueError(
                f"token_counts must be [vocab] with at most {vocab} entries, not {tuple(token_counts.shape)}"
            )
        counts = torch.nn.functional.pad(token_counts.cpu().double(), (0, vocab - len(token_counts)))
        ids = torch.argsort(counts * allowed, descending=True, stable=True)
        return ids[: max(1, min(FREQUENT, int((counts * allowed > 0).sum())))]
    ids = allowed.nonzero().flatten()
    return ids[:FREQUENT] if len(ids) else torch.arange(vocab)
