"""Result tables: one CSV per kind of measurement and device, in bench/results/<device>/.

Every row says what was measured (`IDENTITY`), a median with its quartiles (`unit`, `median`, `low`, `high`, `rounds`),
what belongs to it, and the machine (`ept.machine.describe`). Columns that a table has no use for are left out.
"""

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["IDENTITY", "RESULTS", "SIZES", "TABLES", "directory", "identity", "read", "tables", "update", "write"]

RESULTS = Path(__file__).parents[1] / "results"
SIZES = ("d", "s", "n", "r", "k", "h", "q", "batch", "length")  # of a microbenchmark
TABLES = ("micro", "end_to_end", "ratios", "decoding")
# What a row is of. Two rows that agree in these were meant to measure the same.
IDENTITY = (
    "stem", "figure", "shape", "method", "over", "impl", "way", "axis",
    "batch", "length", "d", "s", "n", "r", "k", "h", "q", "adapters", "dtype", "unit", "device", "threads", "clock",
)  # fmt: skip


def directory(device: str) -> Path:
    """Where a device's tables are: its name in small letters, anything else than letters and digits as a dash."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def identity(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(column, "")) for column in IDENTITY)


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes the table over what stands there, whole or not at all. ValueError if there are no rows."""
    rows = list(rows)
    if not rows:
        raise ValueError(f"nothing to write to {path}: no row was measured")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    with open(fresh, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows({name: _short(value) for name, value in row.items()} for row in rows)
    fresh.replace(path)


def update(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds the rows to the table, each in the place of one that measured the same."""
    new = {identity(row) for row in rows}
    old = read(path) if path.exists() else []
    write(path, [*(row for row in old if identity(row) not in new), *rows])


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, its figures as floats. ValueError if the file is not one of ours."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist: `make bench` writes the tables of this machine") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    if not rows or not {"median", "low", "high", "unit"} <= rows[0].keys():
        raise ValueError(f"{path} is not a result table: it needs rows with median, low, high and unit")
    for number, row in enumerate(rows, 2):
        for name in ("median", "low", "high"):
            try:
                row[name] = float(row[name])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: {name} is {row[name]!r}, not a number") from error
    return rows


def tables(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """A directory's tables by name. ValueError if it has none."""
    by_name = {name: read(directory / f"{name}.csv") for name in TABLES if (directory / f"{name}.csv").exists()}
    if not by_name:
        raise ValueError(f"{directory} holds no result table ({', '.join(f'{name}.csv' for name in TABLES)})")
    return by_name


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
