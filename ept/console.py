"""What every command says on standard error: progress, and bad input as one line with exit code 2."""

import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn

from transformers.utils import logging as transformers_logging

__all__ = ["bad_input_is_one_line", "fail", "say", "without_load_reports"]


@contextlib.contextmanager
def bad_input_is_one_line(command: str) -> Iterator[None]:
    """Within, an error that bad input raises ends the program with one line; a missing package says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(command, f"{error.name} is not installed: pip install 'ept[train]'")
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        fail(command, " ".join(str(error).split()))


def fail(command: str, message: str) -> NoReturn:
    print(f"ept {command}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def without_load_reports() -> Iterator[None]:
    """Within, transformers does not list a checkpoint's missing and left-over weights: a head's, which are expected."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
