"""The one loader: a trained adapter's files, and the adapter on its backbone.

`SavedAdapter.open` reads what the files say, without a backbone. Its methods then load as much of the backbone as is
needed: all of it, none of its weights (`ept fold`), or its embeddings alone (`ept inspect`).
"""

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ept.backbone.heads import MeanPoolingForSequenceClassification
from ept.backbone.loading import absolute_path, load_tokenizer, load_whole, pad_like_tokenizer, precision, read_config
from ept.backbone.traits import head_names
from ept.console import without_load_reports
from ept.files.adapter_dir import CONFIG_NAME
from ept.files.run_record import read_record
from ept.model.files import AdapterFiles
from ept.model.model import EPTModel
from ept.tasks.kind import TaskKind
from ept.tasks.kinds import kind_of_adapter

__all__ = ["AutoEPTModel", "SavedAdapter", "base_model_name", "load_peft_backbone"]

MEAN_POOLING = MeanPoolingForSequenceClassification.__name__


class AutoEPTModel:
    """Loads an adapter together with its backbone, whose class and name the adapter says."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        adapter_name: str = "default",
        *,
        name_or_path: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        ignore_backbone_mismatch: bool = False,
        **backbone_settings: Any,
    ) -> EPTModel:
        """Loads a saved adapter and its backbone; returns the EPTModel in eval mode.

        Args:
            path: a directory that `save_pretrained` wrote, or a hub id ("user/name"). A directory wins.
            adapter_name, ignore_backbone_mismatch: as in `EPTModel.from_pretrained`.
            name_or_path: the backbone, where it is not where the adapter says.
            revision: branch, tag or commit of the adapter's repository; None: its main branch.
            token, cache_dir: of the hub client, for the adapter and the backbone.
            backbone_settings: what `from_pretrained` of the backbone's class takes: `dtype`, `device_map`,
                `attn_implementation`, `quantization_config`, …

        Raises:
            OSError: there is no such adapter or backbone, or the hub cannot be reached or refuses.
            ValueError: the adapter is damaged, does not say its backbone, or belongs to another one.
        """
        saved_adapter = SavedAdapter.open(path, revision=revision, token=token, cache_dir=cache_dir)
        hub_settings = {"token": token, "cache_dir": cache_dir}
        backbone_settings |= {name: value for name, value in hub_settings.items() if value is not None}
        backbone = saved_adapter.load_backbone(name_or_path, **backbone_settings)
        model = EPTModel.from_files(
            backbone, saved_adapter, adapter_name, ignore_backbone_mismatch=ignore_backbone_mismatch
        )
        return model.eval()


@dataclass(frozen=True)
class SavedAdapter(AdapterFiles):
    """The files of an adapter with the record of its run.

    Attributes:
        record: of run.json; empty where there is none.
    """

    record: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike, **of_hub: Any) -> "SavedAdapter":
        """Reads the files of an adapter; arguments and errors as in `AdapterFiles.read`."""
        files = AdapterFiles.read(path, **of_hub)
        return cls(**vars(files), record=read_record(files.directory))

    @property
    def max_length(self) -> int | None:
        """To how many tokens the texts were cut in training; None where that is not known."""
        return self.record.get("max_seq_length")

    def kind(self) -> TaskKind:
        """Returns the kind of task that the adapter learned; ValueError where that is not known."""
        return kind_of_adapter(self.settings, self.record, str(Path(self.directory) / CONFIG_NAME))

    def load(
        self, name_or_path: str | None = None, *, dtype: str = "auto"
    ) -> tuple[EPTModel, PreTrainedTokenizerBase, TaskKind]:
        """Loads the adapter on its backbone in eval mode; returns it, its tokenizer, and the kind of task that it learned.

        Args:
            name_or_path: the backbone, where it is not in its old place.
            dtype: of the frozen weights, one of `ept.backbone.loading.DTYPES`.

        Raises:
            ValueError, OSError: the adapter is incomplete, or its backbone is not where it was.
        """
        kind = self.kind()
        backbone_name = self._backbone_name(name_or_path)
        settings = precision(backbone_name, dtype, not_quantised=self.settings.get("head") or None)
        backbone = self.load_backbone(name_or_path, **settings)
        tokenizer = self.load_tokenizer(backbone_name)
        pad_like_tokenizer(backbone, tokenizer)
        return EPTModel.from_files(backbone, self).eval(), tokenizer, kind

    def load_to_fold(self, name_or_path: str | None = None, *, with_weights: bool) -> EPTModel:
        """Loads the adapter on its backbone in eval mode; without weights, all but its head is on the meta device."""
        backbone = self.load_backbone(name_or_path, with_weights=with_weights)
        return EPTModel.from_files(backbone, self).eval()

    def load_backbone(
        self, name_or_path: str | None = None, *, with_weights: bool = True, **settings: Any
    ) -> PreTrainedModel:
        """Loads the backbone as the class that the adapter says, with a head for its labels.

        Args:
            name_or_path: the backbone, where it is not where the adapter says.
            with_weights: False leaves all but an empty head on the meta device.
            settings: of the class's `from_pretrained`.

        Raises:
            ValueError, OSError: the adapter does not say its backbone, it is of another kind, lacks frozen weights, or is
                not there.
        """
        source = self._backbone_name(name_or_path)
        hub_settings = {name: settings[name] for name in ("token", "cache_dir") if name in settings}
        config = read_config(source, **hub_settings)
        model_class = self.settings.get("base_model_class") or ""
        pools_mean = model_class == MEAN_POOLING
        cls = transformers.AutoModel if pools_mean else self._class_of_transformers(config, source)
        num_labels: Any = self.settings.get("num_labels")
        labels = {} if num_labels is None or pools_mean else {"num_labels": num_labels}
        backbone: Any
        if with_weights:
            backbone = load_whole(cls, source, reads_pooler=not pools_mean, **labels, **settings)
        else:
            config = read_config(source, **labels)
            with torch.device("meta"):
                backbone = transformers.AutoModel.from_config(config) if pools_mean else cls(config)
            for name in head_names(backbone):
                backbone.get_submodule(name).to_empty(device="cpu")
        if pools_mean:
            backbone = MeanPoolingForSequenceClassification(backbone, num_labels, self.settings.get("problem_type"))
        return backbone

    def _class_of_transformers(self, config: Any, source: str) -> Any:
        """Returns transformers' class that the adapter names; ValueError if there is none, or `config` is of another."""
        name = self.settings.get("base_model_class") or ""
        cls: Any = getattr(transformers, name, None)
        if not (inspect.isclass(cls) and issubclass(cls, PreTrainedModel)):
            raise ValueError(
                f"{self.directory} adapts a {name or 'model of no known kind'}, which transformers has not: load the "
                "backbone yourself, and the adapter with EPTModel.from_pretrained"
            )
        config_class: Any = cls.config_class
        if not any(isinstance(part, config_class) for part in (config, config.get_text_config())):
            raise ValueError(
                f"{self.directory} adapts a {name}, and {source} is a {config.model_type}: give the model that it was "
                "trained on, `name_or_path`"
            )
        return cls

    def load_embeddings(self, name_or_path: str | None = None) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """Loads the backbone's word embeddings and the tokenizer."""
        source = self._backbone_name(name_or_path)
        with without_load_reports():
            embeddings = transformers.AutoModel.from_pretrained(source).get_input_embeddings()
        return embeddings, self.load_tokenizer(source)

    def load_tokenizer(self, name_or_path: str) -> PreTrainedTokenizerBase:
        """Loads the tokenizer that was saved with the adapter, or else the backbone's."""
        has_tokenizer = (Path(self.directory) / "tokenizer_config.json").is_file()
        return load_tokenizer(self.directory if has_tokenizer else name_or_path)

    def _backbone_name(self, name_or_path: str | None) -> str:
        return absolute_path(base_model_name(self.directory, self.settings, name_or_path))


