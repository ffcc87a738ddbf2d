"""A parser of options that dataclasses declare, with errors of one line and a help that a person can read."""

import dataclasses
import itertools
import math
import re
import shutil
import sys
import textwrap
from dataclasses import dataclass, field
from typing import Any, NoReturn

from transformers import HfArgumentParser

__all__ = ["ForeignOptions", "OptionParser", "option"]

AT_LEAST_ONE = (
    "shuffle_buffer", "batch", "length", "target_length", "max_seq_length", "max_target_length", "batch_size",
    "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "eval_accumulation_steps",
    "dataloader_prefetch_factor", "generation_max_length", "generation_num_beams",
    "early_stopping_patience",
)  # fmt: skip
NAME_WIDTH = 34  # columns of the help before an option's explanation
LONGEST_HELP = 240  # of another library's explanation, some of which run over many lines


def option(help: str, default: Any = None, **metadata: Any) -> Any:
    """Declares a dataclass's field that is an option with a default."""
    return field(default=default, metadata={"help": help} | metadata)


@dataclass(frozen=True)
class ForeignOptions:
    """How the help shows a dataclass of another library.

    Attributes:
        type: the dataclass.
        title: what stands above its options.
        explained: the options that have lines of their own, in order; the others are listed by name under `rest`.
        help: explanations in place of the dataclass's.
    """

    type: Any
    title: str
    rest: str
    explained: tuple[str, ...]
    help: dict[str, str]


class OptionParser(HfArgumentParser):
    """transformers' parser, with errors of one line and with a help in groups, one for each dataclass.

    Args:
        command: the name after `ept`.
        description: what the command does.
        types: dataclasses with an `_argument_group_name`, or of another library.
        foreign: of those, how the help shows it.
    """

    def __init__(self, command: str, description: str, *types: Any, foreign: ForeignOptions | None = None):
        self.foreign = foreign
        super().__init__(types, prog=f"ept {command}", description=description, allow_abbrev=False)

    def parse(self, argv: list[str]) -> tuple[Any, ...]:
        """Parses the words into one object for each dataclass; an option that none has is an error."""
        *groups, unknown = self.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            self.error(f"unknown option {unknown[0]}: see {self.prog} --help")
        for name, value in itertools.chain.from_iterable(vars(group).items() for group in groups):
            if requirement := _unmet_requirement(name, value):
                words = " ".join(map(str, value)) if isinstance(value, list) else value
                self.error(f"{self._spelling(name, argv)} {words} must be {requirement}")
        return tuple(groups)

    def _spelling(self, name: str, argv: list[str]) -> str:
        """Returns an option as the user wrote it, where it has several names."""
        fields = (f for group in self.dataclass_types for f in dataclasses.fields(group) if f.name == name)
        aliases = [alias for f in fields for alias in f.metadata.get("aliases", ())]
        written = {word.partition("=")[0] for word in argv}
        return next((alias for alias in aliases if alias in written), f"--{name}")

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)  # every option has a second spelling, with hyphens
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def format_help(self) -> str:
        width = max(60, min(110, shutil.get_terminal_size().columns))
        parts = [f"usage: {self.prog} [options]\n\n{textwrap.fill(self.description or '', width)}\n"]
        for group in self.dataclass_types:
            fields = {f.name: f for f in dataclasses.fields(group) if f.init}
            if self.foreign is not None and group is self.foreign.type:
                parts += _foreign_group(self.foreign, fields, width)
            else:
                parts += [f"\n{group._argument_group_name}:\n"]
                parts += [_entry(f, f.metadata.get("help", ""), width) for f in fields.values()]
        return "".join(parts)

    def print_usage(self, file: Any = None) -> None:
        print(f"usage: {self.prog} [options]", file=file or sys.stderr)


def _unmet_requirement(name: str, value: Any) -> str | None:
    """Returns what a number's option takes, if `value` is something else."""
    if name in AT_LEAST_ONE and value is not None and value < 1:
        return "at least 1"
    if name == "dataloader_num_workers" and value < 0:
        return "at least 0"
    rates = value if name == "learning_rates" else [value] if name.endswith("learning_rate") else []
    if not all(rate is None or (rate >= 0 and math.isfinite(rate)) for rate in rates):
        return "finite and at least 0"
    if name == "num_train_epochs" and not (value > 0 and math.isfinite(value)):
        return "finite and above 0"
    return "a number" if isinstance(value, float) and math.isnan(value) else None


def _foreign_group(foreign: ForeignOptions, fields: dict[str, dataclasses.Field], width: int) -> list[str]:
    """Returns the help's lines for another library's options."""
    lines = [f"\n{foreign.title}:\n"]
    for name in foreign.explained:
        if name in fields:
            text = foreign.help.get(name) or fields[name].metadata.get("help", "")
            if len(text) > LONGEST_HELP:
                text = text.split(". ")[0].rstrip(".") + "."
            lines.append(_entry(fields[name], text, width))
    names = ", ".join(f"--{name}" for name in fields if name not in foreign.explained)
    filled = textwrap.fill(names, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return [*lines, f"\n{foreign.rest}:\n", filled, "\n"]


def _entry(f: dataclasses.Field, text: str, width: int) -> str:
    """Returns an option's lines in the help: its name, and from column NAME_WIDTH what it does and its default."""
    if "choices" in f.metadata:
        text += f" One of {', '.join(f.metadata['choices'])}."
    if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
        text += " (required)"
    elif f.default is not dataclasses.MISSING and f.default not in (None, False, ""):
        text += f" (default: {getattr(f.default, 'value', f.default)})"
    lines = textwrap.wrap(text, width - NAME_WIDTH) or [""]
    name, indent = f"  --{f.name}", " " * NAME_WIDTH
    first = f"{name:<33} {lines[0]}\n" if len(name) < NAME_WIDTH - 1 else f"{name}\n{indent}{lines[0]}\n"
    return first + "".join(f"{indent}{line}\n" for line in lines[1:])
