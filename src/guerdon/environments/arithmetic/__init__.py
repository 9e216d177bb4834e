"""Arithmetic chains with gold step labels: small enough for tiny policies, hackable where a reward is.

A task asks for a chain of operations, evaluated from left to right ("12+7-5+3"). A solution works it out one line a
step ("12+7=19"), and ends with an answer line. What a solution is worth is known exactly: of every line whether it is
right, wrong or mere filler, where the first error is, and whether the answer is right.

* :func:`make_tasks`: tasks with disjoint splits; :class:`Spec` says how long the chains and how large the numbers are.
* :func:`write`: scripted solutions in a :class:`Style`; :data:`STYLES` names the usual ones.
* :func:`check`: the exact checker; :class:`ChainCorrect` and :class:`StepOracle` are gold rewards made of it.
* :class:`Solve`: the environment (one policy turn). :func:`words`: what a tiny tokenizer should hold as single tokens.

A policy that was warmed up on a mix of styles: :func:`guerdon.training.arithmetic.warm_start`.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Chain": "chains",
    "ChainCorrect": "oracle",
    "Habits": "habits",
    "LINES": "checker",
    "Line": "checker",
    "MARKERS": "chains",
    "Report": "checker",
    "STYLES": "scripted",
    "Script": "scripted",
    "Solve": "oracle",
    "Spec": "chains",
    "StepOracle": "oracle",
    "Style": "scripted",
    "check": "checker",
    "final_answer": "checker",
    "first_slip": "habits",
    "make_tasks": "chains",
    "scripts": "scripted",
    "step_labels": "oracle",
    "words": "chains",
    "write": "scripted",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.environments.arithmetic.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.environments.arithmetic' has no attribute {name!r}")
