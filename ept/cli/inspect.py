"""`ept inspect`: what is in an adapter."""

from dataclasses import dataclass, field

from ept.cli.errors import as_options, bad_input_is_one_line
from ept.cli.options import ADAPTER_DIR_HELP, REVISION_HELP
from ept.cli.parser import OptionParser, option
from ept.console import say
from ept.inspect.findings import examine
from ept.inspect.page import write_page
from ept.inspect.text import sections

__all__ = ["InspectArguments", "run"]


@dataclass
class InspectArguments:
    _argument_group_name = "adapter"

    adapter: str = field(metadata={"help": f"{ADAPTER_DIR_HELP}; `ept inspect DIR` is enough."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model it was trained on, where it is not in its old place."}
    )
    revision: str | None = option(REVISION_HELP)
    nearest: int = field(
        default=3, metadata={"help": "Nearest words of each prompt row; 0 does not load the model for them."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Also write PNG files and inspect.html here."})


def run(argv: list[str]) -> None:
    """`ept inspect DIR`: prints what is in the adapter, and draws it if asked for."""
    with bad_input_is_one_line("inspect"):
        if argv and not argv[0].startswith("-"):
            argv = ["--adapter", *argv]
        (options,) = OptionParser("inspect", "Shows what is in an adapter.", InspectArguments).parse(argv)
        findings = examine(options.adapter, options.model_name_or_path, options.nearest, revision=options.revision)
        if findings.why_no_words is not None:
            say(as_options(findings.why_no_words))
        print("\n\n".join(f"{title}\n{'-' * len(title)}\n{text}" for title, text in sections(findings)))
        if options.output_dir is not None:
            for path in write_page(findings, options.output_dir):
                say(f"wrote {path}")
