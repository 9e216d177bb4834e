"""Benchmarks of single-round routers on recorded outcomes: readers, metrics with intervals, the run."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "BenchResult": "run",
    "ScoreMatrix": "matrix",
    "aiq": "metrics",
    "apgr": "metrics",
    "arena_score": "metrics",
    "cpt": "metrics",
    "gsm8k_recorded": "recorded",
    "optimality": "metrics",
    "pareto": "metrics",
    "pgr": "metrics",
    "read_matrix": "formats",
    "robustness": "metrics",
    "run_bench": "run",
    "run_bench_from_files": "run",
    "upper_hull": "metrics",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.routing.bench.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.routing.bench' has no attribute {name!r}")
