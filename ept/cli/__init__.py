"""The command line: one file a command, each with `run(argv)`; `parser`, `options` and `errors` for what they share."""

from ept.cli.main import COMMANDS, main

__all__ = ["COMMANDS", "main"]
