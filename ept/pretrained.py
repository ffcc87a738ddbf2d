"""The one loader: a trained adapter's directory, and the adapter on its backbone.

`SavedAdapter.open` reads what the directory says, without a backbone. Its methods then load as much of the backbone as
is needed: all of it, none of its weights (`ept fold`), or its embeddings alone (`ept inspect`).
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ept.backbone.heads import MeanPoolingForSequenceClassification
from ept.backbone.loading import absolute_path, load_tokenizer, pad_like_tokenizer, read_config
from ept.backbone.traits import head_names
from ept.config import EPTConfig
from ept.console import without_load_reports
from ept.files.adapter_dir import CONFIG_NAME, read_adapter
from ept.files.run_record import read_record
from ept.model.model import EPTModel
from ept.tasks.kind import TaskKind
from ept.tasks.kinds import kind_of_adapter

__all__ = ["SavedAdapter", "base_model_name", "load_peft_backbone"]

MEAN_POOLING = MeanPoolingForSequenceClassification.__name__


@dataclass(frozen=True)
class SavedAdapter:
    """What the directory of an adapter says.

    Attributes:
        directory: where it is.
        settings, tensors: of adapter_config.json and adapter_model.safetensors.
        record: of run.json; empty where there is none.
    """

    directory: str
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    record: dict[str, Any]

    @classmethod
    def open(cls, directory: str) -> "SavedAdapter":
        """Reads the files of an adapter. ValueError or FileNotFoundError says what is wrong with them."""
        record = read_record(directory)
        settings, tensors = read_adapter(directory)
        _check_settings(Path(directory) / CONFIG_NAME, settings)
        return cls(directory, settings, tensors, record)

    @property
    def config(self) -> EPTConfig:
        """The adapter's settings."""
        return _config_in(self.settings)

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
        source = base_model_name(self.directory, self.settings, name_or_path)
        kind = self.kind()
        head = "mean" if self.settings.get("base_model_class") == MEAN_POOLING else "first"
        backbone = kind.load_backbone(source, head=head, dtype=dtype)
        tokenizer = self.load_tokenizer(source)
        pad_like_tokenizer(backbone, tokenizer)
        return EPTModel.from_pretrained(backbone, self.directory).eval(), tokenizer, kind

    def load_to_fold(self, name_or_path: str | None = None, *, with_weights: bool) -> EPTModel:
        """Loads the adapter on its backbone in eval mode; without weights, all but its head is on the meta device.

        Any class of transformers' is a backbone here, also one that learned no kind of task.
        """
        source = base_model_name(self.directory, self.settings, name_or_path)
        model_class = self.settings.get("base_model_class") or ""
        pools_mean = model_class == MEAN_POOLING
        cls = transformers.AutoModel if pools_mean else getattr(transformers, model_class, None)
        if cls is None:
            raise ValueError(
                f"{self.directory} adapts a {model_class or 'model of no known kind'}, which transformers has not"
            )
        num_labels: Any = self.settings.get("num_labels")
        labels = {} if num_labels is None or pools_mean else {"num_labels": num_labels}
        backbone: Any
        if with_weights:
            with without_load_reports():
                backbone = cls.from_pretrained(source, **labels)
        else:
            config = transformers.AutoConfig.from_pretrained(source, **labels)
            with torch.device("meta"):
                backbone = transformers.AutoModel.from_config(config) if pools_mean else cls(config)
            for name in head_names(backbone):
                backbone.get_submodule(name).to_empty(device="cpu")
        if pools_mean:
            backbone = MeanPoolingForSequenceClassification(backbone, num_labels, self.settings.get("problem_type"))
        return EPTModel.from_pretrained(backbone, self.directory).eval()

    def load_embeddings(self, name_or_path: str | None = None) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """Loads the backbone's word embeddings and the tokenizer."""
        source = base_model_name(self.directory, self.settings, name_or_path)
        with without_load_reports():
            embeddings = transformers.AutoModel.from_pretrained(source).get_input_embeddings()
        return embeddings, self.load_tokenizer(source)

    def load_tokenizer(self, name_or_path: str) -> PreTrainedTokenizerBase:
        """Loads the tokenizer that was saved with the adapter, or else the backbone's."""
        has_tokenizer = (Path(self.directory) / "tokenizer_config.json").is_file()
        return load_tokenizer(self.directory if has_tokenizer else name_or_path)


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
        num_labels = _number_of_labels(auto_classes[task_type], source, head_tensors)
        return auto_classes[task_type].from_pretrained(source, **num_labels)


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


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError if what an adapter's config says is not of the type that is read."""
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
        _config_in(settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def _config_in(settings: dict[str, Any]) -> EPTConfig:
    """Returns the EPTConfig among the settings of an adapter's config, which also holds facts about the run."""
    names = {field.name for field in dataclasses.fields(EPTConfig)}
    return EPTConfig(**{name: value for name, value in settings.items() if name in names})
