"""The command line: `ept train | eval | predict`, also `python -m ept`.

Bad input ends with one line on standard error and exit code 2. Everything that can be wrong with what a user gives is
looked at before the first step; an error after that is a fault, and shows its traceback, but for a training that
diverges.
"""

import importlib
import os
import sys

from ept.version import __version__

__all__ = ["main"]

# Command -> where its function is (it takes the words after the command), and what the help says of it.
COMMANDS = {
    "train": ("ept.cli.train:train", "tune a model on labelled text and save the adapter"),
    "eval": ("ept.cli.evaluate:evaluate", "evaluate an adapter on labelled text"),
    "predict": ("ept.cli.predict:predict", "label texts, one a line"),
    "fold": ("ept.cli.fold:run", "fold an adapter for inference, as a PEFT adapter where that can hold it"),
    "inspect": ("ept.cli.inspect:run", "show what is in an adapter"),
    "doctor": ("ept.cli.doctor:run", "check this installation: versions, devices, implementations"),
    "import": ("ept.cli.import_peft:run", "read a PEFT prompt-tuning adapter or a DePT checkpoint"),
    "sweep": ("ept.cli.sweep:run", "train every method on every task, with several rates and seeds"),
    "report": ("ept.cli.report:run", "make the table and the picture of a sweep"),
    "plan": ("ept.cli.plan:run", "say what memory a training step takes, from the model's config"),
}

USAGE = """usage: ept COMMAND [options]

Efficient Prompt Tuning: a frozen transformers model learns a task from a few tens of thousands of parameters.

commands:
{commands}

  ept COMMAND --help shows a command's options; ept --version the version.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a command; `argv` is that of the process without its first word. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:<9} {said}" for name, (_, said) in COMMANDS.items())
        print(USAGE.format(commands=commands), end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"ept {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"ept: error: unknown command {argv[0]!r}: one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        module, function = COMMANDS[argv[0]][0].split(":")
        getattr(importlib.import_module(module), function)(argv[1:])
    except BrokenPipeError:  # the reader of our output has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


# ---------------------------------------------------------------------- train


# ---------------------------------------------------------------------- eval


# ---------------------------------------------------------------------- predict
