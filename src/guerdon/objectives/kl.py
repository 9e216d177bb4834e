"""Per-token estimators of KL(policy || reference) from tokens that the policy sampled.

With ``d = log pi - log ref``: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. Their values estimate the KL (k1 and
k3 without bias). As losses they differ: the gradient of k1 is zero in expectation, so k1 belongs into the
reward; that of k2 is the KL's; that of k3 is the reverse direction's near 0.

Source: Schulman, "Approximating KL divergence", 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor

from guerdon.objectives.policy_gradient import log_ratio

__all__ = ["kl_estimate", "kl_k1", "kl_k2", "kl_k3", "kl_penalised_rewards"]


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """``d``; unbiased, high variance, may be negative."""
    return logprobs - reference_logprobs


def kl_k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """``d^2 / 2``; biased, never negative, right gradient."""
    return 0.5 * (logprobs - reference_logprobs) ** 2


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """``exp(-d) - 1 + d``; unbiased, never negative."""
    d = log_ratio(logprobs, reference_logprobs)
    return torch.exp(-d) - 1 + d


_KINDS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, kind: str = "k3") -> Tensor:
    """The estimator ``kind`` of each token."""
    if kind not in _KINDS:
        raise ValueError(f"kind must be k1, k2 or k3, got {kind!r}")
    return _KINDS[kind](logprobs, reference_logprobs)


def kl_penalised_rewards(
    rewards: Tensor, logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, coef: float, kind: str = "k1"
) -> Tensor:
    """Rewards minus ``coef`` times the KL estimate on masked tokens; elsewhere the rewards as they are.

    Source: Router-R1's released trainer uses k1 and ``coef`` 0.001 on policy tokens only.
    """
    penalty = kl_estimate(logprobs, reference_logprobs, kind).detach()
    return torch.where(mask.bool(), rewards - coef * penalty, rewards)
