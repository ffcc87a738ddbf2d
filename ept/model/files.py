"""An adapter's files as a model reads and writes them; how they are laid on the disk is `ept.files.adapter_dir`'s."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ept.backbone.fingerprint import backbone_fingerprint, check_fingerprint
from ept.backbone.layers import LayerSites
from ept.backbone.traits import Traits
from ept.config import EPTConfig
from ept.files.adapter_dir import CONFIG_NAME, check_weights, read_adapter
from ept.files.hub import local_directory
from ept.layer.base import AdapterLayer
from ept.model.adapters import new_folded_layer, new_layer
from ept.model.labels import Labels
from ept.sharding import put, whole_shape

__all__ = ["AdapterFiles", "check_finite", "copy_tensors", "settings_of"]

# Keys of adapter_config.json that are facts about the adapter, not settings of EPTConfig.
FACTS = (
    "method", "base_model_name_or_path", "base_model_class", "head", "num_labels", "label_names", "problem_type", "backbone",
    "folded", "prompt_sha256",
)  # fmt: skip


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as its directory has it.

    Attributes:
        directory: where it is; of a hub id, where the cache has it.
        config: its settings of EPTConfig.
        settings: all that adapter_config.json says.
        tensors: of adapter_model.safetensors, by name.
    """

    directory: str
    config: EPTConfig
    settings: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: str | os.PathLike, **of_hub: Any) -> "AdapterFiles":
        """Reads an adapter.

        Args:
            path: a directory or a hub id.
            of_hub: `revision`, `token` and `cache_dir` as in `ept.files.hub.local_directory`.

        Raises:
            OSError, ValueError: there is none, or it is incomplete or damaged.
        """
        directory = local_directory(path, **of_hub)
        settings, tensors = read_adapter(directory)
        return cls(str(directory), _checked_config(directory / CONFIG_NAME, settings), settings, tensors)

    @property
    def is_folded(self) -> bool:
        """Whether it holds the constants that inference needs in place of what is trained."""
        return bool(self.settings.get("folded"))

    def check_backbone(self, backbone: PreTrainedModel, *, may_ignore: bool = False) -> None:
        """Raises ValueError if it belongs to another backbone; `may_ignore` as in `check_fingerprint`."""
        fingerprint = self.settings.get("backbone")
        if fingerprint is not None:
            current = backbone_fingerprint(backbone.config, backbone.get_input_embeddings())
            check_fingerprint(fingerprint, current, may_ignore=may_ignore)

    def new_layer(self, backbone: PreTrainedModel, traits: Traits, sites: LayerSites | None) -> AdapterLayer:
        """A layer of its kind and sizes, for its tensors; `sites` as in `new_layer`."""
        if not self.is_folded:
            return new_layer(backbone, traits, self.config, sites)
        layer = new_folded_layer(backbone, traits, self.config, sites)
        layer.sha256 = self.settings.get("prompt_sha256")
        return layer

    def labels(self, default: Labels) -> Labels:
        """What its labels are; `default` where it does not say, as far as that has as many."""
        count, names = self.settings.get("num_labels"), self.settings.get("label_names")
        if count is None:
            return default
        if not names and count == len(default.id2label):
            names = default.names
        return Labels.numbered(count, self.settings.get("problem_type"), names)

    def copy_into(self, tensors: dict[str, Tensor]) -> None:
        """Copies its tensors into others of the same names. ValueError where they do not fit or the file is damaged."""
        copy_tensors(self.tensors, tensors, self.directory)
        check_weights(self.directory)

    def labels_beside(self, backbones: Labels) -> Labels:
        """Its labels for a backbone whose config says others.

        A problem type that was never said is found from the first labels, unless the backbone's config says it.
        """
        labels = self.labels(backbones)
        return dataclasses.replace(labels, problem_type=labels.problem_type or backbones.problem_type)


def _checked_config(file: Path, settings: dict[str, Any]) -> EPTConfig:
    """Returns the EPTConfig among an adapter's settings; ValueError if what they say is not of the type that is read."""
    types = {"base_model_name_or_path": str, "base_model_class": str, "label_names": list, "backbone": dict}
    for name, expected in types.items():
        value = settings.get(name)
        if value is not None and not isinstance(value, expected):
            raise ValueError(f"{file}: {name} cannot be {value!r}: the file is damaged, copy it again")
    if not all(isinstance(name, str) for name in settings.get("label_names") or []):
        raise ValueError(f"{file}: label_names are not all strings: the file is damaged, copy it again")
    backbone = settings.get("backbone") or {}
    if "embedding_sha256" in backbone and not {"embedding_dtype", "embedding_sample"} <= backbone.keys():
        raise ValueError(f"{file}: backbone lacks its embeddings' dtype or sample: the file is damaged, copy it again")
    try:
        return EPTConfig.from_dict({name: value for name, value in settings.items() if name not in FACTS})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def settings_of(backbone: PreTrainedModel, traits: Traits, layer: AdapterLayer, labels: Labels) -> dict[str, Any]:
    """What adapter_config.json says of an adapter: every setting, and the facts about it."""
    heads = list(traits.head_names)
    names = labels.names if heads else None
    settings = layer.config.to_dict() | {
        "method": "EPT",
        "base_model_name_or_path": getattr(backbone.config, "_name_or_path", "") or None,
        "base_model_class": traits.name,
        "head": heads,
        "num_labels": len(names) if names else None,
        "label_names": names or [],
        "problem_type": labels.problem_type if heads else None,
        "backbone": backbone_fingerprint(backbone.config, backbone.get_input_embeddings()),
    }
    return settings | layer.facts()


def check_finite(tensors: dict[str, Tensor]) -> None:
    """FloatingPointError, which names the tensor, if any holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{name} holds NaN or infinity: the training diverged, lower the learning rate")


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
