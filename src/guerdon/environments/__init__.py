"""What a policy acts in."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guerdon.environments import worldfacts
    from guerdon.environments.base import Dataset

__all__ = ["Dataset", "worldfacts"]


def __getattr__(name: str) -> Any:
    if name == "Dataset":
        return importlib.import_module("guerdon.environments.base").Dataset
    if name in __all__:
        return importlib.import_module(f"guerdon.environments.{name}")
    raise AttributeError(f"module 'guerdon.environments' has no attribute {name!r}")
