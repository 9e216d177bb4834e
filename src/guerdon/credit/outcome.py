"""One advantage per trajectory from outcomes alone: REINFORCE with its baselines, and several rewards side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from guerdon.credit.groups import group_relative, leave_one_out
from guerdon.credit.temporal import whiten
from guerdon.parts import part

__all__ = ["per_channel", "reinforce"]


@part("credit")
def reinforce(
    rewards_B: Tensor,
    valid_B: Tensor | None = None,
    *,
    baseline: Literal["none", "batch", "running"] = "batch",
    running: float = 0.0,
) -> Tensor:
    """Reward minus a baseline that does not depend on the trajectory it is subtracted from.

    Args:
        rewards_B: ``[B]``.
        valid_B: ``[B]`` bool; invalid members get 0 and are in no baseline (their rewards may be NaN).
        baseline: ``"none"``; ``"batch"``, the mean of the *other* valid trajectories of the batch (0 for a single
            one), which leaves the gradient unbiased where the batch's own mean would shrink it by ``(B - 1) / B``;
            ``"running"``, the number that the caller remembers from earlier batches.
        running: that number.

    Returns:
        ``[B]``.

    Raises:
        ValueError: shapes differ, or another ``baseline``.

    Source: Williams 1992 (REINFORCE); a running mean as the baseline: Sutton & Barto 2018, section 13.4.
    """
    if rewards_B.ndim != 1:
        raise ValueError(f"rewards must be [B], got {tuple(rewards_B.shape)}")
    valid = _valid(rewards_B, valid_B)
    if baseline == "batch":
        alone = int(valid.sum()) < 2
        if not alone:
            return leave_one_out(rewards_B, torch.zeros(len(rewards_B), dtype=torch.long), valid)
        running = 0.0
    elif baseline == "none":
        running = 0.0
    elif baseline != "running":
        raise ValueError(f"baseline must be 'none', 'batch' or 'running', got {baseline!r}")
    rewards = rewards_B if rewards_B.is_floating_point() else rewards_B.float()
    return torch.where(valid, rewards - running, 0.0)


@part("credit")
def per_channel(
    channels_BC: Tensor,
    group_ids_B: Tensor,
    weights: Sequence[float],
    valid_B: Tensor | None = None,
    *,
    baseline: Literal["group", "leave_one_out"] = "group",
    scale: bool = True,
    whiten_batch: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Weighted sum over channels of each channel's own advantage.

    Normalising the sum of rewards lets a channel of large variance drown the others, and maps different mixtures to
    the same advantage; here every channel has its own baseline (and scale) before the weights are applied.

    Args:
        channels_BC: ``[B, C]`` value of each reward.
        group_ids_B: ``[B]`` integers; equal ids, one group.
        weights: one per channel.
        valid_B: ``[B]`` bool; invalid members get 0 and count in no statistic.
        baseline: ``"group"`` (the group's mean) or ``"leave_one_out"`` (the mean of the others, never scaled).
        scale: divide by the group's standard deviation (``"group"`` only).
        whiten_batch: bring the sum to mean 0 and variance 1 over the valid members of the batch.
        eps: added to each deviation.

    Returns:
        ``[B]``.

    Raises:
        ValueError: shapes differ, or another ``baseline``.

    Source: GDPO, Liu et al. 2026 (arXiv 2601.05242), eq. 4 to 6; the leave-one-out form is RLOO's, per channel.
    """
    if channels_BC.ndim != 2 or channels_BC.shape[1] != len(weights):
        raise ValueError(
            f"expected channels [B, {len(weights)}], one column per weight, got {tuple(channels_BC.shape)}"
        )
    if baseline not in ("group", "leave_one_out"):
        raise ValueError(f"baseline must be 'group' or 'leave_one_out', got {baseline!r}")
    dtype = channels_BC.dtype if channels_BC.is_floating_point() else torch.float32
    out = torch.zeros(len(channels_BC), dtype=torch.float64, device=channels_BC.device)
    for weight, column in zip(weights, channels_BC.double().unbind(1), strict=True):
        if baseline == "group":
            one = group_relative(column, group_ids_B, valid_B, scale=scale, eps=eps)
        else:
            one = leave_one_out(column, group_ids_B, valid_B)
        out = out + weight * one
    if whiten_batch:
        out = whiten(out, _valid(out, valid_B))
    return out.to(dtype)


def _valid(rewards_B: Tensor, valid_B: Tensor | None) -> Tensor:
    if valid_B is None:
        return torch.ones_like(rewards_B, dtype=torch.bool)
    if valid_B.shape != rewards_B.shape:
        raise ValueError(f"valid {tuple(valid_B.shape)} must have the shape of rewards {tuple(rewards_B.shape)}")
    return valid_B.bool()
