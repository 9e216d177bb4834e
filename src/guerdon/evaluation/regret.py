"""How soon does thinking pay? Success against tokens, averaged over traces and problems, and what it misses of 1.

A trace is a list of token counts and one of success probabilities: what an answer forced after each episode costs in
all, and how often it is right. Problems hold one or more traces each; means are over traces first, then over problems.

Source: Qu et al. 2025, "Optimizing Test-Time Compute via Meta Reinforcement Fine-Tuning" (arXiv 2503.07572).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from guerdon.credit.regret import normalized_regret, progress_bonus
from guerdon.errors import DataError

__all__ = ["EpisodeReport", "Trace", "episode_report", "mean_regret", "success_at", "tokens_to_reach"]

Trace = tuple[Sequence[float], Sequence[float]]


def mean_regret(problems: Sequence[Sequence[Trace]], budget: float) -> float:
    """Mean normalised regret at a budget, over traces and then over problems; see ``normalized_regret``.

    Raises:
        DataError: no problem, or one without a trace.
    """
    return _mean(problems, lambda trace: normalized_regret(*trace, budget))


def success_at(problems: Sequence[Sequence[Trace]], tokens: float) -> float:
    """Mean success of an answer that may cost ``tokens``: interpolated within a trace, held behind its end.

    Raises:
        DataError: no problem, or one without a trace.
    """
    return _mean(problems, lambda trace: float(np.interp(tokens, (0.0, *trace[0]), (0.0, *trace[1]))))


def tokens_to_reach(problems: Sequence[Sequence[Trace]], success: float, limit: float, points: int = 512) -> float:
    """Fewest tokens at which the mean success is ``success``, to a grid of ``points`` up to ``limit``; inf if never."""
    for tokens in np.linspace(0.0, limit, points):
        if success_at(problems, float(tokens)) >= success:
            return float(tokens)
    return math.inf


@dataclass(frozen=True, slots=True)
class EpisodeReport:
    """What the episodes of several traces were worth.

    Attributes:
        episodes: mean number of a trace.
        progress: mean progress by the episode's number, from the first on.
        counts: how many traces had an episode of that number.
        idle: share of all episodes with no progress or a negative one (within 1e-9).
        tokens: mean tokens of a trace, where they are given; else NaN.
    """

    episodes: float
    progress: tuple[float, ...]
    counts: tuple[int, ...]
    idle: float
    tokens: float


def episode_report(j_values: Sequence[Sequence[float]], tokens: Sequence[float] | None = None) -> EpisodeReport:
    """Progress per episode number, the share that made none, numbers and tokens: the diagnosis to make before training.

    Args:
        j_values: per trace ``[k_i + 1]``, ``J_0`` first.
        tokens: of each trace in all.

    Raises:
        DataError: no trace, or another number of token counts.
    """
    if not j_values or (tokens is not None and len(tokens) != len(j_values)):
        raise DataError(f"{len(j_values)} traces and {'no' if tokens is None else len(tokens)} token counts were given")
    rows = [progress_bonus(j).tolist() for j in j_values]
    longest = max(map(len, rows))
    by_number = [[row[n] for row in rows if n < len(row)] for n in range(longest)]
    every = [p for row in rows for p in row]
    return EpisodeReport(
        episodes=sum(map(len, rows)) / len(rows),
        progress=tuple(sum(values) / len(values) for values in by_number),
        counts=tuple(map(len, by_number)),
        idle=sum(p <= 1e-9 for p in every) / len(every) if every else math.nan,
        tokens=math.nan if tokens is None else sum(tokens) / len(tokens),
    )


def _mean(problems: Sequence[Sequence[Trace]], value: Callable[[Trace], float]) -> float:
    if not problems or not all(problems):
        raise DataError("a mean needs at least one problem, and at least one trace of each")
    return float(np.mean([np.mean([value(trace) for trace in traces]) for traces in problems]))
