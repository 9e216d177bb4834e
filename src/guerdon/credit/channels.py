"""Credit with a baseline for each reward channel: what a step earned and what the outcome was, each against the
other responses to the same prompt, and added only then.

Source: Cui, Yuan, Wang et al. 2025 (PRIME, arXiv 2502.01456), section 3.3 and algorithm 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from guerdon.credit.groups import leave_one_out
from guerdon.credit.temporal import returns
from guerdon.credit.temporal import whiten as whiten_masked

__all__ = ["accuracy_filter", "normalize_by_max_return", "pairwise_accuracy", "rloo_with_process"]


def rloo_with_process(
    process: Tensor,
    mask: Tensor,
    outcome: Tensor,
    group: Tensor,
    gamma: float = 1.0,
    baseline: Literal["paper", "official"] = "paper",
    whiten: bool = True,
) -> Tensor:
    """Advantages from token rewards and outcomes, with a leave-one-out baseline for each.

    ``A_t = outcome_i - mean_{j != i} outcome_j + sum_{s >= t} gamma^(s-t) (process_s - mean_{j != i} rbar_j)``, where
    ``rbar_j`` is the mean of response j's token rewards (not their sum: long responses would shift the baseline).

    Args:
        process: ``[B, T]`` reward of each token; a constant (no gradient flows back into its model).
        mask: ``[B, T]`` True on the policy's tokens. Others are no time steps, are neither discounted over nor
            whitened, and get 0; what stands there may be NaN.
        outcome: ``[B]`` reward of each response.
        group: ``[B]`` integer ids, in any order; equal ids, one prompt.
        gamma: discount of the process rewards, in [0, 1]. The outcome counts the same at every token.
        baseline: ``"paper"`` as above. ``"official"`` is the released code's: a token's reward becomes
            ``process * K / (K - 1) - sum_j rbar_j / (K - 1)`` over all K responses, the response itself included. Its
            mean over response i's tokens is the paper's.
        whiten: bring the sum of both channels to mean 0 and variance 1 over the masked tokens.

    Returns:
        ``[B, T]``. A response without tokens counts in the baselines with ``rbar = 0``. Without variance the whitened
        advantages are 0.

    Raises:
        ValueError: shapes differ, a group has one member, gamma or ``baseline`` is none of the above, or a reward is
            not finite.
    """
    outcome, group = torch.as_tensor(outcome), torch.as_tensor(group)
    _check_rows(process, mask, outcome, group)
    if baseline not in ("paper", "official"):
        raise ValueError(f"baseline must be 'paper' or 'official', got {baseline!r}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    dtype = process.dtype if process.is_floating_point() else torch.float32
    kept = mask.bool()
    ids = _ids(group)
    reward = torch.where(kept, process.detach().double(), 0.0)
    _finite(reward, "process", "inside the mask")
    _finite(outcome, "outcome")
    k_B = torch.bincount(ids)[ids]
    if bool((k_B < 2).any()):
        alone = group[k_B < 2][0].item()
        raise ValueError(f"group {alone} has one response; a leave-one-out baseline needs at least 2")
    rbar_B = reward.sum(-1) / kept.sum(-1).clamp(min=1)
    total_B = torch.bincount(ids, weights=rbar_B)[ids]
    others = (k_B - 1).clamp(min=1)
    if baseline == "paper":
        centred = reward - ((total_B - rbar_B) / others)[:, None]
    else:
        centred = reward * (k_B / others)[:, None] - (total_B / others)[:, None]
    advantage = _to_go(torch.where(kept, centred, 0.0), kept, gamma)
    advantage = advantage + leave_one_out(outcome.detach().double(), ids)[:, None]
    advantage = torch.where(kept, advantage, 0.0)
    if whiten:
        chosen = advantage[kept]
        # Equal advantages may differ by rounding; whitened that would not be nothing.
        flat = not len(chosen) or bool(chosen.max() - chosen.min() <= 1e-12 * chosen.abs().max().clamp(min=1.0))
        advantage = torch.zeros_like(advantage) if flat else whiten_masked(advantage, kept, eps=1e-8)
    return advantage.to(dtype)


def accuracy_filter(outcome: Tensor, group: Tensor, low: float = 0.2, high: float = 0.8) -> Tensor:
    """``[B]`` bool: True for the responses to prompts whose mean outcome lies in ``[low, high]``, ends included.

    Args:
        outcome: ``[B]`` in [0, 1].
        group: ``[B]`` integer ids, in any order.
        low, high: with four responses of 0 or 1, the defaults keep prompts with one, two or three right.

    Raises:
        ValueError: shapes differ, ``low > high``, or an outcome is not finite.
    """
    outcome, group = torch.as_tensor(outcome), torch.as_tensor(group)
    _check_groups(outcome, group)
    if not low <= high:
        raise ValueError(f"low must not exceed high, got {low} and {high}")
    _finite(outcome, "outcome")
    ids = _ids(group)
    count = torch.bincount(ids).double()
    mean = torch.zeros_like(count).index_add_(0, ids, outcome.detach().double()) / count.clamp(min=1)
    # An outcome of 0.8 in float32 is 0.800000012: ends are inclusive up to such rounding.
    slack = 1e-6
    return ((mean >= low - slack) & (mean <= high + slack))[ids]


def normalize_by_max_return(process: Tensor, mask: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide token rewards by the largest size that a sum over the rest of a response reaches in the batch.

    Args:
        process: ``[B, T]``.
        mask: ``[B, T]`` True on the policy's tokens; others get 0, whatever stands there.
        eps: added to the divisor.

    Returns:
        ``[B, T]`` ``process / (max |sum_{s >= t} process_s| + eps)``: whatever its scale (and beta) was, no return
        exceeds 1. All zeros stay zeros.

    Raises:
        ValueError: shapes differ, or ``eps`` is negative.
    """
    _check_grid(process, mask)
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    reward = torch.where(mask.bool(), process, 0.0)
    if reward.numel() == 0:
        return reward
    largest = reward.flip(-1).cumsum(-1).abs().max()
    return reward / (largest + eps) if bool(largest > 0) else reward


