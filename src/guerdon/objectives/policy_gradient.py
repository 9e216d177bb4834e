"""Policy objectives per token: clipped ratios and importance weights. Pure functions, nothing is reduced."""

from __future__ import annotations

import torch
from torch import Tensor

from guerdon.parts import part

__all__ = ["MAX_LOG_RATIO", "cispo", "log_ratio", "ppo_clip", "reinforce", "truncated_importance_weight"]

MAX_LOG_RATIO = 20.0
"""Log-ratios beyond this are held, so that no exponential overflows; such tokens are far outside any clip range."""


def log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """``log pi - log pi_old``, held within :data:`MAX_LOG_RATIO`."""
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


@part("objective")
def ppo_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    *,
    dual_clip: float | None = None,
) -> Tensor:
    """Clipped surrogate loss of each token, to be minimised.

    ``-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)``, where the ratio is that of the current
    to the old probability.

    Args:
        logprobs: of the chosen tokens under the current policy, any shape.
        old_logprobs: under the policy that is stepped away from; same shape, a constant of the loss.
        advantages: same shape, a constant of the loss.
        clip_low: half-width of the range below 1.
        clip_high: half-width above 1, ``clip_low`` by default. A larger one leaves rare tokens room to grow
            (DAPO's asymmetric clip).
        dual_clip: above 1, bounds the loss of negative advantages at ``-dual_clip * A``.

    Returns:
        Loss of the same shape.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7; Yu et al. 2025 (arXiv 2503.14476); Ye et al. 2020
    (arXiv 1912.09729) for the dual clip.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must exceed 1, got {dual_clip}")
    high = clip_low if clip_high is None else clip_high
    advantages = advantages.detach()
    ratio = log_ratio(logprobs, old_logprobs.detach()).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + high) * advantages)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss


@part("objective")
def reinforce(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """``-A * log pi`` of each token: the plain policy gradient, right for tokens of the present policy alone.

    Args:
        logprobs: of the chosen tokens under the current policy, any shape.
        old_logprobs: not read; every objective has the same three first arguments.
        advantages: same shape as ``logprobs``, a constant of the loss.

    Source: Williams 1992.
    """
    return -advantages.detach() * logprobs


@part("objective")
def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> Tensor:
    """``-sg(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * log pi`` of each token: the weight is clipped, not the token.

    Where PPO's clip takes a token out of the gradient, here it keeps its gradient at a bounded weight.

    Args:
        logprobs, old_logprobs, advantages: as for :func:`ppo_clip`.
        clip_low: 1 for no lower bound, as in the paper.
        clip_high: the weight is at most ``1 + clip_high``.

    Source: CISPO, MiniMax 2025 (MiniMax-M1, arXiv 2506.13585), eq. 4 and 5; it states no upper bound, and 5 is what
    later studies of it found to be uncritical.
    """
    weight = log_ratio(logprobs.detach(), old_logprobs.detach()).exp().clamp(1 - clip_low, 1 + clip_high)
    return -weight * advantages.detach() * logprobs


def truncated_importance_weight(logprobs: Tensor, sampling_logprobs: Tensor, cap: float = 2.0) -> Tensor:
    """``min(pi / mu, cap)``, without gradient: corrects for a sampler that differs from the trainer.

    Source: Espeholt et al. 2018 (arXiv 1802.01561).
    """
    if not cap > 0:
        raise ValueError(f"cap must be positive, got {cap}")
    return log_ratio(logprobs, sampling_logprobs).exp().clamp(max=cap).detach()
