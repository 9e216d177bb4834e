"""A trunk with a linear head, and the pairs that it is fitted to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from guerdon.errors import ConfigError, DataError
from guerdon.reward_models.trunks import PolicyTrunk, Trunk, batches

__all__ = ["Preference", "ScalarRewardModel"]


@dataclass(frozen=True)
class Preference:
    """Two responses, and which is the better one.

    Args:
        chosen, rejected: items, see :mod:`guerdon.reward_models.trunks`.
        label: probability that ``chosen`` is the better one; 1/2 is a tie.
        margin: by how much their scores should differ at least.
        strength: size of the preference (1, 2, 3 in graded data); what it does is the model's ``kind``.
    """

    chosen: Any
    rejected: Any
    label: float = 1.0
    margin: float = 0.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label <= 1.0:
            raise DataError(f"label must be a probability in [0, 1], got {self.label!r}")
        if not math.isfinite(self.margin):
            raise DataError(f"margin must be finite, got {self.margin!r}")
        if not 0.0 <= self.strength < math.inf:
            raise DataError(
                f"strength must be finite and at least 0 (its sign says who was chosen), got {self.strength!r}"
            )


class ScalarRewardModel(nn.Module):
    """A trunk and a linear head with one output per attribute.

    Args:
        trunk: see :mod:`guerdon.reward_models.trunks`; a policy stands for a :class:`PolicyTrunk` on a copy of it.
        n_attributes: outputs of the head.
        seed: of the head's weights, which are small so that an untrained model says nearly 0.
    """

    def __init__(self, trunk: Any, n_attributes: int = 1, *, seed: int = 0) -> None:
        super().__init__()
        if n_attributes < 1:
            raise ConfigError(f"n_attributes must be at least 1, got {n_attributes}")
        self.trunk: Trunk = trunk if isinstance(trunk, Trunk) else PolicyTrunk(trunk)
        self.n_attributes = n_attributes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Linear(self.trunk.width, n_attributes)
            nn.init.normal_(self.head.weight, std=0.1 / math.sqrt(self.trunk.width))
            nn.init.zeros_(self.head.bias)
        device = next((p.device for p in self.trunk.parameters()), None)
        self.head.to(device)

    def forward(self, prepared: Sequence[Any]) -> Tensor:
        """``[B, n_attributes]`` float32 of prepared items."""
        return self.head(self.trunk(prepared).to(self.head.weight.dtype))

    def scores(self, prepared: Sequence[Any], max_tokens: int = 16_384) -> Tensor:
        """``[B, n_attributes]`` without gradient, in batches sorted by length; the model is put in evaluation mode."""
        self.eval()
        out = torch.zeros(len(prepared), self.n_attributes)
        with torch.no_grad():
            for rows in batches([self.trunk.size(p) for p in prepared], max_tokens):
                out[rows] = self([prepared[k] for k in rows]).float().cpu()
        return out
