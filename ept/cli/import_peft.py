"""`ept import`: a PEFT prompt-tuning adapter or a DePT checkpoint as an EPT adapter."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from ept.backbone.traits import head_names
from ept.console import bad_input_is_one_line, without_load_reports
from ept.files.adapter_dir import CONFIG_NAME
from ept.peft_format import _named_as_head, _read_peft, from_peft

__all__ = ["ImportArguments", "run"]


@dataclass
class ImportArguments:
    _argument_group_name = "adapter"

    adapter: str = field(metadata={"help": "Directory of a PEFT prompt-tuning adapter or of a DePT checkpoint."})
    output_dir: str = field(metadata={"help": "Where the EPT adapter goes."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model it was trained on, where it is not where the adapter says."}
    )


def run(argv: list[str]) -> None:
    """`ept import`: a PEFT prompt-tuning adapter or a DePT checkpoint as an EPT adapter."""
    with bad_input_is_one_line("import"):
        from ept.cli.options import OptionParser

        description = "Reads a PEFT prompt-tuning adapter, or a checkpoint of DePT, and writes it as an EPT adapter."
        (given,) = OptionParser("import", description, ImportArguments).parse(argv)
        if Path(given.output_dir).is_file() or (Path(given.output_dir) / CONFIG_NAME).exists():
            raise ValueError(
                f"--output_dir {given.output_dir} is a file or holds another adapter: give a new directory"
            )
        model = from_peft(_backbone_of(given.adapter, given.model_name_or_path), given.adapter)
        model.save_pretrained(given.output_dir)
        print(f"{given.output_dir}: an EPT adapter on {model.config._name_or_path}")
        model.print_trainable_parameters()


def _backbone_of(path: str, name_or_path: str | None) -> PreTrainedModel:
    settings, tensors = _read_peft(path)
    name_or_path, task_type = name_or_path or settings.get("base_model_name_or_path"), settings.get("task_type")
    if not name_or_path:
        raise ValueError(f"{path} does not say what model it was trained on: give --model_name_or_path")
    classes = {
        "SEQ_CLS": AutoModelForSequenceClassification,
        "TOKEN_CLS": AutoModelForTokenClassification,
        "CAUSAL_LM": AutoModelForCausalLM,
        "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
        "FEATURE_EXTRACTION": AutoModel,
    }
    if task_type not in classes:
        raise ValueError(f"{path} is for the task type {task_type}, but EPT reads {', '.join(classes)}")
    if Path(name_or_path).is_dir():
        name_or_path = str(Path(name_or_path).resolve())  # the adapter names it, and may be used from elsewhere
    with without_load_reports():
        labels = _number_of_labels(classes[task_type], name_or_path, tensors)
        return classes[task_type].from_pretrained(name_or_path, **labels)


def _number_of_labels(auto_class: Any, name_or_path: str, tensors: dict[str, Tensor]) -> dict[str, int]:
    """`num_labels` of an adapter whose head has another number than the model's config says, which PEFT does not note."""
    with torch.device("meta"):
        empty = auto_class.from_config(AutoConfig.from_pretrained(name_or_path))
    given = _named_as_head(tensors)
    for head in head_names(empty):
        for name, own in empty.get_submodule(head).state_dict().items():
            found = given.get(f"head.{head}.{name}", own)
            if len(found) != len(own) == empty.config.num_labels:
                return {"num_labels": len(found)}
    return {}
