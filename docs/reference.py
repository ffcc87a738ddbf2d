"""Writes docs/reference-cli.md and docs/reference-config.md from the code: `python docs/reference.py`."""

import contextlib
import dataclasses
import io
import os
from pathlib import Path

from ept import EPTConfig
from ept.cli import COMMANDS, main
from ept.cli.options import ADAPTER_HELP

HERE = Path(__file__).parent
NOTE = "Written by `python docs/reference.py`; do not edit.\n"


def command_line() -> str:
    """The help of `ept` and of each command, at 100 columns."""
    os.environ["COLUMNS"] = "100"
    parts = ["# The command line\n", NOTE]
    for command in ([], *([name] for name in COMMANDS)):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main([*command, "--help"])
        parts.append(f"## {' '.join(['ept', *command])}\n\n```\n{said.getvalue().rstrip()}\n```\n")
    return "\n".join(parts)


def config() -> str:
    """A table of EPTConfig's fields with the values of the presets."""
    ours, papers, deep = EPTConfig(), EPTConfig.paper(), EPTConfig.deep()
    rows = ["| setting | default | `EPTConfig.paper()` | `EPTConfig.deep()` | |", "|---|---|---|---|---|"]
    for field in dataclasses.fields(EPTConfig):
        values = " | ".join(f"`{getattr(preset, field.name)!r}`" for preset in (ours, papers, deep))
        rows.append(f"| `{field.name}` | {values} | {ADAPTER_HELP[field.name]} |")
    counts = f"At d = 768 the default trains {ours.num_parameters(768):,} parameters, the paper's {papers.num_parameters(768):,}."
    about = (
        "Symbols as in [method.md](method.md). `EPTConfig.for_budget(parameters, d)` chooses the sizes for a budget.\n"
    )
    return "\n".join(["# EPTConfig\n", NOTE, about, "\n".join(rows), "", counts, ""])


FILES = {"reference-cli.md": command_line, "reference-config.md": config}

if __name__ == "__main__":
    for name, text in FILES.items():
        (HERE / name).write_text(text(), encoding="utf-8")
