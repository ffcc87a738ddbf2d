"""`python -m bench plot`: draws the figures of every device from its result tables, and from nothing else."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .records import SIZES, tables

__all__ = ["draw", "draw_all"]


def draw_all(directories: list[Path], output_dir: Path) -> int:
    """Draws every directory's tables into a folder of its name. ValueError if there are no tables. Returns 0."""
    if not directories:
        raise ValueError("no result tables found: `make bench` writes them")
    for directory in directories:
        for name, figure in draw(tables(directory)).items():
            path = output_dir / directory.name / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=120)
            print(path)
    return 0


def draw(of_device: dict[str, list[dict[str, Any]]]) -> dict[str, Figure]:
    """The figures of one device by name, of the tables that are there."""
    figures = {}
    if "micro" in of_device:
        rows = of_device["micro"]
        for stem in dict.fromkeys(row["stem"] for row in rows if row["axis"] in SIZES):
            figures[f"micro-{stem}"] = _sweeps([row for row in rows if row["stem"] == stem])
    if "end_to_end" in of_device:
        figures["end_to_end"] = _bars(of_device["end_to_end"])
    if "ratios" in of_device:
        figures["ratios"] = _ratios(of_device["ratios"])
    return figures


def _device(row: dict[str, Any]) -> str:
    return (
        f"{row['device']}, {row['threads']} threads, {row['clock']} clock, torch {row['torch']}, commit {row['commit']}"
    )


def _sweeps(rows: list[dict[str, Any]]) -> Figure:
    """Milliseconds along each axis, a row of panels for each way, a line with quartiles for each implementation."""
    axes_of = [size for size in SIZES if any(row["axis"] == size for row in rows)]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    columns = max(1, len(axes_of))
    figure = Figure(figsize=(2.6 * columns + 1.4, 2.4 * len(ways) + 0.8), layout="constrained")
    panels = figure.subplots(len(ways), columns, squeeze=False, sharey="row")
    for way, line in zip(ways, panels, strict=True):
        for axis, panel in zip(axes_of or ["batch"], line, strict=True):
            _sweep(panel, [row for row in rows if row["way"] == way and row["axis"] in (axis, "base")], axis)
        line[0].set_ylabel(f"{way}, ms")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels)), fontsize=8, frameon=False)
    figure.supxlabel(f"{rows[0]['stem']}: median and quartiles; {_device(rows[0])}", fontsize=8)
    return figure


def _sweep(panel: Axes, rows: list[dict[str, Any]], axis: str) -> None:
    lines = defaultdict(list)
    for row in rows:
        lines[row["impl"]].append((int(row[axis]), row["median"], row["low"], row["high"]))
    for impl, found in lines.items():
        at, median, low, high = zip(*sorted(found), strict=True)
        around = [
            [m - x for m, x in zip(median, low, strict=True)],
            [x - m for m, x in zip(median, high, strict=True)],
        ]
        panel.errorbar(at, median, around, marker="o", markersize=3, linewidth=1, capsize=2, label=impl)
    panel.set(xscale="log", yscale="log", xlabel=axis)
    ticks = sorted({int(row[axis]) for row in rows})
    panel.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7)
    panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    panel.grid(alpha=0.3)


def _with_way(label: str, row: dict[str, Any]) -> str:
    """The label, and whether the step is replayed as a CUDA graph."""
    return f"{label}, {row['way']}" if row.get("way") else label


def _bars(rows: list[dict[str, Any]]) -> Figure:
    """Step time and peak memory of each method, a row of panels for each shape."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(10, 1.9 * len(shapes) + 0.6), layout="constrained")
    panels = figure.subplots(len(shapes), 2, squeeze=False)
    for shape, (left, right) in zip(shapes, panels, strict=True):
        of_shape = [row for row in rows if row["shape"] == shape]
        names, place = [_with_way(row["method"], row) for row in of_shape], range(len(of_shape))
        median = [row["median"] for row in of_shape]
        around = [[r["median"] - r["low"] for r in of_shape], [r["high"] - r["median"] for r in of_shape]]
        left.barh(place, median, xerr=around, capsize=2, color="tab:blue")
        left.set_yticks(place, names, fontsize=7)
        left.set_title(shape, fontsize=8, loc="left")
        right.barh(place, [float(row["peak_bytes"] or 0) / 2**20 for row in of_shape], color="tab:orange")
        right.set_yticks([])
        for panel in (left, right):
            panel.invert_yaxis()
            panel.tick_params(axis="x", labelsize=7)
    panels[-1][0].set_xlabel("training step, ms (median and quartiles)", fontsize=8)
    panels[-1][1].set_xlabel("peak memory of a step beside the frozen weights, MiB", fontsize=8)
    figure.supxlabel(_device(rows[0]), fontsize=8)
    return figure


def _ratios(rows: list[dict[str, Any]]) -> Figure:
    """Every ratio with its quartiles, and its goal where it has one."""
    figure = Figure(figsize=(9, 0.26 * len(rows) + 1.2), layout="constrained")
    panel = figure.subplots()
    for place, row in enumerate(rows):
        middle = row["median"]
        panel.errorbar(
            middle, place, xerr=[[middle - row["low"]], [row["high"] - middle]], fmt="o", color="tab:blue", capsize=2
        )
        if row.get("goal"):
            panel.plot(float(row["goal"]), place, marker="|", markersize=12, color="tab:red")
    panel.set_yticks(
        range(len(rows)), [_with_way(f"{r['method']} / {r['over']}, {r['shape']}", r) for r in rows], fontsize=7
    )
    panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.3)
    panel.set_xlabel(f"ratio of times within a round: median, quartiles, goal (red)\n{_device(rows[0])}", fontsize=8)
    return figure
