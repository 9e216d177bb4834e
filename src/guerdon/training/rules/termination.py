"""Credit against answering at once: the rule for trajectories that go on from one prefix.

Source: Qu et al. 2025, "Optimizing Test-Time Compute via Meta Reinforcement Fine-Tuning" (arXiv 2503.07572).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guerdon.credit import termination_relative
from guerdon.training.rules.base import Rule, outcome_rewards, per_token
from guerdon.training.streams import Experience

if TYPE_CHECKING:
    from guerdon.training.config import OnlineConfig

__all__ = ["TerminationRelative"]


class TerminationRelative(Rule):
    """Reward minus the mean reward of the group's members that were made to answer at once, on every token.

    Which these are stands in each trajectory's ``info["terminated"]``, as
    :class:`~guerdon.environments.continued.Continued` writes it. Source: :func:`guerdon.credit.termination_relative`.
    """

    name = "termination_relative"
    needs = frozenset({"group"})

    def __call__(self, experience: Experience, config: OnlineConfig) -> Tensor:
        """Advantages of all action tokens."""
        stopped = torch.tensor([bool(t.info.get("terminated")) for t in experience.trajectories], dtype=torch.bool)
        kept = torch.from_numpy(experience.kept)
        group = torch.from_numpy(experience.group)
        return per_token(experience, termination_relative(outcome_rewards(experience, config), group, stopped, kept))
