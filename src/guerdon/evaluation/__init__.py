"""Can a score be trusted? Monitors, hack tests, benchmarks of rewards."""

from __future__ import annotations

import importlib
from typing import Any

_HOME: dict[str, str] = {
    "Alarm": "alarms",
    "Calibration": "alarms",
    "Detection": "alarms",
    "EpisodeReport": "regret",
    "FillerCurve": "filler",
    "HackCurve": "hack_curve",
    "HackProbe": "hack_test",
    "HackTest": "hack_test",
    "HackVerdict": "hack_curve",
    "MONITORS": "monitors",
    "Monitors": "hack_test",
    "RowKeeper": "hack_test",
    "SIGNALS": "signals",
    "SequenceKl": "monitors",
    "Signal": "signals",
    "Summary": "score_stream",
    "Triplet": "relevance",
    "alarm_callbacks": "alarms",
    "calibrate": "alarms",
    "episode_report": "regret",
    "evaluate_alarm": "alarms",
    "experience_kl": "monitors",
    "filler_check": "filler",
    "mean_regret": "regret",
    "pass_at_k": "passes",
    "read_curves": "hack_curve",
    "read_records": "score_stream",
    "relevance_benchmark": "relevance",
    "sari": "simplification",
    "sari_sentence": "simplification",
    "score_records": "score_stream",
    "success_at": "regret",
    "text_monitors": "monitors",
    "tokens_to_reach": "regret",
    "win_rate": "hack_test",
    "write_curves": "hack_curve",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.evaluation.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.evaluation' has no attribute {name!r}")
