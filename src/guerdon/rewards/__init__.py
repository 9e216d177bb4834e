"""Rule rewards: a trajectory in, a Score out, no weights of their own."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Block": "grammar",
    "CallCost": "cost",
    "ExactMatch": "answer",
    "Reward": "base",
    "RouterFormat": "format",
    "TagFormat": "format",
    "TokenF1": "answer",
    "Weighted": "base",
    "blocks": "grammar",
    "boxed": "grammar",
    "fenced": "grammar",
    "json_lines": "grammar",
    "last_block": "grammar",
    "normalise_answer": "answer",
    "reward_values": "base",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.rewards.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.rewards' has no attribute {name!r}")
