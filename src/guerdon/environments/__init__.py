"""What a policy acts in."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["worldfacts"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"guerdon.environments.{name}")
    raise AttributeError(f"module 'guerdon.environments' has no attribute {name!r}")
