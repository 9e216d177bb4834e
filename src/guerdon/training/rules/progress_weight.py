"""Outcome plus progress: each step is weighted by the outcome and by its own advantage under a prover.

    prover = ProcessAdvantageVerifier.from_policy(policy, best_of=4).fit(prefixes, q)
    OnlineTrainer(policy, engine, environment, tasks, verifier, config, credit=PavCredit(prover, alpha=3.0))

The prover is fitted once, on the policy that the run begins with, and stays as it is (the default of the method); a
caller who fits it anew during the run does so between steps.

Source: Setlur et al. 2024 (arXiv 2410.08146).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from guerdon.credit import leave_one_out, progress_weights
from guerdon.errors import ConfigError, RewardError
from guerdon.training.grids import Grid
from guerdon.training.rules.base import Rule, outcome_rewards
from guerdon.training.streams import Experience
from guerdon.types import step_spans

if TYPE_CHECKING:
    from guerdon.training.config import OnlineConfig

__all__ = ["PavCredit"]


class PavCredit(Rule):
    """Advantage of every token of a step: ``outcome - mean outcome of the others + alpha * A^mu(step)``.

    There is no return-to-go of the progress: it telescopes, and its sum from a step on says nothing about the step.

    Args:
        prover: what the advantages come from: an object with ``advantages(trajectories)`` (a
            :class:`~guerdon.reward_models.ProcessAdvantageVerifier`); None takes the step values of the scores for
            advantages, as a :class:`~guerdon.reward_models.StepReward` around a verifier of progress gives them.
        alpha: weight of the progress, at least 0. In training a few units are usual, in search 0.5.
        policy: that is trained; only looked at to warn where the prover is the policy itself.
        outcome: ``"value"``, or the name of the scores' part that holds the outcome (a step reward's ``"verified"``).

    Raises:
        ConfigError: alpha is negative or not finite, or the prover has no ``advantages``.
    """

    name = "pav"
    kl_in_reward = True

    def __init__(self, prover: Any = None, alpha: float = 0.5, *, policy: Any = None, outcome: str = "value") -> None:
        if not (alpha >= 0 and np.isfinite(alpha)):
            raise ConfigError(f"pav: alpha must be at least 0 and finite, got {alpha}")
        own = policy is not None and (prover is policy or getattr(prover, "policy", None) is policy)
        if own and getattr(prover, "best_of", 1) == 1:
            warnings.warn(
                "the prover is the policy itself: its progress multiplies the gradient of the outcome by 1 + alpha and "
                "adds nothing; use the best of several tries (best_of=4), or another policy",
                stacklevel=2,
            )
        self.prover, self.alpha, self.outcome = prover, float(alpha), outcome
        self.needs = frozenset({"group"} if prover is not None else {"group", "steps"})

    def step_weights(
        self, outcome: Tensor, advantages: Tensor, baseline: Tensor | float = 0.0, mask: Tensor | None = None
    ) -> Tensor:
        """``outcome - baseline + alpha * A^mu`` per step; see :func:`guerdon.credit.progress_weights`."""
        return progress_weights(
            torch.as_tensor(outcome), torch.as_tensor(advantages), baseline, alpha=self.alpha, mask=mask
        )

    def __call__(self, experience: Experience, config: OnlineConfig) -> Tensor:
        """Advantages of all action tokens, ``[N]``.

        Raises:
            RewardError: scores without steps where there is no prover, or a score without the outcome's part.
            ConfigError: the prover has no ``advantages``.
        """
        size = len(experience.action)
        kept = torch.from_numpy(experience.kept)
        group = torch.from_numpy(experience.group)
        relative_B = leave_one_out(self._outcomes(experience, config), group, kept)
        starts, stops, owner, values = self._steps(experience)
        grid = Grid(np.arange(len(values)), owner, len(experience), len(values))
        weights = self.step_weights(relative_B, grid.gather(torch.from_numpy(values)), 0.0, grid.mask)
        flat = torch.where(
            torch.from_numpy(experience.action), relative_B[torch.from_numpy(experience.trajectory)], 0.0
        )
        for start, stop, weight in zip(starts, stops, grid.scatter(weights).tolist(), strict=True):
            flat[start:stop] = weight
        return flat[:size]

    def _outcomes(self, experience: Experience, config: OnlineConfig) -> Tensor:
        if self.outcome == "value":
            return outcome_rewards(experience, config)
        values = [s.parts.get(self.outcome, np.nan) for s in experience.scores]
        missing = [b for b in np.flatnonzero(experience.kept) if not np.isfinite(values[b])]
        if missing:
            raise RewardError(
                f"the score of task {experience.trajectories[missing[0]].task.id!r} has no part {self.outcome!r}; "
                "give the step reward a verifier, or name the part that holds the outcome"
            )
        return (
            torch.tensor(values, dtype=torch.float64)
            + outcome_rewards(experience, config)
            - torch.from_numpy(experience.rewards)
        )

    def _steps(self, experience: Experience) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        if self.prover is None:
            table = experience.steps()
            return table.start, table.stop, table.trajectory, table.value
        if not callable(getattr(self.prover, "advantages", None)):
            raise ConfigError(f"pav: the prover needs advantages(trajectories), got {self.prover!r}")
        kept = np.flatnonzero(experience.kept)
        trajectories = [experience.trajectories[b] for b in kept]
        made = self.prover.advantages(trajectories)
        spans = [step_spans(t, self.prover.segmenter) for t in trajectories]
        for b, row, cut in zip(kept, made, spans, strict=True):
            if len(row) != len(cut):
                raise RewardError(
                    f"the prover gave {len(row)} advantages for the {len(cut)} steps of task "
                    f"{experience.trajectories[b].task.id!r}"
                )
        flat = [
            (experience.offsets[b] + s.start, experience.offsets[b] + s.stop, b)
            for b, c in zip(kept, spans, strict=True)
            for s in c
        ]
        starts, stops, owner = (np.array([x[i] for x in flat], dtype=np.int64) for i in range(3))
        values = torch.cat([torch.as_tensor(row).double() for row in made]) if made else torch.zeros(0).double()
        return starts, stops, owner, values.numpy()
