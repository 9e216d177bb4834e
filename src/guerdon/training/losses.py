"""The loss of one micro-batch: objective terms over streams, each already weighted by its own token count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guerdon.objectives import kl_k1, kl_k2, kl_k3, ppo_clip, value_clip_loss

if TYPE_CHECKING:
    from guerdon.training.config import OnlineConfig

__all__ = ["KL", "Slice", "policy_terms", "value_term"]

KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


@dataclass(frozen=True, slots=True)
class Slice:
    """Streams of the n tokens of one micro-batch; weights are normalised over the whole minibatch.

    Args:
        old, advantage, sampled: [n].
        policy, entropy, kl, value: [n] weights of the terms; None where a term is off.
        reference, target, values: [n]; None where the term that reads them is off.
    """

    old: Tensor
    advantage: Tensor
    sampled: Tensor
    policy: Tensor
    entropy: Tensor | None = None
    kl: Tensor | None = None
    value: Tensor | None = None
    reference: Tensor | None = None
    target: Tensor | None = None
    values: Tensor | None = None


def policy_terms(
    logprobs: Tensor, entropy: Tensor | None, part: Slice, config: OnlineConfig, entropy_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy loss, minus the entropy bonus, plus the KL penalty.

    Args:
        logprobs, entropy: [n] of the policy being trained; entropy only where its coefficient is positive.
        part: the streams of these tokens.
        config: clip range and KL.
        entropy_coef: at this step.

    Returns:
        The scalar loss of these tokens, and detached scalars that add up over micro-batches. Those under
        ``n/`` are plain sums over tokens.
    """
    learned = part.policy != 0
    # Where nothing is learned the ratio is made 1: an infinite one times a weight of 0 would be NaN.
    term = ppo_clip(
        torch.where(learned, logprobs, part.old), part.old, part.advantage, config.clip_low, config.clip_high
    )
    policy_loss = (part.policy * term).sum()
    loss = policy_loss
    stats = {"loss/policy": policy_loss.detach()}
    if entropy is not None and part.entropy is not None:
        mean = (part.entropy * entropy.float()).sum()
        loss = loss - entropy_coef * mean
        stats["entropy/bonus"] = mean.detach()
    if part.reference is not None and part.kl is not None:
        mean = (part.kl * KL[config.kl_kind](logprobs, part.reference)).sum()
        loss = loss + config.kl_coef * mean
        stats["kl"] = mean.detach()
    with torch.no_grad():
        change = torch.where(learned, logprobs - part.old, 0.0)
        ratio = change.exp()
        up = (ratio > 1 + config.clip_high) & (part.advantage > 0)
        down = (ratio < 1 - config.clip_low) & (part.advantage < 0)
        stats["n/tokens"] = learned.sum()
        stats["n/clipped"] = ((up | down) & learned).sum()
        stats["n/kl_old"] = (ratio - 1 - change).sum()
    return loss, stats


def value_term(values: Tensor, part: Slice, config: OnlineConfig) -> Tensor:
    """Value loss of these tokens: squared error, clipped around the values at sampling; a scalar.

    Source: Schulman et al. 2017; PPO implementations clip the value as they clip the ratio.
    """
    assert part.value is not None and part.target is not None and part.values is not None
    return (part.value * value_clip_loss(values, part.values, part.target, config.value_clip)).sum()
