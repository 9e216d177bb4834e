"""Does a process reward pay for steps that are right and useless? Asked without any training.

Source: the cheap check behind Gao et al. 2024 (arXiv 2410.15115): a greedy policy that can only insert filler steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from guerdon.errors import ConfigError, DataError
from guerdon.shaping.steps import split_steps

__all__ = ["FillerCurve", "filler_check"]


@dataclass(frozen=True, slots=True)
class FillerCurve:
    """Return of a solution by the number of filler steps in it.

    Args:
        returns: ``[times + 1]`` float64, without filler first.
        slope: least-squares gain per filler over the later half of the curve, where what pays once has been paid.
        solution: the solution with most fillers.
    """

    returns: np.ndarray
    slope: float
    solution: str

    @property
    def gain(self) -> float:
        """What all fillers together added."""
        return float(self.returns[-1] - self.returns[0])

    def hackable(self, tolerance: float = 1e-6) -> bool:
        """Whether each further filler pays."""
        return self.slope > tolerance


def filler_check(
    reward: Callable[[Sequence[str], Sequence[str], Sequence[float]], Any],
    question: str,
    solution: str,
    filler: str,
    *,
    times: int = 8,
    correct: float = 1.0,
    where: Literal["end", "best"] = "end",
    splitter: str = "\n",
) -> FillerCurve:
    """Insert a filler step again and again, and watch the return.

    Args:
        reward: ``(questions, solutions, correct)`` to an object with ``values`` ``[B, K]``, for example a
            :class:`~guerdon.reward_models.ProcessReward` over a function.
        question, solution: to be padded; the last step (the answer) stays last, so correctness stays what it is.
        filler: one step, without its separator.
        times: fillers inserted, at least 2.
        correct: whether the solution is right.
        where: ``"end"`` inserts before the last step, ``"best"`` greedily wherever the return grows most (before any
            step).
        splitter: separator of steps.

    Returns:
        The curve. A sum of step scores grows by ``alpha`` times the filler's score each time; under Delta and under
        Clip with Delta a filler before the answer changes nothing, and a better first step pays at most once.

    Raises:
        DataError: a solution without steps. ConfigError: fewer than 2 times, or another ``where``.
    """
    if times < 2:
        raise ConfigError(f"times must be at least 2, got {times}")
    if where not in ("end", "best"):
        raise ConfigError(f"where must be 'end' or 'best', got {where!r}")
    steps = [solution[a:b] for a, b in split_steps(solution, splitter)]
    if not steps:
        raise DataError("the solution has no steps to put a filler between")
    line = filler.removesuffix(splitter) + splitter

    def total(candidates: list[list[str]]) -> np.ndarray:
        texts = ["".join(c) for c in candidates]
        made = reward([question] * len(texts), texts, [correct] * len(texts))
        return np.asarray(made.values, dtype=np.float64).sum(1)

    curve = [float(total([steps])[0])]
    for _ in range(times):
        places = [len(steps) - 1] if where == "end" else range(len(steps))
        candidates = [[*steps[:k], line, *steps[k:]] for k in places]
        found = total(candidates)
        best = int(found.argmax())
        steps = candidates[best]
        curve.append(float(found[best]))
    returns = np.array(curve)
    half = returns[len(returns) // 2 :]
    slope = float(np.polyfit(np.arange(len(half)), half, 1)[0])
    return FillerCurve(returns, slope, "".join(steps))
