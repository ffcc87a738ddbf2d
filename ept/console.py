"""What is said on standard error, and how quiet transformers is."""

import contextlib
import sys
from collections.abc import Iterator

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

__all__ = ["say", "without_load_reports"]


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