def base_model_name(directory: str, settings: dict[str, Any], name_or_path: str | None = None) -> str:
    """Returns the backbone of an adapter, ours or PEFT's: `name_or_path`, or else what its config says.

    Raises:
        ValueError: neither says it.
    """
    source = name_or_path or settings.get("base_model_name_or_path")
    if not source:
        raise ValueError(f"{directory} does not say what model it was trained on: give `name_or_path`")
    return source


def load_peft_backbone(
    directory: str, settings: dict[str, Any], head_tensors: dict[str, Tensor], name_or_path: str | None = None
) -> PreTrainedModel:
    """Loads the backbone of a PEFT adapter, with a head of the adapter's size.

    Args:
        directory, settings: of the adapter, and its config.
        head_tensors: its head's tensors by the names that an EPT adapter gives them, under "head.".
        name_or_path: the backbone, where it is not where the adapter says.
    """
    source = absolute_path(base_model_name(directory, settings, name_or_path))
    auto_classes: dict[Any, Any] = {
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
        "CAUSAL_LM": transformers.AutoModelForCausalLM,
        "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
        "FEATURE_EXTRACTION": transformers.AutoModel,
    }
    task_type = settings.get("task_type")
    if task_type not in auto_classes:
        raise ValueError(f"{directory} is for the task type {task_type}, but EPT reads {', '.join(auto_classes)}")
    with without_load_reports():
        num_labels: dict[str, Any] = _number_of_labels(auto_classes[task_type], source, head_tensors)
    return load_whole(auto_classes[task_type], source, **num_labels)


def _number_of_labels(auto_class: Any, name_or_path: str, head_tensors: dict[str, Tensor]) -> dict[str, int]:
    """Returns `num_labels` of an adapter whose head has another number than the model's config says; PEFT does not note it."""
    with torch.device("meta"):
        empty = auto_class.from_config(read_config(name_or_path))
    for head in head_names(empty):
        for name, fresh in empty.get_submodule(head).state_dict().items():
            trained = head_tensors.get(f"head.{head}.{name}", fresh)
            if len(trained) != len(fresh) == empty.config.num_labels:
                return {"num_labels": len(trained)}
    return {}
