"""Rewards of an answer beside its reference: on trajectories, and on plain lists of texts and references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from guerdon.errors import ConfigError
from guerdon.rewards.base import OnError, Reward
from guerdon.rewards.grammar import last_block
from guerdon.types import Score, StopReason, Task, Trajectory, Turn, policy_text

__all__ = ["AnswerReward"]


class AnswerReward(Reward):
    """A subclass overrides :meth:`score_answer`.

    On trajectories the answer is the policy's last ``<answer>`` block, and a response without one gets 0; with
    ``tag=None`` it is all that the policy wrote. ``reward(texts, references)`` gives ``[B]`` float64; there a text without a
    block is the answer itself.

    Args:
        tag: of the block.
    """

    range = (0.0, 1.0)
    gives = frozenset({"outcome"})

    def __init__(self, *, tag: str | None = "answer", name: str | None = None, on_error: OnError = "raise") -> None:
        super().__init__(name=name, on_error=on_error)
        self.tag = tag

    def score_answer(self, answer: str, reference: Any, meta: Mapping[str, Any]) -> Score | float:
        """Score one answer."""
        raise TypeError(f"{type(self).__name__} must override score_answer")

    def score_one(self, trajectory: Trajectory) -> Any:
        text = policy_text(trajectory)
        answer = text if self.tag is None else last_block(text, self.tag)
        if answer is None and trajectory.info.get("bare"):
            answer = text
        return 0.0 if answer is None else self.score_answer(answer, trajectory.task.reference, trajectory.task.meta)

    def __call__(
        self,
        trajectories: Any,
        references: Any = None,
        metas: Sequence[Mapping[str, Any]] | None = None,
        *,
        progress: Any = None,
    ) -> Any:
        """Score trajectories, or texts with their references (and ``metas``, what a task would carry)."""
        if references is None:
            return super().__call__(trajectories, progress=progress)
        if isinstance(trajectories, str) or isinstance(references, str):
            raise ConfigError(f"{self.name} scores lists of texts and references; write [text], [reference]")
        if len(trajectories) != len(references):
            raise ConfigError(f"{len(trajectories)} texts for {len(references)} references")
        made = [
            Trajectory(
                Task(f"text-{k}", "", r, dict(metas[k]) if metas is not None else {}),
                (Turn("policy", t),),
                StopReason.DONE,
                info={"bare": True},
            )
            for k, (t, r) in enumerate(zip(trajectories, references, strict=True))
        ]
        return np.array([s.value for s in super().__call__(made)], dtype=np.float64)
