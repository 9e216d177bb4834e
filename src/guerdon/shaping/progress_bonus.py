"""Outcome plus the progress that thinking made: a bonus for every trace that knows more at its end than it did before.

Source: Qu et al. 2025, "Optimizing Test-Time Compute via Meta Reinforcement Fine-Tuning" (arXiv 2503.07572).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from guerdon.errors import ConfigError, RewardError
from guerdon.types import Score, Trajectory

__all__ = ["ProgressShape", "ProgressShapedReward"]

Values = Callable[[Sequence[Trajectory]], Sequence["tuple[float, float] | None"]]


class ProgressShapedReward:
    """``r_final + alpha * (J_after - J_before)``: one scalar at the end of a trace.

    Args:
        alpha: weight of the bonus; 1 by default (the paper's text leaves its value open).

    Raises:
        ConfigError: alpha is not finite.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = _finite(alpha)

    def __call__(self, outcome: Any, j_before: Any, j_after: Any, alpha: float | None = None) -> Any:
        """The shaped reward of one trace (numbers) or of many (tensors of one shape); no gradient through the values.

        Args:
            outcome: final reward.
            j_before, j_after: success probability of an answer forced before and after the new episodes, in [0, 1],
                both estimated with the same number of samples.
            alpha: in place of the object's own.

        Raises:
            ValueError: a J value outside [0, 1] or NaN, or shapes that differ.
        """
        weight = self.alpha if alpha is None else _finite(alpha)
        if not any(isinstance(x, Tensor) for x in (outcome, j_before, j_after)):
            for name, j in (("j_before", j_before), ("j_after", j_after)):
                if not 0.0 <= j <= 1.0:
                    raise ValueError(f"{name} must lie in [0, 1], got {j}")
            return outcome + weight * (j_after - j_before)
        r, before, after = (torch.as_tensor(x) for x in (outcome, j_before, j_after))
        if not r.shape == before.shape == after.shape:
            raise ValueError(f"shapes differ: {tuple(r.shape)}, {tuple(before.shape)}, {tuple(after.shape)}")
        for name, j in (("j_before", before), ("j_after", after)):
            if not bool(((j >= 0) & (j <= 1)).all()):
                raise ValueError(f"{name} must lie in [0, 1], got {j.tolist()}")
        return r + weight * (after - before).detach()

    def shape(self, values: Values) -> ProgressShape:
        """The same as a shape of the online trainer; see :class:`ProgressShape`."""
        return ProgressShape(values, alpha=self.alpha)


class ProgressShape:
    """A shape (trajectories and scores to scores) that adds the progress bonus to the outcome.

    Args:
        values: gives, for each trajectory, ``(J_before, J_after)``, or None where there is no such thing.
        alpha: see :class:`ProgressShapedReward`.

    A trajectory without values keeps its score; NaN (an unknown value) makes it invalid. Parts of a score: ``outcome``,
    ``progress``, ``j_before``, ``j_after``.

    Raises (when called):
        RewardError: another number of values than of trajectories.
    """

    name = "progress_shape"

    def __init__(self, values: Values, alpha: float = 1.0) -> None:
        self.values = values
        self.reward = ProgressShapedReward(alpha)

    def __call__(self, trajectories: Sequence[Trajectory], scores: Sequence[Score]) -> list[Score]:
        """Shaped scores, in order; invalid ones stay as they are."""
        made = list(self.values(trajectories))
        if not len(made) == len(scores) == len(trajectories):
            raise RewardError(f"{len(made)} values and {len(scores)} scores for {len(trajectories)} trajectories")
        return [self._shaped(t, s, v) for t, s, v in zip(trajectories, scores, made, strict=True)]

    def _shaped(self, trajectory: Trajectory, score: Score, values: tuple[float, float] | None) -> Score:
        if values is None or not score.valid:
            return score
        before, after = values
        if math.isnan(before) or math.isnan(after):
            return Score.invalid(f"task {trajectory.task.id!r}: the value of its prefix is not known", **score.parts)
        value = self.reward(score.value, before, after)
        return score.with_value(value, outcome=score.value, progress=after - before, j_before=before, j_after=after)


def _finite(alpha: float) -> float:
    if not math.isfinite(alpha):
        raise ConfigError(f"alpha must be finite, got {alpha}")
    return float(alpha)
