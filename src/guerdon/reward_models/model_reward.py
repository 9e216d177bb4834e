"""A fitted reward model as a reward on trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from guerdon.errors import DataError
from guerdon.rewards import Reward
from guerdon.types import Score, Trajectory

__all__ = ["ModelReward"]


class ModelReward(Reward):
    """The scores of a fitted reward model as a reward on trajectories.

    Args:
        model: anything with ``score(items) -> [B]``.

    A trajectory that the model cannot read (an empty response, ids of another tokenizer) fails alone, by name, and is
    handled as ``on_error`` says.
    """

    def __init__(self, model: Any, *, name: str = "reward_model", on_error: Any = "raise") -> None:
        super().__init__(name=name, on_error=on_error)
        self.model = model

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """One score per trajectory."""
        if not trajectories:
            return []
        try:
            return [Score(float(v)) for v in self.model.score(list(trajectories))]
        except DataError:
            if len(trajectories) == 1:
                raise
        out: list[Score] = []
        for trajectory in trajectories:
            try:
                out.append(Score(float(self.model.score([trajectory])[0])))
            except DataError as error:
                out.append(Score.invalid(f"reward {self.name!r} cannot read a response: {error}"))
        return out
