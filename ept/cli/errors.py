"""How the command line says that its input is bad: one line on standard error, and exit code 2.

Library errors name Python's parameters, in backticks: `max_length` or `max_length=62`. Here they become options.
"""

import contextlib
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from typing import NoReturn

__all__ = ["as_options", "bad_input_is_one_line", "fail"]

# Parameters of the library's functions -> the option that sets them.
OPTIONS = {
    "Columns.label": "--label_column",
    "Columns.label_separator": "--label_separator",
    "Columns.text": "--text_column",
    "Columns.text_pair": "--text_pair_column",
    "data_dir": "--data_dir",
    "dtype": "--dtype",
    "generation_config": "--generation_config",
    "generation_num_beams": "--generation_num_beams",
    "gpu": "--gpu",
    "head": "--head",
    "kind": "--task",
    "max_length": "--max_seq_length",
    "max_steps": "--max_steps",
    "metric_for_best_model": "--metric_for_best_model",
    "model": "--model_name_or_path",
    "name_or_path": "--model_name_or_path",
    "neftune_noise_alpha": "--neftune_noise_alpha",
    "prompt_start": "--prompt_start",
    "revision": "--revision",
    "sortish_sampler": "--sortish_sampler",
    "threshold": "--threshold",
    "use_liger_kernel": "--use_liger_kernel",
}
SWITCHES = {"header=False": "--no_header"}
PYTHONS_OWN = (", or pass `ignore_backbone_mismatch=True`",)  # remedies that no option gives
# Presets, which the message keeps, and the options that choose them.
PRESETS = {
    "EPTConfig.input_only()": "--preset input",
    "EPTConfig.input_only(token_rank=0)": "--preset input --token_rank 0",
}


@contextlib.contextmanager
def bad_input_is_one_line(command: str) -> Iterator[None]:
    """Ends the program with one line where bad input raises an error in the block; a missing package says what to install."""
    try:
        yield
    except PackageNotFoundError as error:  # what transformers says of a package that one of its options needs
        fail(command, f"{error.name} Install it, or leave out the option that needs it")
    except ModuleNotFoundError as error:
        fail(command, f"{error.name} is not installed: pip install 'ept[train]'")
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        fail(command, str(error))


def fail(command: str, message: str) -> NoReturn:
    """Ends the program with a message on one line."""
    print(f"ept {command}: error: {' '.join(as_options(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def as_options(message: str) -> str:
    """Puts the options of the command line in place of a message's parameters: --max_seq_length 62."""

    def option(match: re.Match[str]) -> str:
        text, name, value = match[1], match[2], match[3]
        if text in SWITCHES:
            return SWITCHES[text]
        if name not in OPTIONS:
            return match[0]
        return OPTIONS[name] if value is None else " ".join([OPTIONS[name], value.strip('"')])

    for remedy in PYTHONS_OWN:
        message = message.replace(remedy, "")
    for preset, options in PRESETS.items():
        message = message.replace(preset, f"{preset} ({options})")
    return re.sub(r"`(([\w.]+)(?:=([^`]*))?)`", option, message)
