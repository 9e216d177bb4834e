"""Rewards of text alone: on trajectories like every reward, and on plain strings without any wrapping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

from guerdon.errors import ConfigError
from guerdon.rewards.base import Progress, Reward
from guerdon.types import Score, StopReason, Task, Trajectory, Turn, policy_text

__all__ = ["RewardBatch", "TextReward", "plain_trajectories"]


@dataclass(frozen=True, slots=True)
class RewardBatch:
    """What a combined reward says about plain inputs.

    Args:
        total: ``[B]`` float64.
        parts: by name, ``[B]`` float64 each.
    """

    total: np.ndarray
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)


class TextReward(Reward):
    """A reward of what the policy wrote, and of nothing else. A subclass overrides :meth:`score_text`.

    ``reward(trajectories)`` gives scores; ``reward(["a response", ...])`` gives ``[B]`` float64, NaN where
    ``on_error="drop"`` found no honest value. An empty list gives an empty list.
    """

    def score_text(self, text: str) -> Score | float:
        """Score one response, its prompt not included."""
        raise TypeError(f"{type(self).__name__} must override score_text")

    def score_one(self, trajectory: Trajectory) -> Any:
        return self.score_text(policy_text(trajectory))

    @overload
    def __call__(self, trajectories: Sequence[str]) -> np.ndarray: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, trajectories: Sequence[Trajectory], *, progress: Progress | None = None) -> list[Score]: ...

    def __call__(self, trajectories: Sequence[Any], *, progress: Progress | None = None) -> Any:
        """Score trajectories or plain responses; failures are handled as :attr:`on_error` says."""
        if isinstance(trajectories, str):
            raise ConfigError(f"{self.name} scores a list of responses, got one string; write [text]")
        if not len(trajectories) or isinstance(trajectories[0], Trajectory):
            return super().__call__(trajectories, progress=progress)
        return np.array([s.value for s in super().__call__(plain_trajectories(trajectories))], dtype=np.float64)


def plain_trajectories(texts: Sequence[str]) -> list[Trajectory]:
    """Each text as what a policy wrote in one turn.

    Raises:
        ConfigError: one is not a string.
    """
    for k, text in enumerate(texts):
        if not isinstance(text, str):
            raise ConfigError(f"responses must be strings, number {k} is of type {type(text).__name__}")
    return [Trajectory(Task(f"text-{k}", ""), (Turn("policy", text),), StopReason.DONE) for k, text in enumerate(texts)]
