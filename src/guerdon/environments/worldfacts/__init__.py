"""Questions over real facts, a pool of simulated specialists, and scripted rollouts for a warm start."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "BASIC_RELATIONS": "facts",
    "CORE_DOMAINS": "questions",
    "DOMAINS": "facts",
    "Drill": "drills",
    "Entry": "pools",
    "FRAMES": "questions",
    "Fact": "facts",
    "Hop": "questions",
    "NAMES": "pools",
    "PoolSampler": "pools",
    "RELATIONS": "facts",
    "Segment": "scripts",
    "Skill": "specialists",
    "Specialist": "specialists",
    "World": "facts",
    "chain_accuracy": "pools",
    "descriptor": "pools",
    "held_out_names": "pools",
    "held_out_pairs": "pools",
    "informative": "specialists",
    "is_generalist": "pools",
    "load_world": "facts",
    "lookup_drill": "drills",
    "make_tasks": "questions",
    "parse": "questions",
    "phrase": "questions",
    "practice_task": "scripts",
    "read_answer": "specialists",
    "read_descriptor": "pools",
    "scripted_rollout": "scripts",
    "split_entities": "questions",
    "sub_question": "questions",
    "text_corpus": "corpus",
    "vocabulary": "words",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.environments.worldfacts.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.environments.worldfacts' has no attribute {name!r}")
