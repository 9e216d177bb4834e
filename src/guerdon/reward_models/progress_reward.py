"""Step rewards for agents: what each turn contributed to the return, and whether its action was executed.

:class:`TurnReward` pays any contributions; :class:`ProgressReward` takes them from a fitted
:class:`~guerdon.reward_models.ProgressEstimator`. Both report the outcome as the score's value and the rewards of
turns as its steps: a credit rule for steps (:class:`guerdon.training.rules.progress.ProgressCredit`) reads the steps alone,
so the outcome is never paid a second time.

Source: Wang et al. 2025, "SPA-RL: Reinforcing LLM Agents via Stepwise Progress Attribution" (arXiv 2505.20732).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from guerdon.credit.redistribution import exact_redistribution, fuse
from guerdon.errors import ConfigError, DataError
from guerdon.reward_models.progress_estimator import FitSettings, ProgressEstimator
from guerdon.rewards.base import OnError, Reward
from guerdon.rewards.grounding import Rejected, grounding_signal, policy_turns, rejection_test
from guerdon.types import Score, Segmenter, StopReason, Task, Trajectory, Turn

__all__ = ["ProgressReward", "TurnReward", "TurnRow"]

Outcome = Callable[[Sequence[Trajectory]], Sequence[Score]]
Contributions = Callable[[Trajectory, float], Sequence[float]]


@dataclass(frozen=True, slots=True)
class TurnRow:
    """One turn in a table for inspection: its contribution, grounding, fused reward and text."""

    turn: int
    contribution: float
    grounding: float
    reward: float
    text: str


class TurnReward(Reward):
    """Outcome as the value; ``alpha * c_t + beta * g_t`` as the reward of each turn.

    Args:
        outcome: the final reward, trajectories to scores.
        contributions: maps a trajectory and its outcome to one number per turn of the policy.
        alpha, beta: weights of contribution and grounding. The paper has 1 and 0.5.
        rejected, last: see :func:`~guerdon.rewards.grounding_signal`.
        name, on_error: see :class:`~guerdon.rewards.Reward`.

    Parts of a score: the outcome's own, ``contribution`` (their sum), ``grounding`` (the share of executed actions, the
    last one judged like the others).

    Raises:
        ConfigError: a weight is not finite, or no phrase to tell rejections by.
    """

    gives = frozenset({"outcome", "steps"})

    def __init__(
        self,
        outcome: Outcome,
        contributions: Contributions,
        *,
        alpha: float = 1.0,
        beta: float = 0.5,
        rejected: Rejected = "Nothing happens",
        last: float | None = 1.0,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        for key, value in (("alpha", alpha), ("beta", beta)):
            if not math.isfinite(value):
                raise ConfigError(f"{key} must be finite, got {value}")
        self.outcome = outcome
        self.alpha, self.beta, self.last = float(alpha), float(beta), last
        self._rejects = rejection_test(rejected)
        self._contributions = contributions

    def contributions(self, trajectories: Sequence[Trajectory], outcomes: Sequence[float]) -> list[Any]:
        """For each trajectory one number per turn of the policy, or the error that it met."""
        out: list[Any] = []
        for trajectory, outcome in zip(trajectories, outcomes, strict=True):
            try:
                out.append(list(self._contributions(trajectory, outcome)))
            except ValueError as error:
                out.append(error)
        return out

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Score trajectories; an invalid outcome stays invalid."""
        scores = list(self.outcome(trajectories))
        if len(scores) != len(trajectories):
            raise DataError(f"the outcome gave {len(scores)} scores for {len(trajectories)} trajectories")
        valid = [k for k, s in enumerate(scores) if s.valid]
        made = self.contributions([trajectories[k] for k in valid], [scores[k].value for k in valid])
        for k, contributions in zip(valid, made, strict=True):
            scores[k] = self._score(trajectories[k], scores[k], contributions)
        return scores

    def table(self, trajectory: Trajectory) -> list[TurnRow]:
        """What each turn was paid and why.

        Raises:
            ValueError: the contributions cannot be had, or are not one per turn.
        """
        outcome = next(iter(self.outcome([trajectory]))).value
        made = self.contributions([trajectory], [outcome])[0]
        grounding, rewards = self._fused(trajectory, made)
        return [
            TurnRow(k, c, g, r, trajectory.turns[k].text)
            for k, c, g, r in zip(policy_turns(trajectory), made, grounding, rewards, strict=True)
        ]

    def _fused(self, trajectory: Trajectory, made: Any) -> tuple[list[float], list[float]]:
        """Grounding and reward of each turn."""
        if isinstance(made, ValueError):
            raise made
        grounding = grounding_signal(trajectory, self._rejects, last=self.last)
        if len(made) != len(grounding):
            raise DataError(f"task {trajectory.task.id!r}: {len(made)} contributions for {len(grounding)} turns")
        rewards = fuse(torch.tensor(made, dtype=torch.float64), grounding, self.alpha, self.beta)
        return grounding, rewards.tolist()

    def _score(self, trajectory: Trajectory, score: Score, made: Any) -> Score:
        try:
            _, rewards = self._fused(trajectory, made)
        except ValueError as error:
            return Score.invalid(str(error), **score.parts)
        spans = tuple(Segmenter("turns").spans(trajectory))
        if len(spans) != len(rewards):
            return Score.invalid(f"task {trajectory.task.id!r} has text but no token ids, so no turn can be paid")
        judged = grounding_signal(trajectory, self._rejects, last=None)
        parts = {**score.parts, "contribution": math.fsum(made)}
        if judged:
            parts["grounding"] = sum(judged) / len(judged)
        return Score(score.value, tuple(rewards), spans, parts=parts)


