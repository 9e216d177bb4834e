"""Progress: what a step changed about the chance of success, under a prover that need not be the policy itself.

Values are those of prefixes: ``values[0]`` of the prompt, ``values[h]`` after step h. The progress of step h is
``values[h] - values[h - 1]``. It telescopes, so as a reward in a return-to-go it cancels to a baseline; it is used as a
weight of its own step (:func:`progress_weights`).

Source: Setlur et al. 2024 (arXiv 2410.08146).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["best_of_k_value", "effective_reward", "progress", "progress_weights", "prover_terms"]


def best_of_k_value(q: Tensor | float, k: float) -> Tensor:
    """``1 - (1 - q) ** k``: the chance that the best of k tries succeeds, where one does with chance ``q``.

    Args:
        q: any shape, in [0, 1]; NaN (a value that is missing) stays NaN.
        k: tries, at least 1. ``k = 1`` gives ``q``; with k large every prefix that is not hopeless looks the same.

    Returns:
        The shape and dtype of ``q`` (float32 for integers).

    Raises:
        ValueError: k below 1 or not finite, or a q outside [0, 1].
    """
    if not (k >= 1 and math.isfinite(k)):
        raise ValueError(f"k must be at least 1 and finite, got {k}")
    values = torch.as_tensor(q)
    values = values if values.is_floating_point() else values.float()
    # Sums of probabilities leave the interval by rounding.
    slack = 8 * torch.finfo(values.dtype).eps
    if bool(((values < -slack) | (values > 1 + slack)).any()):
        raise ValueError("q must be in [0, 1]")
    values = values.clamp(0, 1)
    # Written with logarithms, small values do not lose their digits.
    return values if k == 1 else -torch.expm1(k * torch.log1p(-values))


def progress(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The change of value by each step: ``[S + 1]`` to ``[S]``, or ``[B, S + 1]`` to ``[B, S]``.

    Args:
        values: ``values[..., 0]`` is that of the prompt, ``values[..., h]`` that after step h.
        mask: same shape, True where there is a value, in the first columns of a row. Nothing is subtracted across the
            end of a response.

    Returns:
        Differences; NaN where one of the two values is missing (NaN), 0 behind the last step.

    Raises:
        ValueError: no value at all (the prompt's is needed), another rank, or a mask with gaps.
    """
    if values.ndim not in (1, 2) or values.shape[-1] == 0:
        raise ValueError(f"values must be [S + 1] or [B, S + 1] and begin with the prompt's, got {tuple(values.shape)}")
    out = values[..., 1:] - values[..., :-1]
    if mask is None:
        return out
    if mask.shape != values.shape:
        raise ValueError(f"mask {tuple(mask.shape)} must have the shape of values {tuple(values.shape)}")
    kept = mask.bool()
    if bool((kept[..., 1:] & ~kept[..., :-1]).any()):
        raise ValueError("a row's values must lie in its first columns; gather them to the left")
    return torch.where(kept[..., 1:], out, 0.0)


def effective_reward(q_policy: Tensor, advantages: Tensor, alpha: float) -> Tensor:
    """``E = Q^pi + alpha * A^mu``: what a step is worth to a policy with a prover beside it. Same shapes.

    Raises:
        ValueError: shapes differ, or alpha is negative or not finite.
    """
    _alpha(alpha)
    if q_policy.shape != advantages.shape:
        raise ValueError(f"q_policy {tuple(q_policy.shape)} and advantages {tuple(advantages.shape)} must agree")
    return q_policy + alpha * advantages


def progress_weights(
    outcome: Tensor,
    advantages: Tensor,
    baseline: Tensor | float = 0.0,
    alpha: float = 0.5,
    mask: Tensor | None = None,
) -> Tensor:
    """Weight of each step's log-probability: ``outcome - baseline + alpha * A^mu``, the step's own advantage only.

    Args:
        outcome: ``[B]`` of each response, or a scalar for one response.
        advantages: ``[B, S]`` (or ``[S]``) prover advantages; constants. A missing one (NaN: no rollout) adds nothing.
        baseline: ``[B]`` or a number.
        alpha: at least 0.
        mask: True on steps; all by default.

    Returns:
        The shape of ``advantages``, 0 outside the mask.

    Raises:
        ValueError: alpha is negative or not finite, or shapes differ.
    """
    _alpha(alpha)
    a = advantages.detach()
    if a.ndim not in (1, 2):
        raise ValueError(f"advantages must be [S] or [B, S], got {tuple(a.shape)}")
    kept = torch.ones_like(a, dtype=torch.bool) if mask is None else mask.bool()
    if kept.shape != a.shape:
        raise ValueError(f"mask {tuple(kept.shape)} must have the shape of advantages {tuple(a.shape)}")
    dtype = a.dtype if a.is_floating_point() else torch.float32
    base = torch.as_tensor(outcome, device=a.device).detach().to(dtype) - torch.as_tensor(baseline, device=a.device).to(
        dtype
    )
    if base.ndim == 1 and a.ndim == 2 and len(base) == len(a):
        base = base[:, None]
    elif base.ndim != 0:
        raise ValueError(f"outcome minus baseline has shape {tuple(base.shape)} for advantages {tuple(a.shape)}")
    bonus = torch.where(a.isnan(), 0.0, a.to(dtype))
    return torch.where(kept, base + alpha * bonus, 0.0)


def prover_terms(policy: Tensor, prover_advantages: Tensor, policy_advantages: Tensor) -> tuple[Tensor, Tensor]:
    """What makes a prover good at a state: distinguishability and alignment, each ``[...]``.

    A natural-gradient step on ``Q^pi + alpha A^mu`` improves the policy by at least (up to constants) its step size times
    ``alpha`` times the mean over states of the sum of the two.

    Args:
        policy: ``[..., A]`` probabilities of the policy's own actions.
        prover_advantages, policy_advantages: ``[..., A]`` ``A^mu`` and ``A^pi`` of these actions.

    Returns:
        Variance of ``A^mu`` under the policy, and mean of ``A^mu A^pi`` under it.

    Source: Setlur et al. 2024, theorem 3.1.
    """
    if not policy.shape == prover_advantages.shape == policy_advantages.shape:
        raise ValueError("policy and both advantages must have one shape [..., A]")
    mean = (policy * prover_advantages).sum(-1)
    variance = (policy * prover_advantages**2).sum(-1) - mean**2
    return variance.clamp(min=0), (policy * prover_advantages * policy_advantages).sum(-1)


def _alpha(alpha: float) -> None:
    if not (alpha >= 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be at least 0 and finite, got {alpha}")
