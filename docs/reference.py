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
    presets = EPTConfig(), EPTConfig.input_only(), EPTConfig.paper()
    rows = ["| setting | default | `EPTConfig.input_only()` | `EPTConfig.paper()` | |", "|---|---|---|---|---|"]
    for field in dataclasses.fields(EPTConfig):
        values = " | ".join(f"`{getattr(preset, field.name)!r}`" for preset in presets)
        rows.append(f"| `{field.name}` | {values} | {ADAPTER_HELP[field.name]} |")
    ours = EPTConfig(deep_layers=11)
    counts = (
        f"At d = 768 and 12 layers the default trains {ours.num_parameters(768):,} parameters, the other two "
        f"{presets[1].num_parameters(768):,} and {presets[2].num_parameters(768):,}."
    )
    about = (
        "Symbols as in [method.md](method.md). `config_for_budget(model, parameters)` chooses the sizes for a budget of trained "
        "parameters. "
        "`EPTConfig.deep()` is the default with `deep_layers=-1`: it refuses a backbone whose layers cannot be found.\n"
    )
    return "\n".join(["# EPTConfig\n", NOTE, about, "\n".join(rows), "", counts, ""])


FILES = {"reference-cli.md": command_line, "reference-config.md": config}

if __name__ == "__main__":
    for name, text in FILES.items():
        (HERE / name).write_text(text(), encoding="utf-8")
