"""Pictures of an adapter and of its training. Needs matplotlib (the extra `train`)."""

import os
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_attention", "plot_gates", "plot_loss", "plot_scores", "plot_singular_values", "smoothed"]


def _figure(columns: int, size: tuple[float, float]) -> tuple["Figure", Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'ept[train]'") from error
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def plot_gates(after: Tensor, before: Tensor | None = None, path: str | os.PathLike | None = None) -> "Figure":
    """Draws heat maps of the gate's weights [s, K], prompt rows × spaces.

    Returns the figure, and writes it to `path` if given.
    """
    if after.dim() != 2 or after.shape[1] == 0:
        raise ValueError("this adapter has no spaces, so there is no gate to plot: use num_spaces >= 1")
    maps = {"after training": after} if before is None else {"before training": before, "after training": after}
    figure, axes = _figure(len(maps), (3.2 * len(maps), 4.2))
    highest = max(t.max().item() for t in maps.values())
    for axis, (title, weights) in zip(axes, maps.items(), strict=True):
        image = axis.imshow(weights.detach().float().cpu(), aspect="auto", cmap="viridis", vmin=0, vmax=highest)
        axis.set(title=title, xlabel="space", ylabel="prompt row", xticks=range(weights.shape[1]))
    figure.colorbar(image, ax=axes, label="gate weight")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def plot_loss(curves: dict[str, tuple[list[float], list[float]]], path: str | os.PathLike | None = None) -> "Figure":
    """Draws the training loss over steps, one curve (steps, losses) per method; figure and `path` as in `plot_gates`.

    The points are faint, the line over them is smoothed.
    """
    figure, (axis,) = _figure(1, (6, 4))
    for name, (steps, losses) in curves.items():
        (line,) = axis.plot(steps, smoothed(losses), label=name)
        axis.scatter(steps, losses, s=8, alpha=0.25, color=line.get_color(), linewidths=0)
    axis.set(xlabel="step", ylabel="training loss")
    axis.legend()
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def smoothed(values: list[float]) -> list[float]:
    """Returns the mean around each value, of a tenth of all, an odd number; fewer at the ends, as many on either side."""
    reach = len(values) // 20
    means = []
    for i in range(len(values)):
        here = min(reach, i, len(values) - 1 - i)
        means.append(sum(values[i - here : i + here + 1]) / (2 * here + 1))
    return means


def plot_singular_values(values: Tensor, path: str | os.PathLike | None = None) -> "Figure":
    """Draws bars of the singular values [r] of C, largest first; figure and `path` as in `plot_gates`."""
    figure, (axis,) = _figure(1, (6, 3))
    axis.bar(range(len(values)), values.tolist())
    axis.set(xlabel="number", ylabel="singular value of C, in units of e")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def plot_attention(attention: Tensor, path: str | os.PathLike | None = None) -> "Figure":
    """Draws a heat map of the fusion's attention [s, N], prompt rows × rows of C; figure and `path` as in `plot_gates`."""
    figure, (axis,) = _figure(1, (8, 4))
    image = axis.imshow(attention.float(), aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axis.set(xlabel="text position", ylabel="prompt row")
    figure.colorbar(image, ax=axis, label="attention")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def plot_scores(
    scores: dict[str, list[tuple[float, float]]], tasks: list[str], path: str | os.PathLike | None = None
) -> "Figure":
    """Draws each method's (mean, spread) on each task, one panel a task; figure and `path` as in `plot_gates`."""
    figure, axes = _figure(len(tasks), (1.5 + 2.6 * len(tasks), 1.2 + 0.28 * len(scores)))
    for number, (axis, task) in enumerate(zip(axes, tasks, strict=True)):
        means, spreads = zip(*(row[number] for row in scores.values()), strict=True)
        axis.errorbar(means, range(len(scores)), xerr=spreads, fmt="o", capsize=3)
        axis.set(title=task, yticks=range(len(scores)), yticklabels=list(scores) if number == 0 else [])
        axis.grid(axis="x", alpha=0.3)
        axis.invert_yaxis()
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
