"""Credit over time: returns and generalised advantage estimation in which environment tokens are no steps."""

from __future__ import annotations

import torch
from torch import Tensor

from guerdon.parts import part

__all__ = ["broadcast_outcome", "gae", "place_outcome", "returns", "whiten"]


def _same(**tensors: Tensor) -> None:
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(s) != 2 for s in shapes.values()):
        raise ValueError(f"expected equal [B, T] shapes, got {shapes}")


@part("credit")
def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates over the masked positions.

    Time runs over positions where ``mask_BT`` is set: what lies between two of them (an environment's tokens)
    is neither discounted nor bootstrapped from, and its values and rewards are ignored. The value behind the
    last step is 0.

    Args:
        rewards_BT: ``[B, T]`` reward after each action.
        values_BT: ``[B, T]`` value of the state in which each action is taken.
        mask_BT: ``[B, T]`` True on actions.
        gamma: discount, in [0, 1].
        lam: trace decay, in [0, 1].

    Returns:
        Advantages and value targets (advantage plus value), each ``[B, T]``, 0 outside the mask.

    Source: Schulman et al. 2016 (arXiv 1506.02438), eq. 16.
    """
    _same(rewards=rewards_BT, values=values_BT, mask=mask_BT)
    mask = mask_BT.bool()
    rewards = torch.where(mask, rewards_BT, 0.0)
    values = torch.where(mask, values_BT, 0.0)
    advantage = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0]) if values.shape[1] else values.new_zeros(values.shape[0])
    running = torch.zeros_like(next_value)
    for t in range(values.shape[1] - 1, -1, -1):
        m = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(m, delta + gamma * lam * running, running)
        advantage[:, t] = torch.where(m, running, 0.0)
        next_value = torch.where(m, values[:, t], next_value)
    return advantage, torch.where(mask, advantage + values, 0.0)


def returns(rewards_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0) -> Tensor:
    """Discounted sum of the rewards from each action on, ``[B, T]``; time as in :func:`gae`."""
    return gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, gamma, 1.0)[0]


def place_outcome(values_B: Tensor, mask_BT: Tensor) -> Tensor:
    """Put each trajectory's outcome on its last action, ``[B, T]``; a row without actions stays 0."""
    if mask_BT.ndim != 2 or values_B.shape != mask_BT.shape[:1]:
        raise ValueError(f"expected values [B] and mask [B, T], got {tuple(values_B.shape)} and {tuple(mask_BT.shape)}")
    mask = mask_BT.bool()
    after = mask.long().flip(-1).cumsum(-1).flip(-1)
    return torch.where(mask & (after == 1), values_B[:, None], 0.0)


def broadcast_outcome(values_B: Tensor, mask_BT: Tensor) -> Tensor:
    """Give every action its trajectory's outcome, ``[B, T]``; 0 elsewhere."""
    if mask_BT.ndim != 2 or values_B.shape != mask_BT.shape[:1]:
        raise ValueError(f"expected values [B] and mask [B, T], got {tuple(values_B.shape)} and {tuple(mask_BT.shape)}")
    return torch.where(mask_BT.bool(), values_B[:, None], 0.0)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Bring the masked entries to mean 0 (or leave their mean) and unbiased variance 1; 0 outside the mask.

    Args:
        x: any shape.
        mask: same shape; statistics are over its entries. Pass the full response mask for the statistics of
            released Router-R1 code.
        shift_mean: False adds the mean back.
        eps: added to the variance. Fewer than two entries are returned centred and unscaled.
    """
    if x.shape != mask.shape:
        raise ValueError(f"x {tuple(x.shape)} and mask {tuple(mask.shape)} must have one shape")
    m = mask.bool()
    kept = torch.where(m, x, 0.0)
    n = m.sum()
    mean = kept.sum() / n.clamp(min=1)
    centred = torch.where(m, kept - mean, 0.0)
    variance = (centred**2).sum() / (n - 1).clamp(min=1)
    out = torch.where(n > 1, centred * (variance + eps).rsqrt(), centred)
    return out if shift_mean else torch.where(m, out + mean, 0.0)
