"""What scores decide: which response is taken, which answer wins a vote, and where the first error is."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import ConfigError, DataError

__all__ = ["first_error", "fit_threshold", "pick_best", "process_f1", "weighted_vote"]


def pick_best(scores: Tensor, group: Tensor) -> Tensor:
    """Row of the highest score in each group, ``[G]`` in the order of the group ids; the first of equal ones.

    Args:
        scores: ``[B]`` finite.
        group: ``[B]`` integer ids, in any order.

    Raises:
        DataError: shapes differ, or a score is not finite.
    """
    if scores.ndim != 1 or scores.shape != group.shape:
        raise DataError(f"scores and group must be one [B] each, got {tuple(scores.shape)} and {tuple(group.shape)}")
    if not bool(torch.isfinite(scores).all()):
        raise DataError("a score is not finite; leave such responses out")
    best: dict[int, int] = {}
    for b, (g, s) in enumerate(zip(group.tolist(), scores.tolist(), strict=True)):
        if g not in best or s > float(scores[best[g]]):
            best[g] = b
    return torch.tensor([best[g] for g in sorted(best)], dtype=torch.int64)


def weighted_vote(scores: Sequence[float] | Tensor, answers: Sequence[Hashable | None]) -> Hashable | None:
    """The answer whose responses have the largest sum of ``sigmoid(score)``; the first seen of equal ones.

    Args:
        scores: of the responses to one prompt; here their scale matters.
        answers: extracted from each; ``None`` does not vote.

    Returns:
        ``None`` where nobody votes.

    Raises:
        DataError: numbers differ, or a voter's score is not finite.
    """
    values = torch.as_tensor(scores, dtype=torch.float64).tolist()
    if len(values) != len(answers):
        raise DataError(f"{len(values)} scores for {len(answers)} answers")
    total: dict[Hashable, float] = {}
    for value, answer in zip(values, answers, strict=True):
        if answer is None:
            continue
        if not math.isfinite(value):
            raise DataError(f"the score of a response with answer {answer!r} is {value}")
        total[answer] = total.get(answer, 0.0) + float(torch.sigmoid(torch.tensor(value, dtype=torch.float64)))
    return max(total, key=total.__getitem__) if total else None


def first_error(values: Tensor | Sequence[float], threshold: float) -> int:
    """Index of the first step whose value is below ``threshold``, or -1. Without steps -1."""
    row = torch.as_tensor(values)
    below = torch.nonzero(row < threshold)
    return int(below[0]) if len(below) else -1


def process_f1(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """Harmonic mean of two accuracies: on responses with an error (its exact step), and on those without (-1).

    0 where both are 0; NaN where one kind of response is missing.

    Source: Zheng et al. 2024 (ProcessBench, arXiv 2412.06559).
    """
    p, y = np.asarray(predicted), np.asarray(labels)
    if p.shape != y.shape or p.ndim != 1:
        raise DataError(f"{p.shape} predictions for {y.shape} labels; give one index each")
    if not (y >= 0).any() or not (y == -1).any():
        return math.nan
    wrong, right = float((p == y)[y >= 0].mean()), float((p == y)[y == -1].mean())
    return 2 * wrong * right / (wrong + right) if wrong + right else 0.0


def fit_threshold(
    values: Sequence[Tensor | Sequence[float]], labels: Sequence[int], grid: Sequence[float] | None = None
) -> tuple[float, float]:
    """The threshold of :func:`first_error` with the highest :func:`process_f1`, and that F1.

    Choose it on one set of responses and keep it for all others.

    Args:
        values: one ``[S]`` per response, for example ``sigmoid`` of an implicit model's cumulative values.
        labels: index of each response's first wrong step, -1 without one.
        grid: candidates; 0 to 1 in hundredths by default. The lowest of equally good ones is taken.

    Raises:
        DataError: numbers differ, or one kind of response is missing.
        ConfigError: an empty grid.
    """
    if len(values) != len(labels):
        raise DataError(f"values of {len(values)} responses for {len(labels)} labels")
    candidates = [float(x) for x in (np.linspace(0, 1, 101) if grid is None else grid)]
    if not candidates:
        raise ConfigError("grid must hold at least one threshold")
    scored = [(process_f1([first_error(v, t) for v in values], labels), t) for t in candidates]
    if math.isnan(scored[0][0]):
        raise DataError("a threshold needs responses with an error and responses without one")
    best = max(f1 for f1, _ in scored)
    return min(t for f1, t in scored if f1 == best), best
