"""Training mode and activation checkpointing of a backbone that stays frozen."""

from typing import Any

from torch import nn

__all__ = ["enable_checkpointing", "freeze_dropout"]


def freeze_dropout(backbone: nn.Module, heads: list[nn.Module]) -> None:
    """Puts a backbone that trains into eval mode, but for its heads and for what its layers checkpoint by."""
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
