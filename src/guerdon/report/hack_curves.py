"""The picture of a hack test: proxy and gold, against steps and against KL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guerdon.errors import DataError, MissingDependency

__all__ = ["plot_hack_curves"]


def plot_hack_curves(
    curves: Sequence[Mapping[str, Any]], path: str | Path, *, gold: str = "gold", title: str = ""
) -> Path:
    """Draw proxy (above) and gold (below) over steps (left) and over KL (right), a colour for each arm.

    Args:
        curves: as :meth:`guerdon.evaluation.HackCurve.to_dict` gives them; runs of one arm are thin lines, and their mean,
            where they were measured at the same steps, is a thick one.
        path: where to write it; the suffix names the format.
        gold: ``"gold"``, or a series of ``extra`` (for example ``"gold_win"``).
        title: of the figure.

    Returns:
        ``path``.

    Raises:
        DataError: no curves, an empty one, or one without the series.
        MissingDependency: matplotlib is not installed.
    """
    if not curves:
        raise DataError("there is nothing to plot: no curves")
    for curve in curves:
        if not curve["step"]:
            raise DataError(f"the curve of {curve['arm']!r} has no measurement")
        if gold != "gold" and gold not in curve.get("extra", {}):
            raise DataError(f"the curve of {curve['arm']!r} has no series {gold!r}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("figures need matplotlib: pip install 'guerdon[plots]'") from error

    figure = Figure(figsize=(10.0, 6.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharey="row")
    arms = list(dict.fromkeys(str(c["arm"]) for c in curves))
    for number, arm in enumerate(arms):
        own = [c for c in curves if c["arm"] == arm]
        for row, name in enumerate(("proxy", gold)):
            for column, across in enumerate(("step", "kl")):
                lines = [(_series(c, across), _series(c, name)) for c in own]
                for x, y in lines:
                    axes[row][column].plot(x, y, color=f"C{number % 10}", linewidth=0.5, alpha=0.5)
                if len({len(x) for x, _ in lines}) == 1:
                    mean = [[sum(v) / len(v) for v in zip(*part, strict=True)] for part in zip(*lines, strict=True)]
                    label = arm if (row, column) == (0, 0) else None
                    axes[row][column].plot(*mean, color=f"C{number % 10}", linewidth=1.8, label=label)
    for row, name in enumerate(("proxy reward", gold.replace("_", " "))):
        axes[row][0].set_ylabel(name)
        for column, across in enumerate(("steps", "KL to the initial policy (nats)")):
            axes[row][column].grid(True, linewidth=0.3)
            if row == 1:
                axes[row][column].set_xlabel(across)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without this the file would carry the library's version and differ from one machine to the next.
    figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else None)
    return path


def _series(curve: Mapping[str, Any], name: str) -> list[float]:
    values = curve[name] if name in ("step", "kl", "proxy", "gold") else curve["extra"][name]
    return [math.nan if v is None else float(v) for v in values]
