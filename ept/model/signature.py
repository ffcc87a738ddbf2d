"""The arguments that a model says it takes: its own, and those of the model that it wraps.

transformers' trainers keep the columns of a data set that a model's forward names, and drop the others.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch

from ept.backbone.heads import MeanPoolingForSequenceClassification

__all__ = ["with_backbones_arguments"]


class with_backbones_arguments:
    """A forward whose signature, asked of a model, also names what the forward of its `base_model` takes."""

    def __init__(self, forward: Callable):
        self.forward = forward
        self.__doc__ = forward.__doc__

    @torch.compiler.disable  # in a call that is not yet traced, dynamo would trace this lookup by looking it up
    def __get__(self, model: Any, owner: type | None = None) -> Callable:
        if torch.compiler.is_compiling():  # nobody asks for a signature then
            return self.forward.__get__(model, owner)
        backbone = None if model is None else model._modules.get("base_model")
        if backbone is None:
            return self.forward if model is None else types.MethodType(self.forward, model)
        theirs = [type(backbone).forward]
        if isinstance(backbone, MeanPoolingForSequenceClassification):  # whose forward passes everything on
            theirs.append(type(backbone.encoder).forward)
        return types.MethodType(_with_signature(self.forward, *theirs), model)


@functools.lru_cache(maxsize=256)
def _with_signature(forward: Callable, *theirs: Callable) -> Callable:
    """A copy of a forward that names the arguments of others, too, by keyword alone."""
    signature = inspect.signature(forward)
    *own, rest = signature.parameters.values()
    named = {parameter.name: parameter for parameter in own}
    for other in theirs:
        for parameter in inspect.signature(other).parameters.values():
            if parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                named.setdefault(parameter.name, parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    copy: Any = types.FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    functools.update_wrapper(copy, forward)
    del copy.__wrapped__  # the signature is the copy's own
    copy.__kwdefaults__ = forward.__kwdefaults__
    copy.__signature__ = signature.replace(parameters=[*named.values(), rest])
    return copy
