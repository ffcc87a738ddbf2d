"""What is done to the adapters of a model: a fresh one is made, one is loaded, one becomes active.

The active adapter's layer is the model's `ept`, its heads stand in the wrapped model; the others wait in
`inactive_adapters`. Whoever calls these functions keeps other threads out.
"""

from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel

from ept.backbone.layers import LayerSites
from ept.backbone.traits import Traits
from ept.layer.base import AdapterLayer
from ept.layer.layer import EPTLayer
from ept.model.adapters import Adapter, new_heads
from ept.model.by_name import InactiveAdapters
from ept.model.files import AdapterFiles
from ept.model.labels import Labels

__all__ = ["activate", "check_new_name", "fresh_adapter", "loaded_adapter"]


class Host(Protocol):
    """What these functions need of an EPTModel."""

    base_model: PreTrainedModel
    config: Any
    traits: Traits
    ept: AdapterLayer
    inactive_adapters: InactiveAdapters
    adapter_names: list[str]
    active_adapter: str

    def trained_heads(self) -> list[nn.Module]: ...


def check_new_name(model: Host, name: str) -> None:
    """TypeError or ValueError where an adapter of the model cannot have the name."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"adapter_name={name!r} must be a string that is not empty")
    if name in model.adapter_names:
        raise ValueError(f"there is an adapter {name!r} already: delete it first, or give another name")


def fresh_adapter(model: Host, name: str, layer: EPTLayer, num_labels: int | None) -> Adapter:
    """A fresh adapter for a model, with heads of as many labels as asked for, or as the active one has.

    Raises ValueError where the model has no head to train.
    """
    labels = Labels.of(model.config)
    if num_labels is not None:
        if not model.traits.head_names:
            raise ValueError(f"num_labels={num_labels}: {model.traits.name} has no head to train")
        labels = labels.with_count(num_labels)
    return Adapter(name, layer, _heads_for(model, labels, fresh=True), labels)


def loaded_adapter(model: Host, name: str, files: AdapterFiles, sites: LayerSites | None) -> Adapter:
    """The adapter of a directory, for a model."""
    check_new_name(model, name)
    layer = files.new_layer(model.base_model, model.traits, sites)
    labels = Labels.of(model.config)
    labels = files.labels(labels) if model.traits.head_names else labels
    adapter = Adapter(name, layer, _heads_for(model, labels, fresh=False), labels)
    files.copy_into(adapter.tensors(model.traits.head_names))
    return adapter


def _heads_for(model: Host, labels: Labels, *, fresh: bool) -> list[nn.Module]:
    return new_heads(model.trained_heads(), model.config, len(labels.id2label), fresh=fresh)


def activate(model: Host, incoming: Adapter, own_labels: Labels) -> None:
    """Puts an adapter in the active one's place, which joins the others; `own_labels` are the active one's."""
    outgoing = Adapter(model.active_adapter, model.ept, model.trained_heads(), own_labels)
    others = [adapter for adapter in model.inactive_adapters if adapter is not incoming]
    model.inactive_adapters = InactiveAdapters([*others, outgoing])
    model.active_adapter, model.ept = incoming.name, incoming.layer
    for name, head in zip(model.traits.head_names, incoming.heads, strict=True):
        setattr(model.base_model, name, head)
    if model.traits.head_names:
        incoming.labels.put_on(model.base_model)
    if model.ept.trainable:
        incoming.thaw()
