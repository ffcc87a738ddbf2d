"""The command line: one file a command, `options` for what they share."""

from ept.cli.main import COMMANDS, main

__all__ = ["COMMANDS", "main"]
