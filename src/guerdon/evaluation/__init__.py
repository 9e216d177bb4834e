"""Can a score be trusted? Monitors, hack tests, benchmarks of rewards."""

from __future__ import annotations

import importlib
from typing import Any

_HOME: dict[str, str] = {
    "FillerCurve": "filler",
    "SequenceKl": "monitors",
    "Summary": "score_stream",
    "experience_kl": "monitors",
    "filler_check": "filler",
    "pass_at_k": "passes",
    "read_records": "score_stream",
    "sari": "simplification",
    "sari_sentence": "simplification",
    "score_records": "score_stream",
    "text_monitors": "monitors",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.evaluation.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.evaluation' has no attribute {name!r}")
