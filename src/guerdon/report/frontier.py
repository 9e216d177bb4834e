"""The picture of a routing benchmark: quality against cost, with the frontier drawn in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from guerdon.errors import DataError, MissingDependency

__all__ = ["plot_frontier"]


def plot_frontier(
    points: Sequence[tuple[str, float, float]],
    path: str | Path,
    *,
    xlabel: str = "cost",
    ylabel: str = "quality",
    title: str = "",
    frontier: bool = True,
    log_cost: bool = False,
) -> Path:
    """Draw named points and, through those that no other point beats, the Pareto staircase.

    Args:
        points: ``(name, cost, quality)``; points that share a name are one line (a sweep); others are
            written beside their mark.
        path: where to write it; the suffix names the format.
        xlabel, ylabel, title: texts.
        frontier: draw the staircase.
        log_cost: a logarithmic cost axis; every cost must be positive.

    Returns:
        ``path``.

    Raises:
        DataError: no points, one that is not finite, or a cost that has no logarithm.
        MissingDependency: matplotlib is not installed.
    """
    if not points:
        raise DataError("there is nothing to plot: points is empty")
    for name, cost, quality in points:
        if not (math.isfinite(cost) and math.isfinite(quality)):
            raise DataError(f"point {name!r} has cost {cost} and quality {quality}; both must be finite")
        if log_cost and cost <= 0:
            raise DataError(f"point {name!r} has cost {cost:g}, which has no place on a logarithmic axis")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("figures need matplotlib: pip install 'guerdon[plots]'") from error

    series: dict[str, list[tuple[float, float]]] = {}
    for name, cost, quality in points:
        series.setdefault(name, []).append((cost, quality))
    figure = Figure(figsize=(8.0, 5.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines = 0
    for name, own in series.items():
        own.sort()
        xs, ys = zip(*own, strict=True)
        if len(own) > 1:
            axes.plot(xs, ys, "-", marker=".", markersize=4, linewidth=1.2, label=name, color=f"C{lines % 10}")
            lines += 1
        else:
            axes.plot(xs, ys, "k^", markersize=5)
            axes.annotate(name, (xs[0], ys[0]), xytext=(4, 3), textcoords="offset points", fontsize=6)
    if frontier:
        steps = _staircase([(c, q) for _, c, q in points])
        axes.step(
            *zip(*steps, strict=True), where="post", linestyle=":", linewidth=1, color="0.4", label="Pareto frontier"
        )
    if log_cost:
        axes.set_xscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(True, linewidth=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, loc="lower right")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without this the file would carry the library's version and differ from one machine to the next.
    figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else None)
    return path


def _staircase(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    best = -math.inf
    out = []
    for cost, quality in sorted(points, key=lambda p: (p[0], -p[1])):
        if quality > best:
            out.append((cost, quality))
            best = quality
    return out
