"""What credit rules share: their declaration, and rewards laid out in time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import ConfigError
from guerdon.training.streams import Experience

if TYPE_CHECKING:
    from guerdon.training.config import OnlineConfig

__all__ = ["SOURCES", "Rule", "kl_penalty", "outcome_rewards", "per_token", "sources", "timed_rewards"]

SOURCES = ("outcome", "steps", "tokens")
"""Where rewards in time may come from: a score's value, its step values, its token values."""


class Rule:
    """Base of the credit rules.

    Attributes:
        name: in configurations and messages.
        needs: what the rule reads beside the outcomes: ``"group"`` (other trajectories of the same task), ``"critic"``,
            ``"steps"``, ``"tokens"``, ``"reference"``, ``"channels"`` (named parts of the scores).
        kl_in_reward: the rule subtracts ``kl_coef`` times the KL estimate from the reward where ``kl_in="reward"``.
    """

    name = "rule"
    needs: frozenset[str] = frozenset()
    kl_in_reward = False

    def __call__(self, experience: Experience, config: OnlineConfig) -> Any:
        """Advantages ``[N]`` per flat token, 0 off the policy's tokens; or whole streams."""
        raise TypeError(f"{type(self).__name__} must override __call__")

    def conflicts(self, config: OnlineConfig) -> Iterator[str]:
        """Yield why the rule cannot work with these settings, beyond what ``needs`` says."""
        yield from ()

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_") and k != "needs")
        return f"{self.name}({settings})"


def per_token(experience: Experience, advantage_B: Tensor) -> Tensor:
    """[N]: every action token gets its trajectory's advantage."""
    out = torch.zeros(len(experience.action), dtype=advantage_B.dtype)
    action = torch.from_numpy(experience.action)
    out[action] = advantage_B[torch.from_numpy(experience.trajectory)[action]]
    return out


def kl_penalty(experience: Experience, config: OnlineConfig) -> Tensor | None:
    """[N] float64, ``kl_coef`` times the KL estimate on action tokens; None where the penalty is not in the reward."""
    if config.kl_coef == 0 or config.kl_in != "reward":
        return None
    from guerdon.training.losses import KL

    assert experience.old is not None and experience.reference is not None
    penalty = KL[config.kl_kind](experience.old.double(), experience.reference.double())
    return torch.where(torch.from_numpy(experience.action), config.kl_coef * penalty, 0.0)


def outcome_rewards(experience: Experience, config: OnlineConfig) -> Tensor:
    """[B] float64 outcomes, less each trajectory's KL penalty where it is in the reward."""
    rewards = torch.from_numpy(experience.rewards.copy())
    penalty = kl_penalty(experience, config)
    if penalty is not None:
        total = torch.zeros(len(rewards), dtype=torch.float64)
        rewards -= total.index_add_(0, torch.from_numpy(experience.trajectory), penalty)
    return rewards


def timed_rewards(experience: Experience, config: OnlineConfig, what: Sequence[str]) -> Tensor:
    """[N] float64 rewards at the tokens that earn them, less the KL penalty where it is in the reward.

    Args:
        experience, config: of the step.
        what: of :data:`SOURCES`: the outcome on the last policy token, step values on the last token of their step,
            token values where they are. What is named is added; a reward whose value repeats its steps' sum should not
            be paid twice.

    Raises:
        RewardError: a score lacks what is named.
    """
    n = len(experience.action)
    out = np.zeros(n)
    if "outcome" in what:
        kept = np.flatnonzero(experience.kept)
        out[experience.last_action[kept]] += experience.rewards[kept]
    if "steps" in what:
        table = experience.steps()
        out += table.at_ends(table.value, n)
    if "tokens" in what:
        out += experience.token_rewards()
    rewards = torch.from_numpy(out)
    penalty = kl_penalty(experience, config)
    return rewards if penalty is None else rewards - penalty


def sources(rewards: Sequence[str] | str, *, rule: str, allowed: Sequence[str] = SOURCES) -> tuple[str, ...]:
    """Checked names of reward sources.

    Raises:
        ConfigError: none, or one that is not allowed.
    """
    chosen = (rewards,) if isinstance(rewards, str) else tuple(rewards)
    for name in chosen:
        if name not in allowed:
            raise ConfigError(f"{rule}: rewards must be of {', '.join(allowed)}, got {name!r}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ConfigError(f"{rule}: rewards must name at least one of {', '.join(allowed)}, each once")
    return chosen
