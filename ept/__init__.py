"""Efficient Prompt Tuning for frozen transformers models."""

from ept.backbone.heads import MeanPoolingForSequenceClassification
from ept.config import EPTConfig
from ept.layer.layer import EPTLayer, decompose
from ept.model.fresh import get_ept_model
from ept.model.model import EPTModel
from ept.peft_format import from_peft, read_soft_prompt, save_peft
from ept.version import __version__

__all__ = [
    "EPTConfig",
    "EPTLayer",
    "EPTModel",
    "MeanPoolingForSequenceClassification",
    "__version__",
    "decompose",
    "from_peft",
    "get_ept_model",
    "read_soft_prompt",
    "save_peft",
]
