"""The input stage, steps 1 to 7 of docs/method.md: the reconstructed prompt joined with the updated text."""

from .api import prompt_embed, prompt_embed_inputs, reconstruct_prompt, text_update
from .reference import insert_prompt, text_positions

__all__ = [
    "insert_prompt",
    "prompt_embed",
    "prompt_embed_inputs",
    "reconstruct_prompt",
    "text_positions",
    "text_update",
]
