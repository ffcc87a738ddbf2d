"""`ept report`: the table and the picture of a sweep."""

from dataclasses import dataclass, field
from pathlib import Path

from ept.cli.options import OptionParser, option
from ept.compare.report import _draw, _markdown, table
from ept.compare.sweep import finished
from ept.console import bad_input_is_one_line

__all__ = ["ReportArguments", "run"]


@dataclass
class ReportArguments:
    _argument_group_name = "report"

    results: list[str] = field(metadata={"help": "Files that ept sweep wrote, all of one model and budget."})
    output: str | None = option("File for the Markdown; by default standard output.")
    picture: str | None = option("File for the picture (png, pdf, svg).")
    baseline: str = option("The method that the others are compared with.", "EPT")


def run(argv: list[str]) -> None:
    """`ept report`: prints or writes the table, and the picture if asked for."""
    with bad_input_is_one_line("report"):
        (options,) = OptionParser("report", "Makes the table of the runs of ept sweep.", ReportArguments).parse(argv)
        records = []
        for name in options.results:
            if not Path(name).is_file():
                raise ValueError(f"{name}: no such file")
            records += finished(Path(name))
        cells = table(records)
        text = _markdown(cells, records, options.baseline)
        if options.picture is not None:
            _draw(cells, options.picture)
        if options.output is None:
            print(text)
        else:
            Path(options.output).write_text(text + "\n", encoding="utf-8")
