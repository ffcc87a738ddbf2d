"""`python -m bench compare A B`: what became slower from result table A to B, beyond the noise of both."""

import statistics
from pathlib import Path
from typing import Any

from .records import identity, read, tables

__all__ = ["compare", "report"]


def compare(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of the same identity in both tables, by what became of them.

    Slower: B's lower quartile lies above A's upper one. Faster: the other way round. A row with a single value has
    no noise to compare with and is only counted. Returns "slower" and "faster" (pairs, worst first), "same" and
    "single" (counts), "only" (counts of rows without a partner) and "shift" (the median ratio of all times, B over A).
    """
    before, after = ({identity(row): row for row in rows} for rows in (a, b))
    outcome: dict[str, Any] = {"slower": [], "faster": [], "same": 0, "single": 0}
    ratios = []
    for key in before.keys() & after.keys():
        old, new = before[key], after[key]
        if old["unit"] == "ms":
            ratios.append(new["median"] / old["median"])
        if min(int(row.get("rounds") or 1) for row in (old, new)) < 2:
            outcome["single"] += 1
        elif new["low"] > old["high"]:
            outcome["slower"].append((old, new))
        elif new["high"] < old["low"]:
            outcome["faster"].append((old, new))
        else:
            outcome["same"] += 1
    outcome["slower"].sort(key=_ratio, reverse=True)
    outcome["faster"].sort(key=_ratio)
    outcome["only"] = tuple(len(x.keys() - y.keys()) for x, y in ((before, after), (after, before)))
    outcome["shift"] = statistics.median(ratios) if ratios else None
    return outcome


def _ratio(pair: tuple[dict[str, Any], dict[str, Any]]) -> float:
    old, new = pair
    return new["median"] / old["median"]


def report(a: Path, b: Path) -> int:
    """Prints the comparison of two tables, or of the tables of the same names in two directories.

    Returns how many rows became slower. ValueError if there is nothing to compare.
    """
    before, after = _tables(a), _tables(b)
    names = [name for name in before if name in after]
    if not names:
        raise ValueError(f"{a} and {b} have no table of the same name")
    slower = 0
    for name in names:
        outcome = compare(before[name], after[name])
        pairs = len(outcome["slower"]) + len(outcome["faster"]) + outcome["same"] + outcome["single"]
        if not pairs:
            raise ValueError(
                f"{name}: the two tables have no row in common (they are of {_devices(before[name])} "
                f"and of {_devices(after[name])})"
            )
        slower += len(outcome["slower"])
        print(f"{name}: {pairs} rows in both, {outcome['only'][0]} only in {a}, {outcome['only'][1]} only in {b}")
        for word in ("slower", "faster"):
            print(f"  {len(outcome[word])} {word} beyond the noise of both")
            for old, new in outcome[word]:
                unit = old["unit"] if old["unit"] != "ratio" else ""
                print(
                    f"    {_ratio((old, new)):7.2f} ×  {old['median']:.4g} ({old['low']:.4g} … {old['high']:.4g}) -> "
                    f"{new['median']:.4g} ({new['low']:.4g} … {new['high']:.4g}) {unit}  {_words(old)}"
                )
        if outcome["single"]:
            print(f"  {outcome['single']} measured once, so without a noise to judge by")
        if outcome["shift"] is not None:
            print(
                f"  all times together: {outcome['shift']:.2f} × (far from 1: the machine was busier, or everything changed)"
            )
    return slower


def _tables(path: Path) -> dict[str, list[dict[str, Any]]]:
    return tables(path) if path.is_dir() else {"table": read(path)}


def _devices(rows: list[dict[str, Any]]) -> str:
    return " and ".join(
        sorted({f"{row.get('device')}, {row.get('threads')} threads, {row.get('clock')} clock" for row in rows})
    )


def _words(row: dict[str, Any]) -> str:
    """What the row is of, without what all rows share."""
    return " ".join(
        word for word in identity(row | {"device": "", "threads": "", "clock": "", "unit": ""}) if word not in ("", "0")
    )
