"""What a policy acts in."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guerdon.environments import (
        arithmetic,
        continued,
        gridworld_text,
        meta_bandit,
        mixed_tasks,
        simplification,
        sql_tasks,
        tool_tasks,
        worldfacts,
    )
    from guerdon.environments.base import Dataset
    from guerdon.environments.single import SingleTurn

__all__ = [
    "Dataset",
    "SingleTurn",
    "arithmetic",
    "continued",
    "gridworld_text",
    "meta_bandit",
    "mixed_tasks",
    "simplification",
    "sql_tasks",
    "tool_tasks",
    "worldfacts",
]


def __getattr__(name: str) -> Any:
    if name == "Dataset":
        return importlib.import_module("guerdon.environments.base").Dataset
    if name == "SingleTurn":
        return importlib.import_module("guerdon.environments.single").SingleTurn
    if name in __all__:
        return importlib.import_module(f"guerdon.environments.{name}")
    raise AttributeError(f"module 'guerdon.environments' has no attribute {name!r}")
