"""From losses per token to one number, with the denominators in the open.

Each function takes an optional ``total``: the denominator of the whole batch. With it, the sum over
micro-batches of the reduced losses is exactly the reduced loss of the batch, however it is cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["entropy_bonus", "masked_mean", "sequence_mean_token_mean", "sequence_mean_token_sum_norm"]


def _kept(x: Tensor, mask: Tensor) -> Tensor:
    if x.shape != mask.shape:
        raise ValueError(f"x {tuple(x.shape)} and mask {tuple(mask.shape)} must have one shape")
    # Not x * mask: an entry outside the mask may be infinite or NaN.
    return torch.where(mask.bool(), x, 0.0)


def masked_mean(x: Tensor, mask: Tensor, total: Tensor | float | None = None) -> Tensor:
    """Mean over masked entries; 0 where there are none. ``total`` counts the tokens of the whole batch."""
    kept = _kept(x, mask)
    denominator = mask.bool().sum() if total is None else torch.as_tensor(total)
    return kept.sum() / denominator.clamp(min=1)


def sequence_mean_token_mean(x_BT: Tensor, mask_BT: Tensor, total: Tensor | float | None = None) -> Tensor:
    """Mean over sequences of each one's token mean; sequences without tokens are in no denominator.

    ``total`` counts the non-empty sequences of the whole batch. Source: GRPO, Shao et al. 2024, eq. 3.
    """
    kept, mask = _kept(x_BT, mask_BT), mask_BT.bool()
    count = mask.sum(-1)
    means = kept.sum(-1) / count.clamp(min=1)
    denominator = (count > 0).sum() if total is None else torch.as_tensor(total)
    return means.sum() / denominator.clamp(min=1)


def sequence_mean_token_sum_norm(
    x_BT: Tensor, mask_BT: Tensor, length: float, total: Tensor | float | None = None
) -> Tensor:
    """Mean over sequences of each one's token sum over a constant ``length``.

    No sequence's weight depends on its own length. Source: Dr. GRPO, Liu et al. 2025 (arXiv 2503.20783).
    """
    if not length > 0:
        raise ValueError(f"length must be positive, got {length}")
    kept, mask = _kept(x_BT, mask_BT), mask_BT.bool()
    denominator = (mask.sum(-1) > 0).sum() if total is None else torch.as_tensor(total)
    return kept.sum() / (denominator.clamp(min=1) * length)


def entropy_bonus(entropy: Tensor, mask: Tensor, coef: float, total: Tensor | float | None = None) -> Tensor:
    """``-coef`` times the mean entropy: a loss term that keeps exploration alive."""
    return -coef * masked_mean(entropy, mask, total)
