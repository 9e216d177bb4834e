"""Was the action executed? Read from what the environment answered to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from guerdon.errors import ConfigError
from guerdon.rewards.base import OnError, Reward
from guerdon.types import Score, Segmenter, Trajectory, Turn

__all__ = ["Grounding", "Rejected", "grounding_signal", "policy_turns"]

Rejected = str | Sequence[str] | Callable[[Turn], bool]
"""Phrases by which an environment says that it rejected an action, or a test of its turn."""


def policy_turns(trajectory: Trajectory) -> list[int]:
    """Indices of the turns in which the policy said something.

    Turns without tokens are no turns, unless no turn of the trajectory has recorded tokens: then those without text.
    """
    spoken = [k for k, turn in enumerate(trajectory.turns) if turn.speaker == "policy"]
    if any(len(turn) for turn in trajectory.turns):
        return [k for k in spoken if len(trajectory.turns[k])]
    return [k for k in spoken if trajectory.turns[k].text]


def grounding_signal(
    trajectory: Trajectory, rejected: Rejected = "Nothing happens", *, last: float | None = 1.0
) -> list[float]:
    """1.0 for each turn of the policy that the environment executed, 0.0 where it rejected it.

    A turn is judged by the observation that follows it, never by the one before, and by nothing the policy wrote.
    No observation before the policy's next turn: nothing was said against it, so it counts as executed.

    Args:
        trajectory: of an agent.
        rejected: an observation that contains this (or one of these) phrases rejects; or a function that says so of
            the environment's turn, for example by its ``meta``.
        last: signal of the last turn. The paper's code gives 1 whatever happened; None judges it like the others,
            where its observation was recorded.

    Raises:
        ConfigError: no phrase, or an empty one.

    Source: SPA-RL (arXiv 2505.20732), section on grounded rewards, and its code.
    """
    rejects = rejection_test(rejected)
    turns = policy_turns(trajectory)
    out = []
    for k, following in pairwise([*turns, len(trajectory.turns)]):
        answers = [t for t in trajectory.turns[k + 1 : following] if t.speaker == "environment"]
        out.append(0.0 if any(rejects(turn) for turn in answers) else 1.0)
    if out and last is not None:
        out[-1] = float(last)
    return out


def rejection_test(rejected: Rejected) -> Callable[[Turn], bool]:
    """A test of an environment's turn from phrases, or the given one.

    Raises:
        ConfigError: no phrase, or an empty one.
    """
    if callable(rejected):
        return rejected
    phrases = (rejected,) if isinstance(rejected, str) else tuple(rejected)
    if not phrases or not all(phrases):
        raise ConfigError(f"rejected needs at least one phrase, none of them empty, got {rejected!r}")
    return lambda turn: any(phrase in turn.text for phrase in phrases)


class Grounding(Reward):
    """Share of actions that the environment executed, with one value per turn.

    Args:
        rejected, last: see :func:`grounding_signal`; here the last action is judged like the others by default,
            since the share is also a measure.
        name, on_error: see :class:`~guerdon.rewards.Reward`.
    """

    range = (0.0, 1.0)
    gives = frozenset({"outcome", "steps"})

    def __init__(
        self,
        rejected: Rejected = "Nothing happens",
        *,
        last: float | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        self.rejected = rejection_test(rejected)
        self.last = last

    def score_one(self, trajectory: Trajectory) -> Score:
        """The share; invalid for a trajectory in which the policy said nothing."""
        signal = grounding_signal(trajectory, self.rejected, last=self.last)
        if not signal:
            return Score.invalid(f"task {trajectory.task.id!r}: the policy took no turn, so no action can be judged")
        spans = tuple(Segmenter("turns").spans(trajectory))
        share = sum(signal) / len(signal)
        return Score(share, tuple(signal), spans) if len(spans) == len(signal) else Score(share)
