"""From scores to scores: combiners, normalisers, annealing."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "RunningPercentileCost": "percentile",
    "affine": "combine",
    "clip": "combine",
    "condition": "combine",
    "gate": "combine",
    "hierarchical": "combine",
    "linear_anneal": "combine",
    "product": "combine",
    "quantile_rescale": "combine",
    "signed_geometric_mean": "combine",
    "weighted_sum": "combine",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.shaping.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.shaping' has no attribute {name!r}")
