"""What is said on standard error, and how quiet transformers is."""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator

from torch import nn
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

__all__ = ["say", "without_load_reports", "without_padding_warning"]


def say(message: str) -> None:
    """Prints a line of progress, above a progress bar where there is one."""
    tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


@contextlib.contextmanager
def without_load_reports() -> Iterator[None]:
    """Keeps transformers, in the block, from listing a checkpoint's missing and left-over weights: a head's are expected."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextlib.contextmanager
def without_padding_warning(model: nn.Module) -> Iterator[None]:
    """Keeps a model with a head on the last token, in the block, from warning that it finds no padding beside embeddings.

    An EPTModel moves the text to the end, so that the last column is the last token. transformers warns once in a process:
    after a pass in the block no other one does.
    """
    logger, thread = logging.getLogger(type(model).forward.__module__), threading.get_ident()

    def is_other(record: logging.LogRecord) -> bool:
        return threading.get_ident() != thread or "will not detect padding tokens" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
