"""Writes docs/reference-cli.md, reference-config.md and reference-python.md from the code: `python docs/reference.py`."""

import contextlib
import dataclasses
import inspect
import io
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import ept
import ept.training
import ept_kernels
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
        more = " Without the command line also adapters." if field.name == "init" else ""
        rows.append(f"| `{field.name}` | {values} | {ADAPTER_HELP[field.name]}{more} |")
    ours = EPTConfig(deep_layers=11)
    counts = (
        f"At d = 768 and 12 layers the default trains {ours.num_parameters(768):,} parameters, the other two "
        f"{presets[1].num_parameters(768):,} and {presets[2].num_parameters(768):,}."
    )
    about = (
        "Symbols as in [method.md](method.md). `config_for_budget(model, parameters)` chooses the sizes for a budget of trained\n"
        "parameters. `EPTConfig.deep()` is the default with `deep_layers=-1`: it refuses a backbone whose layers are not found.\n"
    )
    return "\n".join(["# EPTConfig\n", NOTE, about, "\n".join(rows), "", counts, ""])


def python() -> str:
    """Every exported class and function with its arguments and its docstring's first paragraph, and EPTModel's methods."""
    about = "Every class and function that is exported, and EPTModel's methods. `help(…)` shows the whole of each.\n"
    parts = ["# Python\n", NOTE, about]
    for module in (ept, ept.training, ept_kernels):
        names = [name for name in module.__all__ if module is ept or name not in ept.__all__]
        parts += [f"## {module.__name__}\n", *_table(module, names)]
    methods = [name for name in vars(ept.EPTModel) if not name.startswith("_") and _says(ept.EPTModel, name)]
    return "\n".join([*parts, "## EPTModel\n", *_table(ept.EPTModel, sorted(methods))])


def _table(owner: ModuleType | type, names: list[str]) -> list[str]:
    rows = [f"| {_called(name, getattr(owner, name))} | {_says(owner, name)} |" for name in names if _says(owner, name)]
    return ["| | |", "|---|---|", *rows, ""]


def _says(owner: ModuleType | type, name: str) -> str:
    """The first paragraph of what a class, function or property says itself; "" of a value."""
    value = inspect.getattr_static(owner, name) if inspect.isclass(owner) else getattr(owner, name)
    documented = inspect.isclass(value) or callable(value) or isinstance(value, (property, classmethod))
    own = (inspect.getdoc(value) or "") if documented else ""
    return own.split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def _called(name: str, value: Any) -> str:
    """A function's name and arguments, without their types; of anything else the name."""
    if inspect.isclass(value) or not callable(value):
        return f"`{name}`"
    arguments = inspect.signature(value).parameters.values()
    bare = [argument.replace(annotation=inspect.Parameter.empty) for argument in arguments if argument.name != "self"]
    return f"`{name}{inspect.Signature(bare)}`"


FILES = {"reference-cli.md": command_line, "reference-config.md": config, "reference-python.md": python}

if __name__ == "__main__":
    for name, text in FILES.items():
        (HERE / name).write_text(text(), encoding="utf-8")
