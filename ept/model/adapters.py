"""Several adapters in one model: added, loaded, switched and removed by name, and named row by row in a batch."""

import contextlib
import copy
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ept.backbone.embeddings import embedding_rms, embedding_width, weight_of
from ept.backbone.fingerprint import backbone_fingerprint, check_fingerprint
from ept.backbone.layers import layers_after_first, layers_of, measure, path_of_layers
from ept.backbone.traits import reads_first_token
from ept.config import EPTConfig
from ept.files.adapter_dir import check_weights, read_adapter
from ept.layer.folded import FoldedLayer
from ept.layer.layer import EPTLayer
from ept.model.inputs import Group, InputsMixin, by_group, in_row_order
from ept.model.layer_hooks import DeepUpdates, hooked
from ept.model.start_values import init_prompt
from ept.sharding import put, whole_shape

__all__ = ["FACTS", "Adapter", "AdaptersMixin"]

Layer = TypeVar("Layer", EPTLayer, FoldedLayer)

# Keys of adapter_config.json that are facts about the run, not settings of EPTConfig.
FACTS = (
    "method", "base_model_name_or_path", "base_model_class", "head", "num_labels", "label_names", "problem_type", "backbone",
    "folded", "prompt_sha256",
)  # fmt: skip
LABEL_SETTINGS = ("id2label", "label2id", "problem_type")  # what a backbone's config says of its head's labels


class Adapter(nn.Module):
    """An adapter that is not in use: its layer, its heads in the order of `head_names`, and what its labels are."""

    def __init__(self, name: str, layer: EPTLayer | FoldedLayer, heads: list[nn.Module], labels: dict[str, Any]):
        super().__init__()
        self.name, self.layer, self.heads, self.labels = name, layer, nn.ModuleList(heads), labels
        self.requires_grad_(False)

    def tensors(self, head_names: list[str]) -> dict[str, Tensor]:
        """The EPT tensors by name, the heads' under "head."."""
        tensors = self.layer.state_dict()
        for name, head in zip(head_names, self.heads, strict=True):
            tensors |= {f"head.{name}.{key}": value for key, value in head.state_dict().items()}
        return tensors


