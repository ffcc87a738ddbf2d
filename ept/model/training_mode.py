"""Training mode and activation checkpointing of a backbone that stays frozen."""

from typing import Any

from torch import nn

__all__ = ["Walked", "enable_checkpointing", "freeze_dropout"]


class Walked:
    """Keeps what a walk through a model's modules finds, so that a training step need not take one.

    transformers' Trainer calls `train` and `zero_grad` before every step. torch's walks take longer than a small forward.
    Modules and parameters that somebody has put in, taken out or replaced since, and modes that somebody has changed, are
    noticed.

    Args:
        model: the model, whose modes are as they shall be.
        mode: what `train` was called with.
    """

    def __init__(self, model: nn.Module, mode: bool):
        modules = list(model.modules())
        self.mode, self.model_mode = mode, model.training
        self.children = [
            (module._modules, name, child, child.training)
            for module in modules
            for name, child in module._modules.items()
            if child is not None
        ]
        self.parameters = [
            (module._parameters, name, parameter)
            for module in modules
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        holders = [holder for module in modules for holder in (module._modules, module._parameters)]
        self.sizes = [(holder, len(holder)) for holder in holders]

    def is_as_left(self, model: nn.Module, mode: bool) -> bool:
        """Whether `train(mode)` would change nothing."""
        return (
            self.mode is mode
            and model.training is self.model_mode
            and all(holder.get(name) is child and child.training is flag for holder, name, child, flag in self.children)
            and self._has_sizes()
        )

    def clear_gradients(self) -> bool:
        """Sets every gradient to None where the model's parameters are still the same; returns whether they are."""
        if not self._has_sizes() or any(holder.get(name) is not kept for holder, name, kept in self.parameters):
            return False
        if any(holder.get(name) is not child for holder, name, child, _ in self.children):
            return False
        for _, _, parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad = None
        return True

    def _has_sizes(self) -> bool:
        return all(len(holder) == size for holder, size in self.sizes)


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
