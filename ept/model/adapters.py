"""What an adapter on a backbone is made of: its layer, its heads and what its labels are; fresh, or from its files."""

import copy
import dataclasses
import logging
import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ept.backbone.embeddings import embedding_rms, embedding_width, weight_of
from ept.backbone.fingerprint import backbone_fingerprint, check_fingerprint
from ept.backbone.layers import LayerSites, look_for_layers
from ept.backbone.traits import Traits
from ept.config import EPTConfig
from ept.files.adapter_dir import check_weights, read_adapter
from ept.layer.base import AdapterLayer
from ept.layer.folded import FoldedLayer
from ept.layer.layer import EPTLayer
from ept.model.hooks import hook_head
from ept.sharding import put, whole_shape

__all__ = [
    "Adapter",
    "Labels",
    "SavedAdapter",
    "config_for",
    "copy_tensors",
    "new_heads",
    "new_layer",
    "tensors_of_adapter",
    "warn_of_input_only",
]  # fmt: skip

logger = logging.getLogger("ept")

Layer = TypeVar("Layer", bound=AdapterLayer)

# Keys of adapter_config.json that are facts about the adapter, not settings of EPTConfig.
FACTS = (
    "method", "base_model_name_or_path", "base_model_class", "head", "num_labels", "label_names", "problem_type", "backbone",
    "folded", "prompt_sha256",
)  # fmt: skip


@dataclass
class Labels:
    """What a backbone's config says of its head's labels."""

    id2label: dict[int, str]
    label2id: dict[str, int]
    problem_type: str | None

    @classmethod
    def of(cls, config: Any) -> "Labels":
        """The labels that a config says."""
        values: Any = {field.name: copy.copy(getattr(config, field.name, None)) for field in dataclasses.fields(cls)}
        return cls(**values)

    @classmethod
    def numbered(cls, count: int, problem_type: str | None, names: list[str] | None = None) -> "Labels":
        """`count` labels with their names, or numbers in place of names."""
        id2label = dict(enumerate(names or [f"LABEL_{i}" for i in range(count)]))
        return cls(id2label, {name: i for i, name in id2label.items()}, problem_type)

    def with_count(self, count: int) -> "Labels":
        """As many numbered labels as asked for."""
        # Scores beside classes, or the other way round: transformers tells from the first labels it sees.
        return Labels.numbered(count, self.problem_type if count == len(self.id2label) else None)

    @property
    def names(self) -> list[str]:
        """The labels' names in the order of their numbers."""
        return [self.id2label[number] for number in sorted(self.id2label)]

    def put_on(self, model: Any) -> None:
        """Writes them into a model's config."""
        for field in dataclasses.fields(self):
            setattr(model.config, field.name, copy.copy(getattr(self, field.name)))
        if hasattr(model, "num_labels"):
            model.num_labels = model.config.num_labels


class Adapter(nn.Module):
    """An adapter that is not in use: its layer, its heads in the order of the backbone's, and what its labels are."""

    def __init__(self, name: str, layer: AdapterLayer, heads: list[nn.Module], labels: Labels):
        super().__init__()
        self.name, self.layer, self.heads, self.labels = name, layer, nn.ModuleList(heads), labels
        self.requires_grad_(False)

    def tensors(self, head_names: tuple[str, ...]) -> dict[str, Tensor]:
        """`tensors_of_adapter` of this one."""
        return tensors_of_adapter(self.layer, dict(zip(head_names, self.heads, strict=True)))


def tensors_of_adapter(layer: AdapterLayer, heads: dict[str, nn.Module]) -> dict[str, Tensor]:
    """An adapter's tensors as this process holds them: the layer's by name, the heads' under "head."."""
    tensors = layer.state_dict(keep_vars=True)
    for name, head in heads.items():
        tensors |= {f"head.{name}.{key}": value for key, value in head.state_dict(keep_vars=True).items()}
    return tensors


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as its directory has it.

    Attributes: `path`, `config` (its settings), `facts` (what else adapter_config.json says), `tensors` by name.
    """

    path: str
    config: EPTConfig
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(
        cls, path: str | os.PathLike, backbone: PreTrainedModel, *, ignore_backbone_mismatch: bool
    ) -> "SavedAdapter":
        """The adapter of a directory.

        Raises:
            FileNotFoundError, ValueError: the directory is incomplete or damaged, or belongs to another backbone.
        """
        settings, tensors = read_adapter(path)
        facts = {key: settings.pop(key, None) for key in FACTS}
        if not ignore_backbone_mismatch and facts["backbone"] is not None:
            current = backbone_fingerprint(backbone.config, backbone.get_input_embeddings())
            check_fingerprint(facts["backbone"], current)
        return cls(str(path), EPTConfig.from_dict(settings), facts, tensors)

    def new_layer(self, backbone: PreTrainedModel, traits: Traits, sites: LayerSites | None) -> AdapterLayer:
        """A layer of its kind and sizes, for its tensors; `sites` as in `new_layer`."""
        if not self.facts["folded"]:
            return new_layer(backbone, traits, self.config, sites)
        layer = FoldedLayer(*_layer_arguments(backbone, traits, self.config, sites))
        layer.sha256 = self.facts["prompt_sha256"]
        return _beside_embeddings(layer, backbone)

    def labels(self, default: Labels) -> Labels:
        """What its labels are; `default` where it does not say, as far as that has as many."""
        count, names = self.facts["num_labels"], self.facts["label_names"]
        if count is None:
            return default
        if not names and count == len(default.id2label):
            names = default.names
        return Labels.numbered(count, self.facts["problem_type"], names)

    def copy_into(self, tensors: dict[str, Tensor]) -> None:
        """Copies its tensors into others of the same names. ValueError where they do not fit or the file is damaged."""
        copy_tensors(self.tensors, tensors, self.path)
        check_weights(self.path)


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
    return _beside_embeddings(layer, backbone)


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
    copies = [copy.deepcopy(head) for head in heads]
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


@torch.no_grad()
def copy_tensors(tensors: dict[str, Tensor], targets: dict[str, Tensor], source: str) -> None:
    """Copies `tensors` into `targets` by name. ValueError if any is missing, extra or of another shape.

    Args:
        source: where they are from, for the error.
    """
    missing, extra = sorted(set(targets) - set(tensors)), sorted(set(tensors) - set(targets))
    if missing or extra:
        faults = [f"{word} {', '.join(names)}" for word, names in (("lacks", missing), ("has unknown", extra)) if names]
        raise ValueError(f"{source} {' and '.join(faults)}: it does not fit this config and this model's head")
    for name, target in targets.items():
        if tensors[name].shape != whole_shape(target):
            raise ValueError(
                f"{source}: {name} is {tuple(tensors[name].shape)}, but must be {tuple(whole_shape(target))} for this model"
            )
    for name, target in targets.items():
        put(target, tensors[name])
