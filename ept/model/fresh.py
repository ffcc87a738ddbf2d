"""A fresh adapter: the model that it is put on, and the sizes that fill a budget."""

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ept.backbone.embeddings import embedding_width
from ept.backbone.layers import find_layers, look_for_layers
from ept.config import PRESETS, EPTConfig, check_choice
from ept.layer.layer import EPTLayer
from ept.model.adapters import warn_of_input_only
from ept.model.files import AdapterFiles
from ept.model.model import EPTModel
from ept.model.start_values import init_prompt
from ept.model.transfer import Source, Suitability, start_from


def config_for_budget(
    model: PreTrainedModel, parameters: int, *, preset: str = "default", **settings: Any
) -> EPTConfig:
    """Returns a preset's config whose sizes fill a budget of trained parameters exactly or just below.

    It is `EPTConfig.for_budget` with what the backbone says: how wide it is and how many layers have updates. Where the
    default preset finds no such layers, the sizes are those of the preset "input", with a warning.

    Args:
        parameters: the budget, without a task head.
        preset: "default", "deep", "input" or "paper".
        settings: any field of EPTConfig; a size given here is kept and the others fill the rest.

    Raises:
        ValueError: the budget is too small, or the given sizes exceed it; an unknown preset; or "deep" on a backbone
            whose layers cannot be found.
    """
    check_choice("preset", preset, PRESETS)
    layer_dim, deep_layers = None, settings.get("deep_layers", PRESETS[preset]().deep_layers)
    if deep_layers is None and (settings.get("token_rank") == 0 or settings.get("token_update") is False):
        deep_layers = 0
    sites = look_for_layers(model) if deep_layers is None else find_layers(model) if deep_layers else None
    if isinstance(sites, str):
        warn_of_input_only(model, sites)
        preset, deep_layers = "input", 0
    elif sites is not None:
        layer_dim = sites.width
        deep_layers = len(sites.order) if deep_layers is None or deep_layers < 0 else deep_layers
    settings["deep_layers"] = deep_layers
    width = embedding_width(model.get_input_embeddings())
    return EPTConfig.for_budget(parameters, width, layer_dim=layer_dim, preset=preset, **settings)


def get_ept_model(
    model: PreTrainedModel,
    config: EPTConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    token_counts: Tensor | None = None,
    soft_prompt: Tensor | None = None,
    init_adapters: Sequence[str | os.PathLike | tuple[EPTConfig, dict[str, Tensor]]] | None = None,
    init_rows: dict[str, Tensor] | None = None,
    init_weights: Sequence[float] | None = None,
    adapter_name: str = "default",
) -> "EPTModel":
    """Freezes a transformers model and returns an EPTModel around it with a fresh adapter.

    Args:
        model: an encoder (with or without a head), an encoder-decoder, a causal LM, or a causal LM with a
            classification head. Its weights stay as they are and stop training, but for a classification head.
        config: the adapter's settings; None takes `EPTConfig()`.
        tokenizer: for init="text", and so that init="vocab" never draws special or unused tokens.
        token_counts: [vocab] how often each token occurs in your text; init="vocab" draws among the frequent ones.
        soft_prompt: Q [m, d], a trained soft prompt in the embeddings' own size, for init="decompose".
        init_adapters: trained adapters of the same backbone and the same sizes, for init="adapters": directories or hub
            ids, or pairs of a config and tensors. A head is not taken from them. What was started from is kept in
            `model.started_from`.
        init_rows: a batch of the new task with its labels, up to 200 rows of which weight the adapters by the
            leave-one-out error of a ridge regression on what the head reads. Adapters that were trained from one start
            are summed; of others, and of one alone, the best is taken, or none if a fresh one is better.
        init_weights: numbers by which the adapters are summed, in place of `init_rows`. One adapter needs neither.
        adapter_name: what `add_adapter`'s others know it by.

    Raises:
        ValueError, TypeError: the model or the settings cannot work together, with the reason.
    """
    config = EPTConfig() if config is None else config
    if not isinstance(config, EPTConfig):
        raise TypeError(f"config must be an EPTConfig, not {type(config).__name__}: EPTConfig.from_dict makes one")
    wrapped = EPTModel(model, config, adapter_name)
    if isinstance(wrapped.ept, EPTLayer):  # as a fresh one is
        placeholders = wrapped.traits.placeholders
        init_prompt(model.get_input_embeddings(), wrapped.ept, tokenizer, token_counts, soft_prompt, placeholders)
        _start_from_adapters(wrapped, wrapped.ept, init_adapters, init_rows, init_weights)
    return wrapped


def _start_from_adapters(
    wrapped: EPTModel,
    layer: EPTLayer,
    adapters: Sequence[str | os.PathLike | tuple[EPTConfig, dict[str, Tensor]]] | None,
    rows: dict[str, Tensor] | None,
    weights: Sequence[float] | None,
) -> None:
    """Starts the layer from trained adapters where its config says so."""
    if (layer.config.init == "adapters") != bool(adapters):
        raise ValueError('init="adapters" and init_adapters go together: give both or neither')
    if not adapters and (rows is not None or weights is not None):
        raise ValueError('init_rows and init_weights are for init="adapters": give init_adapters, or leave them out')
    if rows is not None and weights is not None:
        raise ValueError("give init_rows or init_weights, not both")
    if not adapters:
        return
    sources = []
    for number, adapter in enumerate(adapters):
        if isinstance(adapter, tuple):
            sources.append(Source(f"adapter {number}", *adapter))
            continue
        saved = AdapterFiles.read(adapter)
        saved.check_backbone(wrapped.base_model)
        if saved.is_folded:
            raise ValueError(
                f"{saved.directory} is folded, for inference only: give the adapter that it was folded from"
            )
        sources.append(Source(str(adapter), saved.config, saved.tensors))
    error = None if rows is None else Suitability(wrapped, rows).error
    wrapped.started_from = start_from(layer, sources, weights, error)
