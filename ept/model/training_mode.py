"""Training mode and activation checkpointing of a backbone that stays frozen."""

import operator
from typing import Any

from torch import nn

__all__ = ["Walked", "enable_checkpointing", "freeze_dropout"]


class Walked:
    """Keeps the modes of a model's modules and its parameters, so that a training step need not walk through them.

    transformers' Trainer calls `train` and `zero_grad` before every step. torch's walks take longer than a small forward.

    Args:
        model: the model, whose modes are as they shall be.
        mode: what `train` was called with.
    """

    def __init__(self, model: nn.Module, mode: bool):
        self.mode = mode
        self.modes = [(module, module.training) for module in model.modules()]
        self.parameters = list(model.parameters())
        self.witnesses = _witnesses(model)

    def is_as_left(self, mode: bool) -> bool:
        """Whether `train(mode)` would change nothing: nobody has changed the mode of any module since."""
        return self.mode is mode and all(module.training is flag for module, flag in self.modes)

    def has_parameters_of(self, model: Any) -> bool:
        """Whether the model's parameters are still the same objects; what spreads them over processes replaces all."""
        return len(now := _witnesses(model)) == len(self.witnesses) and all(map(operator.is_, self.witnesses, now))

    def clear_gradients(self) -> None:
        """Sets every gradient to None."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad = None


def _witnesses(model: Any) -> list[Any]:
    """Some parameters of each kind: the adapter's, the heads', and the backbone's word embeddings."""
    heads = [parameter for head in model.trained_heads() for parameter in head.parameters()]
    embedding = getattr(model.base_model.get_input_embeddings(), "weight", None)
    return [*model.ept.parameters(), *heads, embedding]


def freeze_dropout(backbone: nn.Module, heads: list[nn.Module]) -> None:
    """Puts a backbone into eval mode, but for its heads and the modules that checkpoint."""
    backbone.eval()
    for head in heads:
        head.train()
    for module in _checkpointing(backbone):
        # A layer checkpoints only while it is in training mode itself; its submodules stay in eval mode.
        module.training = True


def enable_checkpointing(backbone: Any, settings: dict | None, *, keeps_dropout: bool, **others: Any) -> None:
    """Turns the backbone's activation checkpointing on; without `keeps_dropout`, dropout of its layers themselves goes."""
    if hasattr(backbone, "activation_checkpointing_enable"):
        backbone.activation_checkpointing_enable(settings, **others)
    else:  # transformers before the name
        backbone.gradient_checkpointing_enable(settings, **others)
    # The prompt brings gradients into the first layer; the hook that would make frozen embeddings bring some costs a
    # gradient of all text, and hides the table from the fused path.
    backbone.disable_input_require_grads()
    if keeps_dropout:
        return
    for module in _checkpointing(backbone):
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):  # dropout, attention_dropout, layerdrop, …
                setattr(module, name, 0.0)


def _checkpointing(backbone: nn.Module) -> list[nn.Module]:
    return [module for module in backbone.modules() if getattr(module, "gradient_checkpointing", False)]