def pairwise_accuracy(scores: Tensor, outcome: Tensor, group: Tensor) -> Tensor:
    """How often a scorer puts the better of two responses to one prompt first: a scalar in [0, 1].

    Within each prompt, over all pairs, weighted by the difference of their outcomes; then the mean over prompts. A
    prompt whose outcomes are all equal counts 0.5, and so does a pair of equal scores (the released code decides such
    a pair by the order of its members). Prompts with one response have no pair and are left out; 0.5 where none is left.

    Args:
        scores: ``[B]``, for example sums of a response's process rewards.
        outcome: ``[B]``.
        group: ``[B]`` integer ids, in any order.

    Raises:
        ValueError: shapes differ.
    """
    scores, outcome, group = torch.as_tensor(scores), torch.as_tensor(outcome), torch.as_tensor(group)
    _check_groups(outcome, group)
    if scores.shape != outcome.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and outcome {tuple(outcome.shape)} must have one shape [B]")
    values: list[Tensor] = []
    ids = _ids(group)
    for g in range(int(ids.max()) + 1 if len(ids) else 0):
        member = ids == g
        if int(member.sum()) < 2:
            continue
        s, o = scores[member].detach().double(), outcome[member].detach().double()
        i, j = torch.triu_indices(len(s), len(s), 1, device=s.device)
        difference, weight = s[i] - s[j], (o[i] - o[j]).abs()
        agree = torch.where(difference == 0, 0.5, ((difference > 0) == (o[i] > o[j])).double())
        total = weight.sum()
        values.append((agree * weight).sum() / total if bool(total > 0) else total.new_tensor(0.5))
    return torch.stack(values).mean() if values else torch.tensor(0.5, dtype=torch.float64)


def _to_go(reward: Tensor, mask: Tensor, gamma: float) -> Tensor:
    return reward.flip(-1).cumsum(-1).flip(-1) if gamma == 1 else returns(reward, mask, gamma)


def _ids(group: Tensor) -> Tensor:
    """The group of each row, numbered from 0."""
    return torch.unique(group, return_inverse=True)[1]


def _check_grid(process: Tensor, mask: Tensor) -> None:
    if process.ndim != 2 or process.shape != mask.shape:
        raise ValueError(
            f"process and mask must have one shape [B, T], got {tuple(process.shape)} and {tuple(mask.shape)}"
        )


def _check_groups(outcome: Tensor, group: Tensor) -> None:
    if outcome.ndim != 1 or outcome.shape != group.shape:
        raise ValueError(
            f"outcome and group must have one shape [B], got {tuple(outcome.shape)} and {tuple(group.shape)}"
        )


def _check_rows(process: Tensor, mask: Tensor, outcome: Tensor, group: Tensor) -> None:
    _check_grid(process, mask)
    _check_groups(outcome, group)
    if len(process) != len(outcome):
        raise ValueError(f"process has {len(process)} rows for {len(outcome)} outcomes")


def _finite(values: Tensor, name: str, where: str = "") -> None:
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{bad} values of {name} {where}".rstrip() + " are not finite; leave such responses out")
