"""`ept inspect`: what is in an adapter."""

from dataclasses import dataclass, field

from ept.console import bad_input_is_one_line, say
from ept.inspect.findings import examine, sections, write_page

__all__ = ["InspectArguments", "run"]


@dataclass
class InspectArguments:
    _argument_group_name = "adapter"

    adapter: str = field(metadata={"help": "Directory of the adapter; `ept inspect DIR` is enough."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model it was trained on, where it is not in its old place."}
    )
    nearest: int = field(
        default=3, metadata={"help": "Nearest words of each prompt row; 0 does not load the model for them."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Also write PNG files and inspect.html here."})


def run(argv: list[str]) -> None:
    """`ept inspect DIR`."""
    with bad_input_is_one_line("inspect"):
        from ept.cli.options import OptionParser

        if argv and not argv[0].startswith("-"):
            argv = ["--adapter", *argv]
        (given,) = OptionParser("inspect", "Shows what is in an adapter.", InspectArguments).parse(argv)
        found = examine(given.adapter, given.model_name_or_path, given.nearest)
        print("\n\n".join(f"{title}\n{'-' * len(title)}\n{text}" for title, text in sections(found)))
        if given.output_dir is not None:
            for path in write_page(found, given.output_dir):
                say(f"wrote {path}")
