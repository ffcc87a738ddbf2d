"""Fused kernels of Efficient Prompt Tuning and their specification. Needs torch; Triton only for impl="triton"."""

from .availability import IMPLEMENTATIONS
from .common.reference import ACTIVATIONS as _FUNCTIONS
from .layer_update import layer_update
from .prompt_columns import prompt_columns
from .prompt_embed import (
    insert_prompt,
    prompt_embed,
    prompt_embed_inputs,
    reconstruct_prompt,
    text_positions,
    text_update,
)

ACTIVATIONS = tuple(_FUNCTIONS)  # the names of σ

__all__ = [
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "insert_prompt",
    "layer_update",
    "prompt_columns",
    "prompt_embed",
    "prompt_embed_inputs",
    "reconstruct_prompt",
    "text_positions",
    "text_update",
]
