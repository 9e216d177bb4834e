"""Statistics within groups of trajectories for one task, by explicit group id, and advantages from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from guerdon.parts import part

__all__ = ["GroupStatistics", "group_relative", "group_statistics", "leave_one_out"]


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """Per trajectory ``[B]``: its group's mean, unbiased standard deviation, count of valid members, and the
    mean of the other valid members. A group of one has deviation 0 and itself as leave-one-out mean."""

    mean: Tensor
    std: Tensor
    count: Tensor
    others: Tensor


def _check(rewards_B: Tensor, group_ids_B: Tensor, valid_B: Tensor | None) -> None:
    if rewards_B.ndim != 1 or rewards_B.shape != group_ids_B.shape:
        raise ValueError(
            f"rewards {tuple(rewards_B.shape)} and group ids {tuple(group_ids_B.shape)} must be one [B] each"
        )
    if valid_B is not None and valid_B.shape != rewards_B.shape:
        raise ValueError(f"valid {tuple(valid_B.shape)} must have the shape of rewards {tuple(rewards_B.shape)}")
    if group_ids_B.numel() and int(group_ids_B.min()) < 0:
        raise ValueError("group ids must not be negative")


def group_statistics(rewards_B: Tensor, group_ids_B: Tensor, valid_B: Tensor | None = None) -> GroupStatistics:
    """Statistics of each trajectory's group; ids may come in any order.

    Args:
        rewards_B: ``[B]``.
        group_ids_B: ``[B]`` integers; equal ids, one group.
        valid_B: ``[B]`` bool; invalid members count in no statistic (their rewards may be NaN).

    Returns:
        Statistics per trajectory, computed in float64. Groups without valid members have mean 0.
    """
    _check(rewards_B, group_ids_B, valid_B)
    ids = group_ids_B.long()
    valid = torch.ones_like(ids, dtype=torch.bool) if valid_B is None else valid_B.bool()
    weight = valid.double()
    # Invalid rewards may be NaN, and NaN * 0 is NaN.
    rewards = torch.where(valid, rewards_B.double(), 0.0)
    groups = int(ids.max()) + 1 if ids.numel() else 0

    def total(x: Tensor) -> Tensor:
        return torch.zeros(groups, dtype=torch.float64, device=x.device).index_add_(0, ids, x)

    count = total(weight)[ids]
    summed = total(rewards)[ids]
    mean = summed / count.clamp(min=1)
    square = total(weight * (rewards - mean) ** 2)[ids]
    std = (square / (count - 1).clamp(min=1)).sqrt()
    others = torch.where(count > 1, (summed - rewards) / (count - 1).clamp(min=1), mean)
    others = torch.where(valid, others, mean)
    return GroupStatistics(mean, std, count, others)


@part("credit")
def group_relative(
    rewards_B: Tensor, group_ids_B: Tensor, valid_B: Tensor | None = None, *, scale: bool = True, eps: float = 1e-6
) -> Tensor:
    """Reward minus the group's mean, over its standard deviation plus ``eps`` where ``scale``.

    A group without variance, and a group of one, get 0; so do invalid members.

    Source: GRPO, Shao et al. 2024 (arXiv 2402.03300); without the scale, Dr. GRPO, Liu et al. 2025.
    """
    s = group_statistics(rewards_B, group_ids_B, valid_B)
    valid = torch.ones_like(rewards_B, dtype=torch.bool) if valid_B is None else valid_B.bool()
    centred = torch.where(valid, rewards_B.double(), s.mean) - s.mean
    # Equal rewards may differ from their mean by rounding; divided by eps that would not be nothing.
    flat = s.std <= 1e-12 * s.mean.abs().clamp(min=1.0)
    centred = torch.where(flat, 0.0, centred)
    out = centred / torch.where(flat, 1.0, s.std + eps) if scale else centred
    return out.to(rewards_B.dtype if rewards_B.is_floating_point() else torch.float32)


@part("credit")
def leave_one_out(rewards_B: Tensor, group_ids_B: Tensor, valid_B: Tensor | None = None) -> Tensor:
    """Reward minus the mean of the other members of the group; 0 in a group of one and for invalid members.

    Source: RLOO, Kool et al. 2019; Ahmadian et al. 2024 (arXiv 2402.14740).
    """
    s = group_statistics(rewards_B, group_ids_B, valid_B)
    valid = torch.ones_like(rewards_B, dtype=torch.bool) if valid_B is None else valid_B.bool()
    out = torch.where(valid & (s.count > 1), torch.where(valid, rewards_B.double(), 0.0) - s.others, 0.0)
    return out.to(rewards_B.dtype if rewards_B.is_floating_point() else torch.float32)
