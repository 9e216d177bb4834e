"""Rules for rewards in time: steps and tokens are credited with what follows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from guerdon.credit import group_statistics, process_relative, reinforce_plus_plus, returns, step_leave_one_out
from guerdon.errors import ConfigError
from guerdon.training.grids import Grid
from guerdon.training.rules.base import Rule, sources, timed_rewards
from guerdon.training.streams import Experience, StepTable

if TYPE_CHECKING:
    from guerdon.training.config import OnlineConfig

__all__ = ["ProcessRelative", "ReinforcePlusPlus", "StepLeaveOneOut", "TokenReturns"]


class ProcessRelative(Rule):
    """All step rewards of a group normalised together; a token's advantage is the sum from its step on.

    Args:
        scale: divide by the standard deviation of the group's step rewards.
        eps: added to it.

    Tokens that belong to no step get 0. Source: :func:`guerdon.credit.process_relative`.
    """

    name = "process_relative"
    needs = frozenset({"group", "steps"})

    def __init__(self, scale: bool = True, eps: float = 1e-6) -> None:
        self.scale, self.eps = scale, eps

    def __call__(self, experience: Experience, config: OnlineConfig) -> Tensor:
        """Advantages of the tokens of all steps."""
        table = experience.steps()
        grid, rewards_BK = _grid(experience, table, table.value)
        group = torch.from_numpy(experience.group)
        advantage = process_relative(rewards_BK, grid.mask, group, scale=self.scale, eps=self.eps)
        return _spread(experience, table, grid, advantage)


class StepLeaveOneOut(Rule):
    """Return from each step on, minus the other members' from the same step on: unbiased whoever chooses the length.

    Args:
        gamma: discount per step.
        rewards: ``"steps"``, or ``["steps", "outcome"]`` to pay the outcome on the last step as well.

    Tokens that belong to no step get 0. Source: :func:`guerdon.credit.step_leave_one_out`.
    """

    name = "step_leave_one_out"
    needs = frozenset({"group", "steps"})

    def __init__(self, gamma: float = 1.0, rewards: Sequence[str] | str = ("steps",)) -> None:
        _check_gamma(self.name, gamma)
        self.gamma = gamma
        self.rewards = sources(rewards, rule=self.name, allowed=("steps", "outcome"))

    def __call__(self, experience: Experience, config: OnlineConfig) -> Tensor:
        """Advantages of the tokens of all steps."""
        table = experience.steps()
        values = table.value.copy() if "steps" in self.rewards else np.zeros(len(table))
        if "outcome" in self.rewards:
            last = np.append(table.trajectory[1:] != table.trajectory[:-1], len(table) > 0)[: len(table)]
            values[last] += experience.rewards[table.trajectory[last]]
        grid, rewards_BK = _grid(experience, table, values)
        advantage = step_leave_one_out(
            rewards_BK,
            grid.mask,
            torch.from_numpy(experience.group),
            torch.from_numpy(experience.kept),
            gamma=self.gamma,
        )
        return _spread(experience, table, grid, advantage)


class TokenReturns(Rule):
    """Return from each token on, minus a baseline of the group.

    Args:
        gamma: discount per policy token.
        rewards: of ``"tokens"``, ``"steps"`` (on their last token) and ``"outcome"`` (on the last token of all).
        baseline: ``"position"`` (the other members' mean return from the same token on, 0 for those that had ended),
            ``"total"`` (the other members' mean return of the whole response) or ``"none"``. All are unbiased.
    """

    name = "token_returns"
    kl_in_reward = True

    def __init__(
        self,
        gamma: float = 1.0,
        rewards: Sequence[str] | str = ("tokens",),
        baseline: Literal["position", "total", "none"] = "position",
    ) -> None:
        _check_gamma(self.name, gamma)
        if baseline not in ("position", "total", "none"):
            raise ConfigError(f"token_returns: baseline must be 'position', 'total' or 'none', got {baseline!r}")
        self.gamma, self.baseline = gamma, baseline
        self.rewards = sources(rewards, rule=self.name)
        self.needs = frozenset({"tokens", "steps"} & set(self.rewards)) | (
            frozenset() if baseline == "none" else frozenset({"group"})
        )

    def __call__(self, experience: Experience, config: OnlineConfig) -> Tensor:
        """Advantages of all action tokens."""
        rewards = timed_rewards(experience, config, self.rewards)
        index = np.flatnonzero(experience.action)
        grid = Grid(index, experience.trajectory[index], len(experience), len(experience.action))
        rewards_BT = grid.gather(rewards)
        group, kept = torch.from_numpy(experience.group), torch.from_numpy(experience.kept)
        if self.baseline == "position":
            return grid.scatter(step_leave_one_out(rewards_BT, grid.mask, group, kept, gamma=self.gamma))
        togo = returns(rewards_BT, grid.mask, self.gamma)
        if self.baseline == "total":
            total = group_statistics(togo[:, 0], group, kept)
            alone = total.count < 2
            togo = torch.where(alone[:, None], 0.0, togo - total.others[:, None])
        return grid.scatter(togo)


class ReinforcePlusPlus(Rule):
    """Return from each token on (outcome at the end, KL penalty on every token), whitened over the step.

    Args:
        gamma: discount per policy token.
        rewards: as for :class:`TokenReturns`.
        baseline: ``"group"`` first subtracts the mean of the group's outcomes (REINFORCE++-baseline).

    Source: :func:`guerdon.credit.reinforce_plus_plus`.
    """

    name = "reinforce_plus_plus"
    kl_in_reward = True

    def __init__(
        self,
        gamma: float = 1.0,
        rewards: Sequence[str] | str = ("outcome",),
        baseline: Literal["none", "group"] = "none",
    ) -> None:
        _check_gamma(self.name, gamma)
        if baseline not in ("none", "group"):
            raise ConfigError(f"reinforce_plus_plus: baseline must be 'none' or 'group', got {baseline!r}")
        self.gamma, self.baseline = gamma, baseline
        self.rewards = sources(rewards, rule=self.name)
        self.needs = frozenset({"tokens", "steps"} & set(self.rewards)) | (
            frozenset({"group"}) if baseline == "group" else frozenset()
        )

    def __call__(self, experience: Experience, config: OnlineConfig) -> Tensor:
        """Advantages of all action tokens."""
        rewards = timed_rewards(experience, config, self.rewards)
        if self.baseline == "group":
            kept = np.flatnonzero(experience.kept)
            mean = group_statistics(
                torch.from_numpy(experience.rewards),
                torch.from_numpy(experience.group),
                torch.from_numpy(experience.kept),
            ).mean
            rewards[torch.from_numpy(experience.last_action[kept])] -= mean[torch.from_numpy(kept)]
        index = np.flatnonzero(experience.action)
        grid = Grid(index, experience.trajectory[index], len(experience), len(experience.action))
        return grid.scatter(reinforce_plus_plus(grid.gather(rewards), grid.mask, gamma=self.gamma))


def _grid(experience: Experience, table: StepTable, values: np.ndarray) -> tuple[Grid, Tensor]:
    grid = Grid(np.arange(len(table)), table.trajectory, len(experience), len(table))
    return grid, grid.gather(torch.from_numpy(values))


def _spread(experience: Experience, table: StepTable, grid: Grid, advantage_BK: Tensor) -> Tensor:
    return torch.from_numpy(table.spread(grid.entries(advantage_BK).numpy(), len(experience.action)))


def _check_gamma(rule: str, gamma: float) -> None:
    if not 0 <= gamma <= 1:
        raise ConfigError(f"{rule}: gamma must be in [0, 1], got {gamma}")
