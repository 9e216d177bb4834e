"""Serving: an OpenAI-compatible endpoint in front of a router and its pool."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "FixedMember": "routes",
    "KeyStore": "keys",
    "MultiRound": "routes",
    "RewardSettings": "rewards_app",
    "RewardsApp": "rewards_app",
    "Served": "routes",
    "Settings": "settings",
    "SingleRound": "routes",
    "create_app": "app",
    "create_key": "keys",
    "load_served": "routes",
    "run": "server",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.serve.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.serve' has no attribute {name!r}")
