"""The chance that at least one of k samples is right, from n samples of which c are.

Source: Chen et al. 2021 (arXiv 2107.03374), the unbiased estimator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from guerdon.errors import ConfigError, DataError
from guerdon.rewards.base import OnError, Reward
from guerdon.types import Score, Trajectory

__all__ = ["PassAtK", "pass_at_k"]


def pass_at_k(n: Any, correct: Any, k: int) -> np.ndarray:
    """``1 - C(n - c, k) / C(n, k)``, as a product without large numbers.

    Args:
        n: samples of each task, any shape, at least k.
        correct: of these right, the same shape.
        k: samples that one may draw.

    Returns:
        float64 of that shape, in [0, 1].

    Raises:
        ConfigError: k below 1.
        DataError: fewer than k samples, or a number of right ones outside [0, n].
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ConfigError(f"k must be an integer of at least 1, got {k!r}")
    total, right = np.broadcast_arrays(np.asarray(n), np.asarray(correct))
    if not (np.issubdtype(total.dtype, np.integer) and np.issubdtype(right.dtype, np.integer)):
        raise DataError("numbers of samples are integers")
    if (total < k).any():
        raise DataError(f"pass@{k} needs at least {k} samples of each task, got {int(total.min())}")
    if ((right < 0) | (right > total)).any():
        raise DataError("the number of right samples must be between 0 and the number of samples")
    wrong = (total - right).astype(np.float64)
    missed = np.ones(total.shape)
    for j in range(k):
        missed *= np.maximum(wrong - j, 0.0) / (total - j)
    return np.asarray(1.0 - missed)


class PassAtK(Reward):
    """For every sample of a task the estimated pass@k of that task, so that the mean over a batch is the batch's pass@k.

    A measure: within a group all samples get the same value, so group-relative credit learns nothing from it. Samples of a
    task must come in one batch.

    Args:
        reward: decides what is right: a value of at least ``threshold``.
        k: see :func:`pass_at_k`.
        threshold: 1 by default: all tests passed.

    Parts: ``passed``, ``samples``, ``correct``, and those of the reward. An invalid score of the reward makes its task's scores
    invalid; fewer than k samples of a task are an error.
    """

    range = (0.0, 1.0)
    gives = frozenset({"outcome"})

    def __init__(
        self,
        reward: Reward,
        k: int = 1,
        *,
        threshold: float = 1.0,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name or f"pass_at_{k}", on_error=on_error)
        if not isinstance(reward, Reward):
            raise ConfigError(f"reward must be a reward, got {type(reward).__name__}")
        pass_at_k(k if isinstance(k, int) else 1, 0, k)
        self.reward, self.k, self.threshold = reward, k, float(threshold)

    def score(self, trajectories: Sequence[Trajectory], progress: Any = None) -> list[Score]:
        """Score a batch; tasks are told apart by their ids."""
        scores = self.reward.assess(trajectories, progress=progress)[0]
        places: dict[str, list[int]] = {}
        for place, trajectory in enumerate(trajectories):
            places.setdefault(trajectory.task.id, []).append(place)
        out: list[Score] = list(scores)
        for task, mine in places.items():
            bad = next((scores[p] for p in mine if not scores[p].valid), None)
            passed = [float(scores[p].value >= self.threshold) for p in mine]
            if bad is None and len(mine) < self.k:
                raise DataError(
                    f"pass@{self.k} needs at least {self.k} samples of each task, task {task!r} has {len(mine)}"
                )
            estimate = 0.0 if bad is not None else float(pass_at_k(len(mine), int(sum(passed)), self.k))
            for p, right in zip(mine, passed, strict=True):
                if bad is not None:
                    out[p] = Score.invalid(f"a sample of task {task!r} has no score: {bad.reason}")
                    continue
                parts = {"passed": right, "samples": float(len(mine)), "correct": sum(passed)}
                out[p] = Score(estimate, parts={**_named(scores[p].parts), **parts})
        return out


def _named(parts: Mapping[str, float]) -> dict[str, float]:
    return {f"reward/{key}": value for key, value in parts.items()}
