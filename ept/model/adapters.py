"""What an adapter on a backbone is made of: its layer, its heads and what its labels are; fresh, or from its files."""

import copy
import dataclasses
import logging
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from ept.backbone.embeddings import embedding_rms, embedding_width, weight_of
from ept.backbone.layers import LayerSites, look_for_layers
from ept.backbone.traits import Traits
from ept.config import EPTConfig
from ept.layer.base import AdapterLayer
from ept.layer.folded import FoldedLayer
from ept.layer.layer import EPTLayer
from ept.model.hooks import hook_head
from ept.model.labels import Labels

__all__ = [
    "Adapter", "config_for", "new_folded_layer", "new_heads", "new_layer", "tensors_of_adapter", "warn_of_input_only",
]  # fmt: skip

logger = logging.getLogger("ept")

Layer = TypeVar("Layer", bound=AdapterLayer)


class Adapter(nn.Module):
    """An adapter that is not in use: its layer, its heads in the order of the backbone's, and what its labels are.

    Nothing of it trains. `frozen` has the names of the parameters that shall not train when it is in use, either.
    """

    def __init__(self, name: str, layer: AdapterLayer, heads: list[nn.Module], labels: Labels):
        super().__init__()
        self.name, self.layer, self.heads, self.labels = name, layer, nn.ModuleList(heads), labels
        self.frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        self.requires_grad_(False)

    def thaw(self) -> None:
        """Has its parameters train, but for those in `frozen`."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in self.frozen)

    def tensors(self, head_names: tuple[str, ...]) -> dict[str, Tensor]:
        """`tensors_of_adapter` of this one."""
        return tensors_of_adapter(self.layer, dict(zip(head_names, self.heads, strict=True)))


def tensors_of_adapter(layer: AdapterLayer, heads: dict[str, nn.Module]) -> dict[str, Tensor]:
    """An adapter's tensors as this process holds them: the layer's by name, the heads' under "head."."""
    tensors = layer.state_dict(keep_vars=True)
    for name, head in heads.items():
        tensors |= {f"head.{name}.{key}": value for key, value in head.state_dict(keep_vars=True).items()}
    return tensors


def config_for(backbone: PreTrainedModel, config: EPTConfig) -> EPTConfig:
    """A fresh adapter's settings for a backbone: deep_layers=None becomes -1, or the input-only form with a warning."""
    if config.deep_layers is not None:
        return config
    if not config.has_token_update:
        return dataclasses.replace(config, deep_layers=0)
    sites = look_for_layers(backbone)
    if isinstance(sites, LayerSites):
        return dataclasses.replace(config, deep_layers=-1)
    warn_of_input_only(backbone, sites)
    return config.as_input_only()


def warn_of_input_only(backbone: PreTrainedModel, reason: str) -> None:
    """Logs that the default acts on the input alone in a backbone, and why."""
    logger.warning(
        "%s has no updates in its layers (%s): the default falls back to the input-only form, EPTConfig.input_only(), "
        "which is less accurate where both are possible",
        type(backbone).__name__,
        reason,
    )


def new_layer(
    backbone: PreTrainedModel, traits: Traits, config: EPTConfig, sites: LayerSites | None = None
) -> EPTLayer:
    """A fresh layer for a backbone, on the device of its embeddings. Raises what does not fit.

    `sites`: where updates in the backbone's layers act; None where the config has none.
    """
    layer = EPTLayer(*_layer_arguments(backbone, traits, config, sites))
    if layer.deep_scale is not None and sites is not None:
        layer.deep_scale.copy_(sites.sizes[: len(layer.deep_scale)])
        layer.close_to(sites.outliers)
    return _beside_embeddings(layer, backbone)


def new_folded_layer(
    backbone: PreTrainedModel, traits: Traits, config: EPTConfig, sites: LayerSites | None
) -> FoldedLayer:
    """An empty folded layer for a backbone, on the device of its embeddings; `sites` as in `new_layer`."""
    return _beside_embeddings(FoldedLayer(*_layer_arguments(backbone, traits, config, sites)), backbone)


def _layer_arguments(
    backbone: PreTrainedModel, traits: Traits, config: EPTConfig, sites: LayerSites | None
) -> tuple[EPTConfig, int, int, int | None]:
    """The config with what only a backbone can say filled in, d, the text column of the prompt, and d_layer."""
    embedding = backbone.get_input_embeddings()
    if config.embed_scale is None:
        config = dataclasses.replace(config, embed_scale=embedding_rms(embedding))
    prompt_start = config.prompt_start
    if prompt_start is None:
        prompt_start = int(traits.kind.name == "encoder" and traits.reads_first_token)
    if traits.kind.causal and prompt_start != 0:
        raise ValueError(
            f"prompt_start={prompt_start}: a causal model's prompt stands before the text, where every token sees it; "
            "leave prompt_start at None"
        )
    if sites is not None and config.deep_layers:
        layers = len(sites.order)
        if config.deep_layers < 0:
            config = dataclasses.replace(config, deep_layers=layers)
        if config.known_deep_layers > layers:
            raise ValueError(f"deep_layers={config.deep_layers}, but the backbone has {layers} layers after the first")
    if traits.max_positions is not None and config.prompt_length >= traits.max_positions:
        raise ValueError(
            f"prompt_length={config.prompt_length} leaves no room for text in the backbone's {traits.max_positions} positions"
        )
    return config, embedding_width(embedding), prompt_start, None if sites is None else sites.width


def _beside_embeddings(layer: Layer, backbone: PreTrainedModel) -> Layer:
    """The layer, on the device of the backbone's embeddings where that is a real one."""
    weight = weight_of(backbone.get_input_embeddings())
    return layer if weight.is_meta else layer.to(weight.device)


def new_heads(heads: list[nn.Module], config: Any, num_labels: int, *, fresh: bool) -> list[nn.Module]:
    """Copies of heads for another number of labels; `fresh` ones have new weights.

    Args:
        heads: the active adapter's.
        config: of the backbone, which says how many labels these have and how weights start.
    """
    copies = [copy.deepcopy(head).requires_grad_(True) for head in heads]
    for number, head in enumerate(copies):
        for name, module in list(head.named_modules()):
            if not isinstance(module, nn.Linear):
                continue
            if module.out_features == config.num_labels != num_labels:
                has_bias, like = module.bias is not None, dict(device=module.weight.device, dtype=module.weight.dtype)
                module = nn.Linear(module.in_features, num_labels, has_bias, **like)
                _replace(copies, number, name, module)
            elif not fresh:
                continue
            nn.init.normal_(module.weight, std=getattr(config, "initializer_range", 0.02))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return [hook_head(head) for head in copies]


def _replace(heads: list[nn.Module], number: int, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of submodule `name` ("" is the head itself) of heads[number]."""
    if not name:
        module.train(heads[number].training)
        for hook in heads[number]._forward_pre_hooks.values():
            module.register_forward_pre_hook(hook)
        heads[number] = module
        return
    parent, _, child = name.rpartition(".")
    setattr(heads[number].get_submodule(parent), child, module)
