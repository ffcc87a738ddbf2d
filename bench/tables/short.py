"""The short table at the end of a run on a GPU: everything that was measured, from the tables alone."""

from pathlib import Path
from typing import Any

from .records import SIZES, TABLES, read

__all__ = ["short_table"]

Rows = list[dict[str, Any]]


def short_table(directory: Path) -> list[str]:
    """Lines of the tables that a directory holds."""
    tables = {name: read(path) if (path := directory / f"{name}.csv").exists() else [] for name in TABLES}
    rows = [row for table in tables.values() for row in table]
    if not rows:
        return ["nothing was measured"]
    first = rows[0]
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "triton", "transformers", "peft", "commit"))
    lines = [f"{first['device']}: {versions}"]
    lines += _stems([row for row in tables["micro"] if row["axis"] not in (*SIZES, "base")])
    lines += _steps(tables["end_to_end"], tables["ratios"])
    lines += _mixed([row for row in tables["ratios"] if "adapter" in row["over"]])
    return lines + _decoding(tables["decoding"], tables["ratios"])


def _stems(rows: Rows) -> list[str]:
    """A line for each stem, sizes and implementation: milliseconds as call and as graph, and their share of a copy."""
    if not rows:
        return []
    lines = [
        f"a large copy: {float(rows[0]['copy_gb_per_s']):.0f} GB/s. Milliseconds of a call and of its graph, and the share",
        "of that copy which the predicted bytes reach in the graph, or in the call where there is none:",
        f"{'stem':16}{'sizes':28}{'ran':27}{'forward: call, graph, share':>28}{'backward: the same':>28}{'launches':>10}",
    ]
    points: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = tuple(
            str(row.get(name, "")) for name in ("stem", "axis", "batch", "length", "d", "q", "impl", "adapters")
        )
        points.setdefault(key, {})[row["way"]] = row
    for (stem, axis, batch, length, d, *_), ways in points.items():
        row = ways["forward"]
        ran = f"auto: {row['ran']}" if row.get("ran") else row["impl"]
        launches = f"{row['launches']} + {ways['backward']['launches']}"
        cells = [_times(ways[way]) for way in ("forward", "backward")]
        sizes = f"{axis}, {batch}×{length}×{d}"
        lines.append(f"{stem:16}{sizes:28}{ran:27}{cells[0]:>28}{cells[1]:>28}{launches:>10}")
    return lines


def _times(row: dict[str, Any]) -> str:
    graph = float(row["graph_ms"]) if row.get("graph_ms") else None
    shown = f"{graph:8.4f}" if graph is not None else "      –"
    share = int(row["bytes_predicted"]) / ((graph or row["median"]) * float(row["copy_gb_per_s"]) * 1e6)
    return f"{row['median']:8.4f} {shown} {share:6.0%}"


def _steps(rows: Rows, ratios: Rows) -> list[str]:
    """A line for each method on a shape: milliseconds, ratios and peak memory of its eager and its captured step."""
    lines = []
    if rows:
        lines.append(
            f"{'training step':32}{'ms':>9}{'/ floor':>9}{'/ PT 100':>9}{'/ LoRA':>9}{'  MiB':>8}   captured: ms, same ratios"
        )
    eager = [row for row in rows if not row.get("way")]
    for row in eager:
        of_row = {"shape": row["shape"], "method": row["method"]}
        captured = next((r for r in rows if r.get("way") == "captured" and _is(r, of_row)), None)
        line = f"{row['shape'] + ', ' + row['method']:32}{row['median']:9.2f}{_overs(ratios, of_row, '')}"
        line += f"{float(row['peak_bytes']) / 2**20:8.0f}   "
        if captured is not None:
            line += f"{captured['median']:9.2f}{_overs(ratios, of_row, 'captured')}"
        lines.append(line)
    return lines


def _is(row: dict[str, Any], values: dict[str, str]) -> bool:
    return all(row[name] == value for name, value in values.items())


def _overs(ratios: Rows, of_row: dict[str, str], way: str) -> str:
    """The ratios over the floor, prompt tuning 100 and LoRA, a dash where there is none."""
    cells = []
    for over in ("floor", "prompt tuning 100", "LoRA"):
        matching = [r for r in ratios if _is(r, of_row) and (r.get("way") or "") == way and r["over"].startswith(over)]
        cells.append(f"{matching[0]['median']:9.3f}" if matching else f"{'–':>9}")
    return "".join(cells)


def _mixed(ratios: Rows) -> list[str]:
    return [f"{row['shape']}, {row['method']} / {row['over']}: {row['median']:.3f}" for row in ratios]


def _decoding(rows: Rows, ratios: Rows) -> list[str]:
    """Tokens per second of each model and batch, and its time over the backbone's."""
    lines = []
    for row in rows:
        over = [r for r in ratios if r["method"] == f"{row['method']}, decoding" and r["batch"] == row["batch"]]
        ratio = f", time over the backbone's {over[0]['median']:.3f}" if over else ""
        lines.append(
            f"decoding {row['shape']}, batch {row['batch']}, {row['method']}: {row['median']:.0f} tokens/s{ratio}"
        )
    return lines
