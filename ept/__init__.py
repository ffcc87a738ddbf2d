"""Efficient Prompt Tuning for frozen transformers models."""

from .config import EPTConfig
from .heads import MeanPoolingForSequenceClassification
from .layer import EPTLayer, decompose
from .model import EPTModel, get_ept_model

__version__ = "0.1.0"
__all__ = ["EPTConfig", "EPTLayer", "EPTModel", "MeanPoolingForSequenceClassification", "decompose", "get_ept_model"]
