"""From scores to advantages: pure functions on torch tensors."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "GroupStatistics": "groups",
    "broadcast_outcome": "temporal",
    "gae": "temporal",
    "group_relative": "groups",
    "group_statistics": "groups",
    "leave_one_out": "groups",
    "place_outcome": "temporal",
    "returns": "temporal",
    "whiten": "temporal",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.credit.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.credit' has no attribute {name!r}")
