"""Scalar heads on a language model's last hidden state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ValueHead"]


class ValueHead(nn.Module):
    """Linear map from hidden states ``[.., hidden]`` to one value each ``[.., 1]``.

    It starts at zero, so that an untrained critic predicts 0 everywhere and adds no noise to the first
    advantages.
    """

    def __init__(self, hidden: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, 1, dtype=dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden.to(self.linear.weight.dtype))
