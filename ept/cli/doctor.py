"""`ept doctor`: checks this installation."""

from dataclasses import dataclass

from ept.cli.errors import bad_input_is_one_line
from ept.cli.parser import OptionParser
from ept.inspect import self_test

__all__ = ["DoctorArguments", "run"]


@dataclass
class DoctorArguments:
    _argument_group_name = "doctor"


def run(argv: list[str]) -> None:
    """`ept doctor`: exit code 1 if something is wrong."""
    with bad_input_is_one_line("doctor"):
        parser = OptionParser("doctor", "Checks this installation. Exit code 1: something is wrong.", DoctorArguments)
        parser.parse(argv)
    problems: list[str] = []
    parts = {"versions": self_test.versions, "devices": self_test.devices, "self-test": self_test.self_tests}
    for title, lines_of in parts.items():
        print(title)
        for line in lines_of(problems):
            print(f"  {line}", flush=True)
    print("\n".join(f"PROBLEM: {problem}" for problem in problems) or "nothing is wrong")
    if problems:
        raise SystemExit(1)
