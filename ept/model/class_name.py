"""The class of a wrapped model, which is called as the class of the model in it.

transformers knows by a class's name what a model can do: its pipelines refuse, in the log, what they do not know, and
its trainers look up which labels a model takes. So each EPTModel is of a subclass that differs in its name alone.
"""

import functools
from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from ept.backbone.heads import MeanPoolingForSequenceClassification

__all__ = ["class_called", "name_for"]


def name_for(backbone: PreTrainedModel) -> str:
    """Returns the name by which transformers knows what a backbone does; for our head on the mean, that of its own head."""
    name = type(backbone).__name__
    if isinstance(backbone, MeanPoolingForSequenceClassification):
        return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(backbone.config.model_type, name)
    return name


def class_called(name: str, cls: Any) -> Any:
    """Returns a subclass of `cls` with another name, always the same one; of one that this made, its base's."""
    return _subclass(name, cls.__bases__[0] if "_is_named" in vars(cls) else cls)


@functools.cache
def _subclass(name: str, cls: Any) -> Any:
    settings = {"__doc__": cls.__doc__, "__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}[{name}]"}
    return type(name, (cls,), settings | {"_is_named": True})
