"""Single-round routers that learn from recorded outcomes, with scikit-learn's manners."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Blend": "blend",
    "Cheapest": "rules",
    "Constant": "rules",
    "Dearest": "rules",
    "Elo": "elo",
    "KernelRidge": "linear",
    "Knn": "neighbours",
    "KnnRegression": "neighbours",
    "Largest": "rules",
    "Mlp": "mlp",
    "Oracle": "rules",
    "ROUTERS": "base",
    "RandomRouter": "rules",
    "Ridge": "linear",
    "Router": "base",
    "TfidfRidge": "linear",
    "load_router": "base",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.routing.routers.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.routing.routers' has no attribute {name!r}")
