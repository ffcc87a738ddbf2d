"""Efficient Prompt Tuning for frozen transformers models."""

from .config import EPTConfig
from .heads import MeanPoolingForSequenceClassification
from .layer import EPTLayer, decompose
from .model import EPTModel, get_ept_model
from .peft_format import from_peft, read_soft_prompt, save_peft

__version__ = "0.1.0"
__all__ = [
    "EPTConfig",
    "EPTLayer",
    "EPTModel",
    "MeanPoolingForSequenceClassification",
    "decompose",
    "from_peft",
    "get_ept_model",
    "read_soft_prompt",
    "save_peft",
]