class RoutedHead(nn.Module):
    """Stands in a head's place for one forward of a mixed batch: each row goes through its own adapter's head.

    Heads with fewer labels than the widest get -inf at the end, so that softmax and argmax are those of the row alone.
    """

    def __init__(self, heads: list[nn.Module], groups: list[Group]):
        super().__init__()
        self.heads, self.groups = nn.ModuleList(heads), groups

    def forward(self, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """features [batch, …] -> [batch, …, labels of the widest head]."""
        rows = by_group(features, self.groups)
        parts = [head(part, *args, **kwargs) for head, part in zip(self.heads, rows, strict=True)]
        widest = max(part.shape[-1] for part in parts)
        parts = [
            part if part.shape[-1] == widest else F.pad(part, (0, widest - part.shape[-1]), value=-torch.inf)
            for part in parts
        ]
        return in_row_order(parts, self.groups)


class AdaptersMixin(InputsMixin):
    """An EPTModel's adapters. The active one is `ept` with the wrapped model's own heads; it alone trains."""

    ept: EPTLayer | FoldedLayer
    inactive_adapters: nn.ModuleList  # of Adapter
    head_names: list[str]
    _adapter_names: list[str]
    _active_adapter: str
    _path_of_layers: str | None = None  # known once any of them has deep updates

    @property
    def active_adapter(self) -> str:
        """The name of the adapter that runs where no `adapter_ids` are given, trains, and is saved."""
        return self._active_adapter

    def list_adapters(self) -> list[str]:
        """The adapters' names in the order in which they came."""
        return list(self._adapter_names)

    def add_adapter(
        self,
        adapter_name: str,
        config: EPTConfig | None = None,
        *,
        num_labels: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        token_counts: Tensor | None = None,
        soft_prompt: Tensor | None = None,
    ) -> None:
        """Adds a fresh adapter beside the others; `set_adapter` makes it the active one.

        Args:
            adapter_name: any new name.
            num_labels: labels of its head, where the model has one; None: as many as the active adapter's.
            config, tokenizer, token_counts, soft_prompt: as in `get_ept_model`.
        """
        self._check_new_name(adapter_name)
        layer = self._new_layer(EPTConfig() if config is None else config)
        labels = self._labels()
        if num_labels is not None:
            if not self.head_names:
                raise ValueError(f"num_labels={num_labels}: {type(self.base_model).__name__} has no head to train")
            # Scores beside classes, or the other way round: transformers tells from the first labels it sees.
            problem_type = labels["problem_type"] if num_labels == len(labels["id2label"]) else None
            labels = _numbered_labels(num_labels, problem_type)
        heads = self._new_heads(len(labels["id2label"]), fresh=True) if self.head_names else []
        init_prompt(self.base_model.get_input_embeddings(), layer, tokenizer, token_counts, soft_prompt)
        self._keep(Adapter(adapter_name, layer, heads, labels))

    def load_adapter(
        self, path: str | os.PathLike, adapter_name: str, *, ignore_backbone_mismatch: bool = False
    ) -> None:
        """Adds the adapter of a directory that `save_pretrained` wrote; errors as in `EPTModel.from_pretrained`."""
        self._check_new_name(adapter_name)
        settings, tensors = read_adapter(path)
        facts = {key: settings.pop(key, None) for key in FACTS}
        if not ignore_backbone_mismatch and facts["backbone"] is not None:
            embedding = self.base_model.get_input_embeddings()
            check_fingerprint(facts["backbone"], backbone_fingerprint(self.config, embedding))
        config = EPTConfig.from_dict(settings)
        layer = self._folded_layer(config, facts["prompt_sha256"]) if facts["folded"] else self._new_layer(config)
        labels = self._labels()
        if self.head_names and facts["num_labels"] is not None:
            labels = _numbered_labels(facts["num_labels"], facts["problem_type"], facts["label_names"])
        heads = self._new_heads(len(labels["id2label"]), fresh=False) if self.head_names else []
        adapter = Adapter(adapter_name, layer, heads, labels)
        copy_tensors(tensors, adapter.tensors(self.head_names), str(path))
        check_weights(path)
        self._keep(adapter)

    def set_adapter(self, adapter_name: str) -> None:
        """Makes an adapter the active one; the one before keeps its tensors and stops training."""
        if adapter_name == self._active_adapter:
            return
        incoming = self._inactive(adapter_name)
        self.inactive_adapters = nn.ModuleList([a for a in self.inactive_adapters if a is not incoming])
        self.inactive_adapters.append(Adapter(self._active_adapter, self.ept, self._heads(), self._labels()))
        self._active_adapter, self.ept = adapter_name, incoming.layer
        for name, head in zip(self.head_names, incoming.heads, strict=True):
            setattr(self.base_model, name, head)
        self._set_labels(incoming.labels)
        if isinstance(self.ept, EPTLayer):
            self.ept.requires_grad_(True)
            for head in self._heads():
                head.requires_grad_(True)
        self.train(self.training)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter that is not the active one."""
        if adapter_name == self._active_adapter:
            raise ValueError(f"{adapter_name!r} is the active adapter: make another one active first (set_adapter)")
        gone = self._inactive(adapter_name)
        self.inactive_adapters = nn.ModuleList([a for a in self.inactive_adapters if a is not gone])
        self._adapter_names.remove(adapter_name)

    # ------------------------------------------------------------------ inside

    def _new_layer(self, config: EPTConfig) -> EPTLayer:
        """A fresh layer for this backbone. Raises what does not fit."""
        layer = EPTLayer(*self._layer_arguments(config))
        if layer.deep_scale is not None:
            layer.deep_scale.copy_(measure(self.base_model)[: len(layer.deep_scale)])
        return self._beside_embeddings(layer)

    def _folded_layer(self, config: EPTConfig, prompt_sha256: str | None) -> FoldedLayer:
        """An empty folded layer for a saved adapter's tensors. Raises what does not fit."""
        layer = FoldedLayer(*self._layer_arguments(config))
        layer.sha256 = prompt_sha256
        return self._beside_embeddings(layer)

    def _layer_arguments(self, config: EPTConfig) -> tuple[EPTConfig, int, int]:
        """The config with its `embed_scale` measured, d, and the text column of the prompt."""
        embedding = self.base_model.get_input_embeddings()
        if config.embed_scale is None:
            config = dataclasses.replace(config, embed_scale=embedding_rms(embedding))
        prompt_start = config.prompt_start
        if prompt_start is None:
            prompt_start = int(self._kind == "encoder" and reads_first_token(self.base_model))
        if self._kind.startswith("causal") and prompt_start != 0:
            raise ValueError(
                f"prompt_start={prompt_start}: a causal model's prompt stands before the text, where every token sees it; "
                "leave prompt_start at None"
            )
        if config.deep_layers:
            layers = layers_after_first(self.base_model)
            if config.deep_layers < 0:
                config = dataclasses.replace(config, deep_layers=layers)
            if config.deep_layers > layers:
                raise ValueError(
                    f"deep_layers={config.deep_layers}, but the backbone has {layers} layers after the first"
                )
            hooked(layers_of(self.base_model))
            self._path_of_layers = path_of_layers(self.base_model)
        if self._max_length is not None and config.prompt_length >= self._max_length:
            raise ValueError(
                f"prompt_length={config.prompt_length} leaves no room for text in the backbone's {self._max_length} positions"
            )
        return config, embedding_width(embedding), prompt_start

    def _beside_embeddings(self, layer: Layer) -> Layer:
        """The layer, on the device of the backbone's embeddings where that is a real one."""
        weight = weight_of(self.base_model.get_input_embeddings())
        return layer if weight.is_meta else layer.to(weight.device)

    def _heads(self) -> list[nn.Module]:
        return [self.base_model.get_submodule(name) for name in self.head_names]

    def _inactive(self, adapter_name: str) -> Adapter:
        for adapter in self.inactive_adapters:
            if isinstance(adapter, Adapter) and adapter.name == adapter_name:
                return adapter
        raise ValueError(f"there is no adapter {adapter_name!r}: there are {', '.join(map(repr, self._adapter_names))}")

    def _check_new_name(self, adapter_name: str) -> None:
        if not isinstance(adapter_name, str) or not adapter_name:
            raise TypeError(f"adapter_name={adapter_name!r} must be a string that is not empty")
        if adapter_name in self._adapter_names:
            raise ValueError(f"there is an adapter {adapter_name!r} already: delete it first, or give another name")

    def _keep(self, adapter: Adapter) -> None:
        self.inactive_adapters.append(adapter.train(self.training))
        self._adapter_names.append(adapter.name)

    def _new_heads(self, num_labels: int, fresh: bool) -> list[nn.Module]:
        """Copies of the active adapter's heads for another number of labels; `fresh` ones have new weights."""
        ours, heads = self.config.num_labels, [copy.deepcopy(head) for head in self._heads()]
        for i, head in enumerate(heads):
            for name, module in list(head.named_modules()):
                if not isinstance(module, nn.Linear):
                    continue
                if module.out_features == ours != num_labels:
                    bias, like = module.bias is not None, dict(device=module.weight.device, dtype=module.weight.dtype)
                    module = nn.Linear(module.in_features, num_labels, bias, **like)
                    _replace(heads, i, name, module)
                elif not fresh:
                    continue
                nn.init.normal_(module.weight, std=getattr(self.config, "initializer_range", 0.02))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        return heads

    def _labels(self) -> dict[str, Any]:
        return {key: copy.copy(getattr(self.config, key, None)) for key in LABEL_SETTINGS}

    def _set_labels(self, labels: dict[str, Any]) -> None:
        if not self.head_names:
            return
        for key, value in labels.items():
            setattr(self.config, key, copy.copy(value))
        backbone: Any = self.base_model
        if hasattr(backbone, "num_labels"):
            backbone.num_labels = self.config.num_labels

    def _groups(self, adapter_ids: Sequence[str] | None, batch: int, device: torch.device) -> list[Group]:
        """The batch's rows by adapter; one group without row numbers where all rows have the same."""
        if adapter_ids is None:
            return [Group(self.ept, self._heads())]
        if isinstance(adapter_ids, str) or len(adapter_ids) != batch:
            raise ValueError(f"adapter_ids must name one adapter per row, {batch} in all, not {adapter_ids!r}")
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_ids):
            rows.setdefault(name, []).append(row)
        found: dict[str, tuple[EPTLayer | FoldedLayer, list[nn.Module]]] = {}
        for name in rows:
            active = name == self._active_adapter
            adapter = None if active else self._inactive(name)
            found[name] = (self.ept, self._heads()) if adapter is None else (adapter.layer, list(adapter.heads))
        if len(rows) == 1:
            return [Group(*found[name]) for name in rows]
        sorted_rows = [row for numbers in rows.values() for row in numbers]
        order = sorted(range(batch), key=sorted_rows.__getitem__)
        both = torch.tensor([sorted_rows, order], device=device)  # one transfer for all
        parts = both[0].split([len(numbers) for numbers in rows.values()])
        return [Group(*found[name], part, both[1]) for name, part in zip(rows, parts, strict=True)]

    def _deep_updates_of(self, groups: list[Group]) -> contextlib.AbstractContextManager[DeepUpdates | None]:
        """Within, the wrapped model's layers have the groups' deep updates, if they have any."""
        if self._path_of_layers is None:
            return contextlib.nullcontext()
        # Adapters without any enter, too: their pass may run within another's, in a logits processor or a streamer.
        layers = cast(nn.ModuleList, self.base_model.get_submodule(self._path_of_layers))
        return DeepUpdates(list(layers), groups)

    @contextlib.contextmanager
    def _heads_of(self, groups: list[Group]) -> Iterator[None]:
        """Within, the wrapped model's heads are those of the rows' adapters."""
        own = self._heads()
        if not own or (groups[0].rows is None and groups[0].layer is self.ept):
            yield
            return
        try:
            for i, name in enumerate(self.head_names):
                setattr(self.base_model, name, RoutedHead([group.heads[i] for group in groups], groups))
            yield
        finally:
            for name, head in zip(self.head_names, own, strict=True):
                setattr(self.base_model, name, head)


@torch.no_grad()
def copy_tensors(tensors: dict[str, Tensor], own: dict[str, Tensor], source: str) -> None:
    """Copies `tensors` into `own` by name. ValueError if any is missing, extra or of another shape."""
    missing, extra = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or extra:
        said = [f"{word} {', '.join(names)}" for word, names in (("lacks", missing), ("has unknown", extra)) if names]
        raise ValueError(f"{source} {' and '.join(said)}: it does not fit this config and this model's head")
    for name, tensor in own.items():
        if tensors[name].shape != whole_shape(tensor):
            raise ValueError(
                f"{source}: {name} is {tuple(tensors[name].shape)}, but must be {tuple(whole_shape(tensor))} for this model"
            )
    for name, tensor in own.items():
        put(tensor, tensors[name])


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


def _numbered_labels(num_labels: int, problem_type: str | None, names: list[str] | None = None) -> dict[str, Any]:
    names = names or [f"LABEL_{i}" for i in range(num_labels)]
    id2label = dict(enumerate(names))
    return {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}, "problem_type": problem_type}
