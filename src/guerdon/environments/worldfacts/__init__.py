"""Questions over real facts, a pool of simulated specialists, and scripted rollouts for a warm start."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "CORE_DOMAINS": "questions",
    "DOMAINS": "facts",
    "Entry": "pools",
    "Fact": "facts",
    "PoolSampler": "pools",
    "RELATIONS": "facts",
    "Segment": "scripts",
    "Skill": "specialists",
    "Specialist": "specialists",
    "World": "facts",
    "descriptor": "pools",
    "held_out_names": "pools",
    "held_out_pairs": "pools",
    "is_generalist": "pools",
    "load_world": "facts",
    "make_tasks": "questions",
    "parse": "questions",
    "practice_task": "scripts",
    "read_answer": "specialists",
    "scripted_rollout": "scripts",
    "split_entities": "questions",
    "sub_question": "questions",
    "vocabulary": "words",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.environments.worldfacts.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.environments.worldfacts' has no attribute {name!r}")
