"""A fresh adapter: the model that it is put on, and the sizes that fill a budget."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ept.backbone.embeddings import embedding_width
from ept.backbone.layers import find_layers, look_for_layers
from ept.config import PRESETS, EPTConfig
from ept.layer.layer import EPTLayer
from ept.model.adapters import warn_of_input_only
from ept.model.model import EPTModel
from ept.model.start_values import init_prompt


def config_for_budget(model: PreTrainedModel, parameters: int, *, preset: str, **settings: Any) -> EPTConfig:
    """`EPTConfig.for_budget` for a backbone, which says how wide it is and how many layers have updates.

    Where the preset "default" leaves the layers to the backbone and it cannot have updates there, the budget is
    that of the preset "input", with a warning.
    """
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
    adapter_name: str = "default",
) -> "EPTModel":
    """Freezes a transformers model and puts a fresh EPT layer before it.

    Args:
        model: an encoder (with or without a head), an encoder-decoder, a causal LM, or a causal LM with a
            classification head. Its weights stay as they are and stop training, but for a classification head.
        config: the adapter's settings; None takes `EPTConfig()`.
        tokenizer: for init="text", and so that init="vocab" never draws special or unused tokens.
        token_counts: [vocab] how often each token occurs in your text; init="vocab" draws among the frequent ones.
        soft_prompt: Q [m, d], a trained soft prompt in the embeddings' own size, for init="decompose".
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
    return wrapped
