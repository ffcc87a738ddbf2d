"""Efficient Prompt Tuning for frozen transformers models.

The trainers come with transformers' Trainer, which is slow to import: they are loaded when they are first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ept.backbone.heads import MeanPoolingForSequenceClassification
from ept.config import EPTConfig
from ept.layer.layer import EPTLayer, decompose
from ept.model.fresh import config_for_budget, get_ept_model
from ept.model.model import EPTModel
from ept.peft_format import from_peft, read_soft_prompt, save_peft
from ept.pretrained import AutoEPTModel
from ept.version import __version__

if TYPE_CHECKING:
    from ept.training import (
        EPTContinuationTrainer,
        EPTSeq2SeqTrainer,
        EPTSeq2SeqTrainingArguments,
        EPTTrainer,
        EPTTrainingArguments,
    )

__all__ = [
    "AutoEPTModel",
    "EPTConfig",
    "EPTContinuationTrainer",
    "EPTLayer",
    "EPTModel",
    "EPTSeq2SeqTrainer",
    "EPTSeq2SeqTrainingArguments",
    "EPTTrainer",
    "EPTTrainingArguments",
    "MeanPoolingForSequenceClassification",
    "__version__",
    "config_for_budget",
    "decompose",
    "from_peft",
    "get_ept_model",
    "read_soft_prompt",
    "save_peft",
]

OF_TRAINING = (
    "EPTContinuationTrainer",
    "EPTSeq2SeqTrainer",
    "EPTSeq2SeqTrainingArguments",
    "EPTTrainer",
    "EPTTrainingArguments",
)


def __getattr__(name: str) -> Any:
    if name not in OF_TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("ept.training"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *OF_TRAINING})
