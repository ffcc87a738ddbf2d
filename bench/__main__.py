"""The benchmarks: `python -m bench cpu | gpu | compare A B | plot`. See bench/README.md."""

import argparse
import sys
from pathlib import Path

from .tables import records


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_cpu(commands.add_parser("cpu", help="everything on this machine's CPU (make bench)"))
    _add_gpu(commands.add_parser("gpu", help="everything on its GPU within 8 minutes (make bench-gpu)"))
    command = commands.add_parser("compare", help="what became slower from A to B, beyond the noise of both")
    command.add_argument("a", type=Path, metavar="A", help="a result table (CSV), or a directory of them")
    command.add_argument("b", type=Path, metavar="B")
    command = commands.add_parser("plot", help="draws all figures from the tables alone")
    command.add_argument(
        "directories", type=Path, nargs="*", help="default: every one in bench/results that has tables"
    )
    command.add_argument("--output_dir", type=Path, default=Path("runs/figures"))
    options = parser.parse_args(argv)
    try:
        if options.command == "compare":
            from .tables.slower import report

            return int(report(options.a, options.b) > 0)
        if options.command == "plot":
            from .tables.figures import draw_all

            holders = {path.parent for name in records.TABLES for path in records.RESULTS.glob(f"*/{name}.csv")}
            return draw_all(options.directories or sorted(holders), options.output_dir)
        if options.command == "cpu":
            from .cpu import on_cpu

            return on_cpu(options)
        from .gpu import on_gpu

        return on_gpu(options)
    except ValueError as error:
        print(f"python -m bench {options.command}: {error}", file=sys.stderr)
        return 2


def _add_cpu(command: argparse.ArgumentParser) -> None:
    command.add_argument("--parts", nargs="+", default=["micro", "end_to_end"], choices=["micro", "end_to_end"])
    command.add_argument(
        "--points", default="", help="only microbenchmarks whose name holds this, e.g. base or prompt_embed"
    )
    command.add_argument("--shapes", nargs="+", help="only these shapes end to end, e.g. MiniLM T5-small")
    command.add_argument("--rounds", type=float, default=1.0, help="times the usual number of rounds end to end")
    command.add_argument("--output_dir", type=Path, help="default: bench/results/<device>")
    command.add_argument("--threads", type=int, help="default: one for each core, at most 2")
    clocks = "wall, or on a shared machine the process's own CPU time: cpu (with --threads 1)"
    command.add_argument("--clock", choices=["wall", "cpu"], default="wall", help=clocks)


def _add_gpu(command: argparse.ArgumentParser) -> None:
    parts = ["stems", "steps", "mixed", "decoding", "sweep"]
    command.add_argument("--parts", nargs="+", choices=parts, help="default: all but sweep, every microbenchmark")
    command.add_argument("--minutes", type=float, default=8.0, help="no part starts or goes on after so many")
    command.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to try the script out")
    command.add_argument("--small", action="store_true", help="tiny shapes, for the same purpose")
    command.add_argument("--output_dir", type=Path, help="default: bench/results/<device>")


if __name__ == "__main__":
    sys.exit(main())
