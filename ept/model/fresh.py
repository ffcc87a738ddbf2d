"""A fresh adapter: the model that it is put on, and the sizes that fill a budget."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ept.backbone.embeddings import embedding_width
from ept.backbone.layers import find_layers
from ept.config import EPTConfig
from ept.layer.layer import EPTLayer
from ept.model.model import EPTModel
from ept.model.start_values import init_prompt


def config_for_budget(model: PreTrainedModel, parameters: int, *, preset: str, **settings: Any) -> EPTConfig:
    """`EPTConfig.for_budget` for a backbone, which says how wide it is and how many layers deep_layers=-1 means."""
    layer_dim = None
    deep_layers = settings.get("deep_layers", -1 if preset == "deep" else 0)
    if deep_layers:
        sites = find_layers(model)
        layer_dim = sites.width
        settings["deep_layers"] = len(sites.order) if deep_layers < 0 else deep_layers
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
