"""Fused kernels of Efficient Prompt Tuning and their specification. Needs torch; Triton only for impl="triton"."""

from .prompt_embed import (
    ACTIVATIONS,
    IMPLEMENTATIONS,
    prompt_embed,
    prompt_embed_inputs,
    reconstruct_prompt,
    text_update,
)

__all__ = [
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "prompt_embed",
    "prompt_embed_inputs",
    "reconstruct_prompt",
    "text_update",
]
