"""Keeps what is not the reader's off the screen."""

import warnings

from transformers.utils import logging

__all__ = ["quiet"]


def quiet() -> None:
    """Turns off progress bars and warnings of transformers, and one warning of PEFT."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
