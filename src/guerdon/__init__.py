"""Guerdon: define, learn, shape, assign, optimise and audit reward.

``import guerdon as gd`` is light: sub-packages load on first use, and neither torch nor
transformers is imported before something needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guerdon import (  # noqa: F401
        cli,
        credit,
        environments,
        errors,
        evaluation,
        integrations,
        objectives,
        papers,
        policies,
        report,
        reward_models,
        rewards,
        rollout,
        routing,
        sandbox,
        search,
        serve,
        shaping,
        training,
        types,
    )

__version__ = "0.1.0"

_PACKAGES = (
    "cli",
    "credit",
    "environments",
    "errors",
    "evaluation",
    "integrations",
    "objectives",
    "papers",
    "policies",
    "registry",
    "report",
    "reward_models",
    "rewards",
    "rollout",
    "routing",
    "sandbox",
    "search",
    "serve",
    "shaping",
    "training",
    "types",
)
_NOUNS = ("Group", "Score", "Segmenter", "Span", "StopReason", "Task", "Trajectory", "Turn", "Usage")

__all__ = ["__version__", "reward", *_NOUNS, *_PACKAGES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"guerdon.{name}")
    if name in _NOUNS:
        return getattr(importlib.import_module("guerdon.types"), name)
    if name == "reward":
        return importlib.import_module("guerdon.rewards.function").reward
    raise AttributeError(f"module 'guerdon' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
