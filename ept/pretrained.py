"""A trained adapter on its backbone, from its directory."""

import dataclasses
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from ept.backbone.heads import MeanPoolingForSequenceClassification
from ept.backbone.loading import load_backbone, load_tokenizer
from ept.config import EPTConfig
from ept.files.adapter_dir import CONFIG_NAME, read_adapter
from ept.model.model import EPTModel

__all__ = ["load_adapter"]


def load_adapter(
    directory: str, name_or_path: str | None = None, *, dtype: str = "auto"
) -> tuple[EPTModel, PreTrainedTokenizerBase, str]:
    """A trained adapter on its backbone in eval mode, its tokenizer, and its task.

    Raises:
        ValueError, OSError: the adapter is incomplete or damaged, or its backbone is not where it was.
    """
    settings = read_adapter(directory)[0]
    _check_settings(Path(directory) / CONFIG_NAME, settings)
    name_or_path = name_or_path or settings.get("base_model_name_or_path")
    if not name_or_path:
        raise ValueError(f"{directory} does not say what model it was trained on: give --model_name_or_path")
    kind = settings.get("base_model_class") or ""
    if kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values():
        task = "text2text"
    elif kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        task = "continuation"
    elif kind.endswith("ForSequenceClassification"):
        task = "regression" if settings.get("problem_type") == "regression" else "classification"
    else:
        raise ValueError(
            f"{directory} adapts a {kind or 'model of no known kind'}: load it with EPTModel.from_pretrained"
        )
    head = "mean" if kind == MeanPoolingForSequenceClassification.__name__ else "first"
    names = settings.get("label_names") if task == "classification" else None
    if task == "classification" and not names:
        raise ValueError(f"{Path(directory) / CONFIG_NAME} names no labels: the file is damaged, copy it again")
    model = load_backbone(name_or_path, task, names, head=head, dtype=dtype)
    has_tokenizer = (Path(directory) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(directory if has_tokenizer else name_or_path)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return EPTModel.from_pretrained(model, directory).eval(), tokenizer, task


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    """ValueError if what an adapter's config says is not of the kind that is read."""
    kinds = {"base_model_name_or_path": str, "base_model_class": str, "label_names": list, "backbone": dict}
    for name, kind in kinds.items():
        value = settings.get(name)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{file}: {name} cannot be {value!r}: the file is damaged, copy it again")
    if not all(isinstance(name, str) for name in settings.get("label_names") or []):
        raise ValueError(f"{file}: label_names are not all strings: the file is damaged, copy it again")
    backbone = settings.get("backbone") or {}
    if "embedding_sha256" in backbone and not {"embedding_dtype", "embedding_sample"} <= backbone.keys():
        raise ValueError(f"{file}: backbone lacks its embeddings' dtype or sample: the file is damaged, copy it again")
    known = {field.name for field in dataclasses.fields(EPTConfig)}
    try:
        EPTConfig(**{name: value for name, value in settings.items() if name in known})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
