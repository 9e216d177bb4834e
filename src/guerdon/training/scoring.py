"""Scores for a step's trajectories: reward, then shapes, with every failure counted, named and handled as chosen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from guerdon.errors import RewardError
from guerdon.rewards.base import FunctionReward, Progress, Reward, as_reward, takes_progress
from guerdon.training.shapes import Shape, name_of
from guerdon.types import Score, Trajectory

__all__ = ["Scorer"]


class Scorer:
    """Scores trajectories for a trainer.

    Args:
        reward: a :class:`~guerdon.rewards.Reward` or a callable on trajectories.
        shape: maps trajectories and scores to scores, or None.
        on_error: what an invalid score means, unless the reward itself says that it is dropped: ``"raise"``,
            ``"drop"``, or the value that stands for it.
        timeout: seconds for one call of a reward that is a plain callable.
    """

    def __init__(
        self, reward: Any, shape: Shape | None = None, *, on_error: Any = "raise", timeout: float | None = None
    ) -> None:
        self.reward: Reward = as_reward(reward, timeout=timeout)
        self.shape = shape
        self._on_error = on_error
        self._progress = shape is not None and takes_progress(shape)
        self._counts: Counter[tuple[str, str]] = self.reward.failure_counts()

    def __call__(
        self, trajectories: Sequence[Trajectory], progress: Progress, *, where: str
    ) -> tuple[list[Score], Counter[tuple[str, str]]]:
        """Score.

        Args:
            trajectories: in order; the same order is returned.
            progress: passed to rewards and shapes that take it.
            where: begins an error's text, for example ``"step 12"``.

        Returns:
            One score per trajectory, invalid where the trajectory is to be left out, and the failures of this call
            by ``(name, reason)``.

        Raises:
            RewardError: a score failed and ``on_error`` is ``"raise"``.
        """
        scores, fatal = self.reward.assess(trajectories, progress=progress)
        now = self.reward.failure_counts()
        failures = now - self._counts
        self._counts = now
        cause = self.reward.cause()
        if self.shape is not None:
            shaper = FunctionReward(self._shaping(scores, progress), name=name_of(self.shape))
            shaped, broken = shaper.assess(trajectories)
            # What had no value before has none now, whatever the shape made of it.
            valid = [s.valid for s in scores]
            scores = [new if ok else old for ok, old, new in zip(valid, scores, shaped, strict=True)]
            fatal = [new if ok else bad for ok, bad, new in zip(valid, fatal, broken, strict=True)]
            failures += Counter({(shaper.name, reason): n for reason, n in shaper.failures.items()})
            cause = cause or shaper.cause()
        invalid = [k for k, ends in enumerate(fatal) if ends and not scores[k].valid]
        if invalid and self._on_error == "raise":
            raise RewardError(
                f"{where}: {len(invalid)} of {len(scores)} trajectories have no valid score; the first: "
                f"{scores[invalid[0]].reason}. Mend the reward, or leave such trajectories out with on_reward_error='drop'"
            ) from cause
        if not isinstance(self._on_error, str):
            for k in invalid:
                parts = {key: v for key, v in scores[k].parts.items() if math.isfinite(v)}
                scores[k] = Score(float(self._on_error), parts={**parts, "failed": 1.0})
        return scores, failures

    def _shaping(self, scores: list[Score], progress: Progress) -> Callable[[Sequence[Trajectory]], Any]:
        assert self.shape is not None
        shape, more = self.shape, {"progress": progress} if self._progress else {}
        return lambda trajectories: shape(trajectories, scores, **more)
