"""Guerdon's rewards in other projects' own conventions."""

from __future__ import annotations

import importlib
from typing import Any

_HOME: dict[str, str] = {
    "openrlhf": "trainers",
    "trl": "trainers",
    "verifiers": "rubrics",
    "verifiers_rubric": "rubrics",
    "verifiers_task_reward": "rubrics",
    "verl": "trainers",
    "verl_remote": "remote",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.integrations.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.integrations' has no attribute {name!r}")
