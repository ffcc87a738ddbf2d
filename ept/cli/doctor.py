"""`ept doctor`: checks this installation."""

from dataclasses import dataclass

from ept.console import bad_input_is_one_line
from ept.inspect.self_test import _devices, _self_tests, _versions

__all__ = ["DoctorArguments", "run"]


@dataclass
class DoctorArguments:
    _argument_group_name = "doctor"


def run(argv: list[str]) -> None:
    """`ept doctor`: exit code 1 if something is wrong."""
    with bad_input_is_one_line("doctor"):
        from ept.cli.options import OptionParser

        OptionParser("doctor", "Checks this installation. Exit code 1: something is wrong.", DoctorArguments).parse(
            argv
        )
    problems: list[str] = []
    for title, part in (("versions", _versions), ("devices", _devices), ("self-test", _self_tests)):
        print(title)
        for line in part(problems):
            print(f"  {line}", flush=True)
    print("\n".join(f"PROBLEM: {problem}" for problem in problems) or "nothing is wrong")
    if problems:
        raise SystemExit(1)
