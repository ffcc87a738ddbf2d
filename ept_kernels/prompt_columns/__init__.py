"""Where the prompts of left-padded rows stand: the backbone's mask, positions and labels."""

from .api import prompt_columns

__all__ = ["prompt_columns"]