class ProgressReward(TurnReward):
    """Step rewards from a fitted progress estimator: ``alpha * c_t + beta * g_t``.

    Args:
        estimator: fitted; it is frozen while the policy is trained.
        outcome: the final reward. It is the score's value, the target of ``exact`` and of a re-fit, and paid nowhere.
        exact: spread the estimator's error evenly, so that contributions sum to the outcome (not in the paper).
        refit_every: re-fit the estimator after so many scored batches, on the last ``refit_on`` trajectories that were
            scored (an extension; the paper never re-fits).
        refit_on: how many are remembered for it.
        refit: settings of a re-fit.
        alpha, beta, rejected, last, name, on_error: see :class:`TurnReward`.
    """

    def __init__(
        self,
        estimator: ProgressEstimator,
        outcome: Outcome,
        *,
        alpha: float = 1.0,
        beta: float = 0.5,
        rejected: Rejected = "Nothing happens",
        last: float | None = 1.0,
        exact: bool = False,
        refit_every: int | None = None,
        refit_on: int = 512,
        refit: FitSettings | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(
            outcome, self._one, alpha=alpha, beta=beta, rejected=rejected, last=last, name=name, on_error=on_error
        )
        for key, value in (("refit_every", refit_every), ("refit_on", refit_on)):
            if value is not None and value < 1:
                raise ConfigError(f"{key} must be at least 1, got {value}")
        self.estimator = estimator
        self.exact = exact
        self.refit_every, self.refit_on, self.refit = refit_every, refit_on, refit
        self._batches = 0
        self._seen: list[tuple[Trajectory, float]] = []

    def contributions(self, trajectories: Sequence[Trajectory], outcomes: Sequence[float]) -> list[Any]:
        """The estimator's, in float32 precision; one forward pass where every trajectory can be read."""
        try:
            made: list[Any] = self.estimator.step_scores(trajectories)
        except ValueError:
            return super().contributions(trajectories, outcomes)
        return [self._finish(c, outcome) for c, outcome in zip(made, outcomes, strict=True)]

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Score trajectories; on the declared schedule, and after scoring, the estimator is fitted again."""
        scores = super().score(trajectories)
        if self.refit_every is not None:
            self._seen += [(t, s.value) for t, s in zip(trajectories, scores, strict=True) if s.valid]
            del self._seen[: -self.refit_on]
            self._batches += 1
            if self._batches % self.refit_every == 0 and self._seen:
                seen, returns = zip(*self._seen, strict=True)
                self.estimator.fit(seen, returns, self.refit)
        return scores

    def _one(self, trajectory: Trajectory, outcome: float) -> list[float]:
        return self._finish(self.estimator.contributions(trajectory), outcome)

    def _finish(self, contributions_T: torch.Tensor, outcome: float) -> list[float]:
        values = contributions_T.double()
        return (exact_redistribution(values, outcome) if self.exact else values).tolist()

    def state_dict(self) -> dict[str, Any]:
        """Nothing for a frozen estimator; with re-fits its weights and what it will be fitted on."""
        if self.refit_every is None:
            return {}
        seen = [(_plain(trajectory), value) for trajectory, value in self._seen]
        return {"batches": self._batches, "seen": seen, "estimator": dict(self.estimator.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        if self.refit_every is None:
            return
        self._batches = int(state["batches"])
        self._seen = [(_trajectory(plain), value) for plain, value in state["seen"]]
        self.estimator.load_state_dict(state["estimator"])


def _plain(trajectory: Trajectory) -> dict[str, Any]:
    """What an estimator reads of a trajectory, as numbers, text and lists."""
    return {
        "id": trajectory.task.id,
        "prompt": [dict(m) for m in trajectory.task.prompt],
        "prompt_ids": list(trajectory.prompt_ids),
        "turns": [[t.speaker, t.text, list(t.token_ids)] for t in trajectory.turns],
    }


def _trajectory(plain: Mapping[str, Any]) -> Trajectory:
    turns = tuple(Turn(speaker, text, tuple(ids)) for speaker, text, ids in plain["turns"])
    task = Task(plain["id"], plain["prompt"])
    return Trajectory(task, turns, StopReason.DONE, prompt_ids=tuple(plain["prompt_ids"]))
