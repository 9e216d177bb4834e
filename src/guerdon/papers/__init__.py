"""One recipe a paper: metadata, the claim, and the run that tests it."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Claim": "evidence",
    "Result": "evidence",
    "bootstrap": "evidence",
    "environment": "evidence",
    "paired_claim": "evidence",
    "statistic_claim": "evidence",
    "Recipe": "recipe",
    "find": "recipe",
    "load": "recipe",
    "recorded": "recipe",
    "slugs": "recipe",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.papers.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.papers' has no attribute {name!r}")
