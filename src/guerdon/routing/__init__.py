"""Routing over a priced pool of models: the pool, Router-R1, baselines, benchmarks."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Budget": "budget",
    "HierarchicalReward": "reward",
    "Member": "member",
    "Outcome": "member",
    "Pool": "pool",
    "Reply": "member",
    "RouterR1": "router_r1",
    "RoutingEnv": "env",
    "evaluate_router": "router_r1",
    "neutralise": "protocol",
    "parse_action": "protocol",
    "router_prompt": "prompt",
    "router_r1_train": "router_r1",
    "router_reward": "reward",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.routing.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.routing' has no attribute {name!r}")
