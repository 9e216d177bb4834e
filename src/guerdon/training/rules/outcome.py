"""Rules for outcomes: every token of a trajectory gets the same advantage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from guerdon.credit import group_relative, leave_one_out, per_channel, reinforce
from guerdon.errors import ConfigError, RewardError
from guerdon.training.rules.base import Rule, outcome_rewards, per_token
from guerdon.training.streams import Experience

if TYPE_CHECKING:
    from guerdon.training.config import OnlineConfig

__all__ = ["GroupRelative", "LeaveOneOut", "PerChannel", "Reinforce"]


class GroupRelative(Rule):
    """Outcome minus the group's mean, over its standard deviation where ``scale``.

    Args:
        scale: divide by the deviation; without, a prompt's weight does not depend on how uneven its rewards are
            (Dr. GRPO).
        eps: added to the deviation.

    Source: see :func:`guerdon.credit.group_relative`.
    """

    name = "group_relative"
    needs = frozenset({"group"})

    def __init__(self, scale: bool = True, eps: float = 1e-6) -> None:
        self.scale, self.eps = scale, eps

    def __call__(self, experience: Experience, config: OnlineConfig) -> Tensor:
        """Advantages of all action tokens."""
        kept = torch.from_numpy(experience.kept)
        rewards, group = torch.from_numpy(experience.rewards), torch.from_numpy(experience.group)
        return per_token(experience, group_relative(rewards, group, kept, scale=self.scale, eps=self.eps))


class LeaveOneOut(Rule):
    """Outcome minus the mean of the other members of the group. Source: :func:`guerdon.credit.leave_one_out`."""

    name = "leave_one_out"
    needs = frozenset({"group"})
    kl_in_reward = True

    def __call__(self, experience: Experience, config: OnlineConfig) -> Tensor:
        """Advantages of all action tokens."""
        kept, group = torch.from_numpy(experience.kept), torch.from_numpy(experience.group)
        return per_token(experience, leave_one_out(outcome_rewards(experience, config), group, kept))


class Reinforce(Rule):
    """Outcome minus a baseline over the batch, or over the run. Source: :func:`guerdon.credit.reinforce`.

    Args:
        baseline: ``"none"``, ``"batch"`` (mean of the other trajectories of the step) or ``"running"`` (exponential
            mean of the outcomes of earlier steps; part of every checkpoint).
        decay: of the running mean, per step, in [0, 1).
    """

    name = "reinforce"
    kl_in_reward = True

    def __init__(self, baseline: Literal["none", "batch", "running"] = "batch", decay: float = 0.9) -> None:
        if baseline not in ("none", "batch", "running"):
            raise ConfigError(f"reinforce: baseline must be 'none', 'batch' or 'running', got {baseline!r}")
        if not 0 <= decay < 1:
            raise ConfigError(f"reinforce: decay must be in [0, 1), got {decay}")
        self.baseline, self.decay = baseline, decay
        self._mean: float | None = None

    def __call__(self, experience: Experience, config: OnlineConfig) -> Tensor:
        """Advantages of all action tokens; then the running mean takes in this step's outcomes."""
        kept = torch.from_numpy(experience.kept)
        rewards = outcome_rewards(experience, config)
        # Nothing is known at the first step; 0 would be a baseline like any other.
        advantage = reinforce(rewards, kept, baseline=self.baseline, running=self._mean or 0.0)
        if experience.kept.any():
            mean = float(rewards[kept].mean())
            self._mean = mean if self._mean is None else self.decay * self._mean + (1 - self.decay) * mean
        return per_token(experience, advantage)

    def state_dict(self) -> dict[str, Any]:
        """The running mean."""
        return {"mean": self._mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self._mean = state["mean"]


class PerChannel(Rule):
    """Each reward has its own baseline (and scale); the advantages are weighted and added.

    Args:
        weights: by name of a part of the scores (a sum of rewards names its terms), ``"value"`` for the outcome itself.
        baseline, scale, eps: see :func:`guerdon.credit.per_channel`.
        whiten_batch: bring the sums to mean 0 and variance 1 over the step.
    """

    name = "per_channel"
    needs = frozenset({"group", "channels"})

    def __init__(
        self,
        weights: Mapping[str, float],
        baseline: Literal["group", "leave_one_out"] = "group",
        scale: bool = True,
        whiten_batch: bool = False,
        eps: float = 1e-6,
    ) -> None:
        if not isinstance(weights, Mapping) or not weights:
            raise ConfigError(
                "per_channel: weights must map names of parts to numbers, for example {correct: 1, format: 0.2}"
            )
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not np.isfinite(weight):
                raise ConfigError(f"per_channel: the weight of {name!r} must be a finite number, got {weight!r}")
        if baseline not in ("group", "leave_one_out"):
            raise ConfigError(f"per_channel: baseline must be 'group' or 'leave_one_out', got {baseline!r}")
        self.weights = dict(weights)
        self.baseline, self.scale, self.whiten_batch, self.eps = baseline, scale, whiten_batch, eps

    def conflicts(self, config: OnlineConfig) -> Iterator[str]:
        if self.whiten_batch and config.whiten != "none":
            yield f"whiten={config.whiten!r} would whiten what per_channel has whitened; choose one of the two"

    def __call__(self, experience: Experience, config: OnlineConfig) -> Tensor:
        """Advantages of all action tokens.

        Raises:
            RewardError: a kept score has no such part, or its value is not finite.
        """
        channels = torch.zeros(len(experience), len(self.weights), dtype=torch.float64)
        for b in np.flatnonzero(experience.kept):
            score = experience.scores[b]
            for c, name in enumerate(self.weights):
                value = score.value if name == "value" and name not in score.parts else score.parts.get(name)
                if value is None or not np.isfinite(value):
                    raise RewardError(
                        f"credit per_channel weighs {name!r}, and the score of task "
                        f"{experience.trajectories[b].task.id!r} has {'no such part' if value is None else value}; "
                        f"its parts are {', '.join(score.parts) or 'none'}"
                    )
                channels[b, c] = value
        advantage = per_channel(
            channels,
            torch.from_numpy(experience.group),
            list(self.weights.values()),
            torch.from_numpy(experience.kept),
            baseline=self.baseline,
            scale=self.scale,
            whiten_batch=self.whiten_batch,
            eps=self.eps,
        )
        return per_token(experience, advantage)
