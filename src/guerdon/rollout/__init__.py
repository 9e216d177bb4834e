"""Sampling engines behind one protocol, and the multi-turn loop."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Completion": "protocol",
    "Engine": "protocol",
    "Environment": "protocol",
    "Episode": "protocol",
    "Observation": "protocol",
    "OpenAIEngine": "openai_engine",
    "Sampling": "protocol",
    "Stream": "protocol",
    "TransformersEngine": "transformers_engine",
    "VllmEngine": "vllm_engine",
    "derive_seed": "loop",
    "rollout": "loop",
    "rollout_sync": "loop",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.rollout.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.rollout' has no attribute {name!r}")
