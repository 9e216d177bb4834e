"""Credit for steps (lines, turns, tokens) against the other trajectories of the group.

Steps lie in the first columns of a ``[B, K]`` grid: a trajectory of ``n`` steps has columns ``0 .. n - 1``, and what
stands behind them is never read. The same functions serve tokens, which are steps of one token.

Which baseline may a step have? One that does not depend on what the trajectory itself did at that step. Where the
policy decides how many steps it takes, the mean over "all that reached step k", itself included, is none: it shrinks
the advantage of a step by ``(m - 1) / m``, where ``m`` is how many got that far, so that late steps, which few reach,
count less than early ones. :func:`step_leave_one_out` is unbiased; a test holds it against the exact policy gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from guerdon.credit.temporal import returns, whiten
from guerdon.parts import part

__all__ = ["process_relative", "reinforce_plus_plus", "step_leave_one_out"]


@part("credit")
def process_relative(
    step_rewards_BK: Tensor,
    mask_BK: Tensor,
    group_ids_B: Tensor,
    *,
    scale: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Normalise all step rewards of a group together; a step's advantage is the sum from it to the last step.

    Args:
        step_rewards_BK: ``[B, K]`` reward of each step; anything (NaN too) outside the mask.
        mask_BK: ``[B, K]`` True on steps, a prefix of each row. A row without steps is in no statistic.
        group_ids_B: ``[B]`` integers; equal ids, one group.
        scale: divide by the (unbiased) standard deviation of the group's step rewards.
        eps: added to it.

    Returns:
        ``[B, K]``, 0 outside the mask, and in groups whose step rewards are all equal.

    The mean is over steps, not over trajectories, so the baseline of a trajectory contains its own steps and grows
    with the number of steps that it takes: with the same outcome a longer solution is worth another amount. Where the
    policy chooses how many steps it takes and that matters, use :func:`step_leave_one_out`.

    Source: Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300), section 4.1.3, process supervision.
    """
    mask = _prefix(step_rewards_BK, mask_BK, group_ids_B)
    rewards = torch.where(mask, step_rewards_BK.double(), 0.0)
    ids = group_ids_B.long()
    groups = int(ids.max()) + 1 if ids.numel() else 0

    def total(x_B: Tensor) -> Tensor:
        return torch.zeros(groups, dtype=torch.float64, device=x_B.device).index_add_(0, ids, x_B)[ids]

    count = total(mask.double().sum(1))
    mean = total(rewards.sum(1)) / count.clamp(min=1)
    centred = torch.where(mask, rewards - mean[:, None], 0.0)
    std = (total((centred**2).sum(1)) / (count - 1).clamp(min=1)).sqrt()
    # Equal rewards may differ from their mean by rounding; divided by eps that would not be nothing.
    flat = std <= 1e-12 * mean.abs().clamp(min=1.0)
    centred = torch.where(flat[:, None], 0.0, centred)
    if scale:
        centred = centred / torch.where(flat, 1.0, std + eps)[:, None]
    return returns(centred, mask).to(_float(step_rewards_BK))


@part("credit")
def step_leave_one_out(
    step_rewards_BK: Tensor, mask_BK: Tensor, group_ids_B: Tensor, valid_B: Tensor | None = None, *, gamma: float = 1.0
) -> Tensor:
    """Return from each step on, minus the other members' mean return from the same step on.

    A member that had stopped by then has return 0 from there on and counts as such. The baseline of a step depends on
    the other members and on the step's number alone, whatever the trajectory does, so the gradient is unbiased even
    where the policy chooses its number of steps; and rows of other members that end early are no reason to compare
    with fewer.

    Args:
        step_rewards_BK: ``[B, K]`` reward of each step; anything (NaN too) outside the mask.
        mask_BK: ``[B, K]`` True on steps, a prefix of each row.
        group_ids_B: ``[B]`` integers; equal ids, one group.
        valid_B: ``[B]`` bool; invalid members get 0 and are in no baseline.
        gamma: discount per step, in [0, 1].

    Returns:
        ``[B, K]``, 0 outside the mask, for invalid members and in groups of one.

    Source: leave-one-out after Kool et al. 2019, over returns-to-go; the padding by 0 is the value of having stopped.
    """
    mask = _prefix(step_rewards_BK, mask_BK, group_ids_B)
    valid = torch.ones(len(mask), dtype=torch.bool) if valid_B is None else valid_B.bool()
    if valid.shape != mask.shape[:1]:
        raise ValueError(f"valid {tuple(valid.shape)} must be [B] with B = {len(mask)}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    mask = mask & valid[:, None]
    togo = returns(torch.where(mask, step_rewards_BK.double(), 0.0), mask, gamma)
    ids = group_ids_B.long()
    groups = int(ids.max()) + 1 if ids.numel() else 0
    count = torch.zeros(groups, dtype=torch.float64, device=togo.device).index_add_(0, ids, valid.double())[ids]
    summed = torch.zeros(groups, togo.shape[1], dtype=torch.float64, device=togo.device).index_add_(0, ids, togo)[ids]
    others = (summed - togo) / (count - 1).clamp(min=1)[:, None]
    return torch.where(mask & (count > 1)[:, None], togo - others, 0.0).to(_float(step_rewards_BK))


@part("credit")
def reinforce_plus_plus(rewards_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, eps: float = 1e-8) -> Tensor:
    """Return from each action on, brought to mean 0 and variance 1 over all actions of the batch.

    Args:
        rewards_BT: ``[B, T]`` reward of each action: usually the outcome on the last one and minus the KL penalty
            (k1) on every one; see :func:`guerdon.objectives.kl_penalised_rewards`.
        mask_BT: ``[B, T]`` True on actions; what lies between them is no time step.
        gamma: discount per action.
        eps: added to the variance.

    Returns:
        ``[B, T]``, 0 outside the mask.

    Source: REINFORCE++, Hu 2025 (arXiv 2501.03262), section on global advantage normalisation.
    """
    return whiten(returns(rewards_BT, mask_BT, gamma), mask_BT, eps=eps)


def _prefix(rewards_BK: Tensor, mask_BK: Tensor, group_ids_B: Tensor) -> Tensor:
    """The mask as bool, after the shapes have been checked."""
    if rewards_BK.ndim != 2 or rewards_BK.shape != mask_BK.shape:
        raise ValueError(
            f"step rewards {tuple(rewards_BK.shape)} and mask {tuple(mask_BK.shape)} must be one [B, K] each"
        )
    if group_ids_B.shape != rewards_BK.shape[:1]:
        raise ValueError(f"group ids {tuple(group_ids_B.shape)} must be [B] with B = {len(rewards_BK)}")
    if group_ids_B.numel() and int(group_ids_B.min()) < 0:
        raise ValueError("group ids must not be negative")
    mask = mask_BK.bool()
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError("a row's steps must lie in its first columns; gather them to the left")
    return mask


def _float(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.float32
