"""Turning results into text tables and figures."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "markdown_table": "table",
    "plain_table": "table",
    "plot_frontier": "frontier",
    "plot_hack_curves": "hack_curves",
    "plot_histogram": "histogram",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.report.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.report' has no attribute {name!r}")
