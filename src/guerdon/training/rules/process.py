"""Process supervision relative to the group, over returns: what Clip and Delta are used with where there is no critic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from guerdon.credit import returns_relative
from guerdon.training.grids import Grid
from guerdon.training.rules.base import Rule
from guerdon.training.streams import Experience

if TYPE_CHECKING:
    from guerdon.training.config import OnlineConfig

__all__ = ["ReturnsRelative"]


class ReturnsRelative(Rule):
    """Return from each step on, normalised over all steps of the group, on every token of the step.

    Args:
        scale: divide by the standard deviation of the group's returns.
        eps: added to it.

    Tokens that belong to no step get 0. Source: :func:`guerdon.credit.returns_relative`.
    """

    name = "returns_relative"
    needs = frozenset({"group", "steps"})

    def __init__(self, scale: bool = True, eps: float = 1e-6) -> None:
        self.scale, self.eps = scale, eps

    def __call__(self, experience: Experience, config: OnlineConfig) -> Tensor:
        """Advantages of the tokens of all steps."""
        table = experience.steps()
        grid = Grid(np.arange(len(table)), table.trajectory, len(experience), len(table))
        values_BK = grid.gather(torch.from_numpy(table.value))
        group = torch.from_numpy(experience.group)
        advantage_BK = returns_relative(values_BK, grid.mask, group, scale=self.scale, eps=self.eps)
        return torch.from_numpy(table.spread(grid.entries(advantage_BK).numpy(), len(experience.action)))
