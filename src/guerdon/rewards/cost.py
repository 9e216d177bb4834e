"""What a trajectory's calls cost."""

from __future__ import annotations

from guerdon.rewards.base import OnError, Reward
from guerdon.types import Trajectory

__all__ = ["CallCost"]


class CallCost(Reward):
    """Minus what was spent on calls, in USD; or minus another amount from ``info``.

    Args:
        key: entry of ``Trajectory.info`` that holds the cost (for example ``"raw_cost"``); by default
            ``usage.usd`` is read.
    """

    gives = frozenset({"outcome"})
    range = (float("-inf"), 0.0)

    def __init__(self, key: str | None = None, *, name: str | None = None, on_error: OnError = "raise") -> None:
        super().__init__(name=name, on_error=on_error)
        self.key = key

    def score_one(self, trajectory: Trajectory) -> float:
        return -float(trajectory.usage.usd if self.key is None else trajectory.info[self.key])
