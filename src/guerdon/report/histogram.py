"""A histogram of values as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from guerdon.errors import DataError, MissingDependency

__all__ = ["plot_histogram"]


def plot_histogram(
    values: Sequence[float], path: str | Path, *, xlabel: str = "value", title: str = "", bins: int = 40
) -> Path:
    """Draw and write a PNG.

    Raises:
        DataError: no values.
        MissingDependency: matplotlib is not installed.
    """
    if not values:
        raise DataError("there are no values to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("pictures need matplotlib: pip install 'guerdon[plots]'") from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.hist(values, bins=bins, color="#3b6ea5")
    axes.set_xlabel(xlabel)
    axes.set_ylabel("records")
    axes.set_title(title)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    return target
