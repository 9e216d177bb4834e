"""The rule with a critic: generalised advantage estimation, over outcomes, steps or tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from guerdon.errors import ConfigError
from guerdon.training.rules.base import Rule, sources, timed_rewards
from guerdon.training.streams import Experience, Streams, critic_streams

if TYPE_CHECKING:
    from guerdon.training.config import OnlineConfig

__all__ = ["Gae"]


class Gae(Rule):
    """Generalised advantage estimates over the critic's values, and returns as its targets.

    Args:
        rewards: of ``"outcome"`` (on the last policy token), ``"steps"`` (on their last token) and ``"tokens"``.
        gamma, lam: the configuration's own unless given.

    Source: :func:`guerdon.credit.gae`.
    """

    name = "gae"
    kl_in_reward = True

    def __init__(
        self, rewards: Sequence[str] | str = ("outcome",), gamma: float | None = None, lam: float | None = None
    ) -> None:
        for name, value in (("gamma", gamma), ("lam", lam)):
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"gae: {name} must be in [0, 1], got {value}")
        self.rewards = sources(rewards, rule=self.name)
        self.gamma, self.lam = gamma, lam
        self.needs = frozenset({"critic"}) | (frozenset({"tokens", "steps"}) & set(self.rewards))

    def __call__(self, experience: Experience, config: OnlineConfig) -> Streams:
        """Streams with advantages, value weights and targets."""
        rewards = timed_rewards(experience, config, self.rewards).float()
        gamma = config.gamma if self.gamma is None else self.gamma
        lam = config.lam if self.lam is None else self.lam
        return critic_streams(experience, rewards, config, gamma, lam)
