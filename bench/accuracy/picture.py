"""Draws scores over trained parameters: one point a method, with its interval and a label that hides nothing."""

import os
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, NullFormatter
from matplotlib.transforms import Bbox

__all__ = ["COLOURS", "Point", "draw_scores"]


COLOURS = {"EPT": "C3", "LoRA": "C0", "prompt tuning": "C2"}  # other families are grey
GREY = "0.45"
MOST = 1_000_000  # trained parameters of what is drawn as a point
TICKS = (500, 1_000, 2_000, 5_000, 10_000, 20_000, 40_000, 100_000, 200_000, 500_000)
# Offsets in points from a point to its label, and the corner of the label that stands there; the first that fits is taken.
PLACES = [
    (x, y, side, height)
    for far in (1, 2, 3, 4)
    for x, y, side, height in (
        (7 * far, 0, "left", "center"), (-7 * far, 0, "right", "center"),
        (5, 6 * far, "left", "bottom"), (5, -6 * far, "left", "top"),
        (-5, 6 * far, "right", "bottom"), (-5, -6 * far, "right", "top"),
        (0, 9 * far, "center", "bottom"), (0, -9 * far, "center", "top"),
    )
]  # fmt: skip


class Point(NamedTuple):
    """A method: its label, its family, its trained parameters, its score, and the score's interval (or None)."""

    label: str
    family: str
    trained: int
    score: float
    interval: tuple[float, float] | None = None


def _taken(axis: Axes) -> list[Bbox]:
    """Boxes, in pixels, that cover all lines and markers of a panel: each line is cut into steps of 4 pixels."""
    boxes = []
    curves = [np.column_stack(line.get_data()) for line in axis.get_lines() if line.get_linestyle() != "None"]
    markers = [np.column_stack(line.get_data()) for line in axis.get_lines() if line.get_marker() != "None"]
    for bars in axis.collections:
        curves += [np.asarray(path.vertices) for path in bars.get_paths()]
    for curve in curves:
        corners = axis.transData.transform(curve)
        for start, end in pairwise(corners):
            steps = np.linspace(start, end, 2 + int(np.hypot(*(end - start)) // 4))
            boxes += [Bbox.from_extents(x - 2, y - 2, x + 2, y + 2) for x, y in steps]
    for x, y in axis.transData.transform(np.concatenate(markers)):
        boxes.append(Bbox.from_extents(x - 7, y - 7, x + 7, y + 7))
    return boxes


def _label(axis: Axes, point: Point, taken: list[Bbox]) -> Annotation:
    """Writes the label of a point where it lies inside the frame and on none of the boxes taken, and adds its own box.

    Raises:
        ValueError: no place is free.
    """
    frame = axis.get_window_extent()
    colour = COLOURS.get(point.family, GREY)
    for x, y, side, height in PLACES:
        text = axis.annotate(
            point.label, (point.trained, point.score), xytext=(x, y), textcoords="offset points",
            ha=side, va=height, fontsize=8, color=colour,
        )  # fmt: skip
        box = text.get_window_extent()
        inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
        if inside and not any(box.overlaps(other) for other in taken):
            taken.append(box)
            return text
        text.remove()
    raise ValueError(f"no room for the label {point.label!r}: make the picture larger, or draw fewer methods")


def draw_scores(
    panels: dict[str, list[Point]], level: str, score: str, path: str | os.PathLike | None = None
) -> Figure:
    """Draws one panel for each title, and a dashed line at the score of the method that is called `level`.

    Methods of one family are joined in the order of their parameters. A method with more than a million of them is a
    dotted line at its score. Returns the figure, and writes it to `path` if given.

    Raises:
        ValueError: a label has no place.
    """
    figure = Figure(figsize=(5.6 * len(panels), 4.6), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        near = [point for point in points if point.trained <= MOST]
        for family in dict.fromkeys(point.family for point in near):
            members = sorted((point for point in near if point.family == family), key=lambda point: point.trained)
            colour = COLOURS.get(family, GREY)
            axis.plot([p.trained for p in members], [p.score for p in members], color=colour, alpha=0.3, zorder=1)
        for point in near:
            colour = COLOURS.get(point.family, GREY)
            if point.interval is not None:
                axis.vlines(point.trained, *point.interval, color=colour, linewidth=1.2, zorder=2)
            size = 8 if point.label == level else 5
            axis.plot([point.trained], [point.score], "o", linestyle="None", color=colour, markersize=size, zorder=3)
        sizes = [point.trained for point in near]
        axis.set(xscale="log", xlabel="trained parameters", title=title, xlim=(min(sizes) / 1.6, max(sizes) * 4))
        width = np.array(axis.get_xlim())
        for point in points:
            if point.label == level:
                axis.plot(
                    width,
                    [point.score] * 2,
                    "--",
                    color=COLOURS.get(point.family, GREY),
                    alpha=0.6,
                    linewidth=0.8,
                    zorder=0,
                )
            elif point not in near:
                axis.plot(width, [point.score] * 2, ":", color=GREY, linewidth=1, zorder=0)
        axis.set_xticks([size for size in TICKS if width[0] < size < width[1]])
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(y=0.1)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(score)
    canvas.draw()
    for axis, points in zip(axes, panels.values(), strict=True):
        taken = _taken(axis)
        for point in points:
            if point.trained > MOST:
                label = f"{point.label}, {point.trained / 1e6:.0f} million"
                point = point._replace(label=label, trained=int(axis.get_xlim()[0]) + 1)
            _label(axis, point, taken)
    if path is not None:
        figure.savefig(path)
    return figure
