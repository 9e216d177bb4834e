"""Objectives whose ratio belongs to a whole response: one weight for all its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from guerdon.objectives.policy_gradient import log_ratio
from guerdon.parts import part

__all__ = ["gspo", "sequence_log_ratio"]


def sequence_log_ratio(logprobs: Tensor, old_logprobs: Tensor, sequence_ids: Tensor, mask: Tensor) -> Tensor:
    """Mean log-ratio of each token's response: the log of the length-normalised sequence ratio.

    Args:
        logprobs, old_logprobs: ``[n]``.
        sequence_ids: ``[n]`` integers, not negative; equal ids, one response, in any order.
        mask: ``[n]`` True on tokens that count; others may hold anything.

    Returns:
        ``[n]``, equal within a response; 0 for a response without counting tokens.
    """
    ids = sequence_ids.long()
    change = torch.where(mask.bool(), log_ratio(logprobs, old_logprobs), 0.0)
    size = int(ids.max()) + 1 if ids.numel() else 0
    total = change.new_zeros(size).index_add_(0, ids, change)
    count = change.new_zeros(size).index_add_(0, ids, mask.to(change.dtype))
    return (total / count.clamp(min=1))[ids]


@part("objective")
def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    *,
    sequence_ids: Tensor,
    mask: Tensor,
) -> Tensor:
    """Clipped surrogate loss with the response's ratio ``(pi(y) / pi_old(y)) ** (1 / |y|)`` in place of the token's.

    Each token's loss is ``-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)``, where s has the sequence's value and the
    token's own gradient. With one advantage for the whole response and the mean over its tokens
    (``aggregation="sequence"``), value and gradient are those of the sequence objective; advantages that differ from
    token to token are allowed.

    Args:
        logprobs, old_logprobs, advantages: ``[n]``; see :func:`guerdon.objectives.ppo_clip`.
        clip_low, clip_high: far smaller than for tokens, since the ratio is an average.
        sequence_ids: ``[n]`` which response a token belongs to; a response must not be cut over micro-batches.
        mask: ``[n]`` True on tokens that are learned from; others take no part in the ratio.

    Returns:
        ``[n]``; 0 outside the mask.

    Source: Zheng et al. 2025 (GSPO, arXiv 2507.18071), eq. 5 to 7 and, for the token form, eq. 13 and 14.
    """
    mask = mask.bool()
    held = torch.where(mask, logprobs, old_logprobs.detach())
    value = sequence_log_ratio(held.detach(), old_logprobs.detach(), sequence_ids, mask).exp()
    # exp(0) in value, the token's log-probability in gradient.
    ratio = value * torch.exp(held - held.detach())
    advantages = advantages.detach()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    return torch.where(mask, loss, 0.0)
