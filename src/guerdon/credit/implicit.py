"""Rewards of tokens and steps from a ratio of likelihoods: the partial sums of an outcome reward are its prefix values.

Write ``r(y) = beta * sum_t log[pi(y_t) / ref(y_t)]``. Then ``q_t``, the sum up to token ``t``, is exactly
``beta * log E_{y ~ ref(. | y_<=t)} exp(r(y) / beta)`` for any ``pi``: a soft expectation of the outcome from the
prefix, between its mean (large beta) and its maximum (small beta). Differences of ``q`` are process rewards.

Source: Yuan et al. 2024 (arXiv 2412.01981), proposition 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

__all__ = ["implicit_rewards", "prefix_values", "reduce_steps", "soft_expectation"]

Reduce = Literal["min", "sum", "mean"]


def implicit_rewards(
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    beta: float,
    step_ends: Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
) -> Tensor | list[Tensor]:
    """``beta`` times the log-ratio of each token, or its sums over steps.

    Args:
        logp: ``[B, T]`` or ``[T]`` log-probability of each token under the trained model. Entry ``t`` belongs to
            token ``t`` (it comes from the logits at position ``t - 1``). Gradients flow through it.
        ref_logp: the same under the reference; a constant.
        mask: same shape, True on the response's own tokens: no prompt, no padding, nothing that an environment said;
            the end token counts. What lies outside may be NaN.
        beta: above 0.
        step_ends: for each row the position of every step's last token, rising (its separator included: it belongs
            to the step that it closes). An empty row means a response without separators, which is one step.
            Tokens behind the last end belong to no step. A tensor ``[B, S]`` is padded with -1.

    Returns:
        Without ``step_ends``, token rewards of the input's shape, 0 outside the mask. With them, one tensor per row
        ``[steps]`` (for ``[T]`` inputs just that tensor) of differences of prefix values: over ends that reach the
        last token they sum to ``r(y)``. A row without tokens has no steps. Half precision is widened to float32.

    Raises:
        ValueError: shapes differ, beta is not positive, or ends are outside the row or do not rise.
    """
    if not logp.shape == ref_logp.shape == mask.shape or logp.ndim not in (1, 2):
        raise ValueError(
            "logp, ref_logp and mask must have one shape, [B, T] or [T], got "
            f"{tuple(logp.shape)}, {tuple(ref_logp.shape)} and {tuple(mask.shape)}"
        )
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be positive and finite, got {beta}")
    kept = mask.bool()
    # Chosen before subtracting: NaN and -inf outside the mask must reach neither value nor gradient.
    ratio = _wide(torch.where(kept, logp, 0.0)) - _wide(torch.where(kept, ref_logp, 0.0)).detach()
    rewards = beta * ratio
    if step_ends is None:
        return rewards
    if logp.ndim == 1:
        return _over_steps(rewards, kept, step_ends, "step_ends")  # type: ignore[arg-type]
    if len(step_ends) != len(logp):
        raise ValueError(f"step_ends has {len(step_ends)} rows for {len(logp)} responses")
    return [
        _over_steps(rewards[b], kept[b], step_ends[b], f"step_ends[{b}]")  # type: ignore[arg-type]
        for b in range(len(logp))
    ]


def prefix_values(rewards: Tensor, mask: Tensor) -> Tensor:
    """``q_t``: the sum of token rewards up to and including each position.

    Args:
        rewards: ``[..., T]`` token rewards.
        mask: same shape; only its positions are summed. Elsewhere the value of the position before is repeated.

    Raises:
        ValueError: shapes differ.
    """
    if rewards.shape != mask.shape:
        raise ValueError(f"rewards {tuple(rewards.shape)} and mask {tuple(mask.shape)} must have one shape")
    return torch.where(mask.bool(), rewards, 0.0).cumsum(-1)


def reduce_steps(steps: Sequence[Tensor], reduce: Reduce = "min") -> Tensor:
    """One score per response from its steps' values, ``[B]``.

    Args:
        steps: one ``[S]`` tensor per response, of any lengths. Nothing is padded: a zero is a value like any other.
        reduce: ``"min"`` (a chain is as good as its worst step), ``"sum"`` or ``"mean"``. A response without steps
            scores 0.

    Raises:
        ValueError: an unknown ``reduce``.
    """
    how: dict[str, Callable[[Tensor], Tensor]] = {"min": torch.min, "sum": torch.sum, "mean": torch.mean}
    if reduce not in how:
        raise ValueError(f"reduce must be min, sum or mean, got {reduce!r}")
    if not steps:
        return torch.zeros(0)
    return torch.stack([how[reduce](s) if len(s) else s.new_zeros(()) for s in steps])


def soft_expectation(values: Tensor, beta: float, logprobs: Tensor | None = None) -> Tensor:
    """``beta * log E exp(value / beta)`` over the last axis.

    Args:
        values: ``[..., n]`` outcomes, for example of continuations of one prefix.
        beta: above 0. It tends to the mean for large beta and to the maximum for small beta.
        logprobs: ``[..., n]`` log-probability of each outcome, which should sum to one; by default each counts the
            same, as samples do.

    Raises:
        ValueError: beta is not positive, there is nothing to average, or shapes differ.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"there is no outcome to average over in values of shape {tuple(values.shape)}")
    if logprobs is None:
        return beta * (torch.logsumexp(values / beta, -1) - math.log(values.shape[-1]))
    if logprobs.shape != values.shape:
        raise ValueError(f"values {tuple(values.shape)} and logprobs {tuple(logprobs.shape)} must have one shape")
    return beta * torch.logsumexp(values / beta + logprobs, -1)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _over_steps(rewards_T: Tensor, mask_T: Tensor, ends: Sequence[int] | Tensor, name: str) -> Tensor:
    positions = [e for e in ends.tolist() if e != -1] if isinstance(ends, Tensor) else [int(e) for e in ends]
    length = len(rewards_T)
    if positions and (min(positions) < 0 or max(positions) >= length):
        raise ValueError(f"{name} must lie in [0, {length}), got {positions}")
    if any(b <= a for a, b in pairwise(positions)):
        raise ValueError(f"{name} must rise, so that every step has a token, got {positions}")
    if not bool(mask_T.any()):
        return rewards_T.new_zeros(0)
    if not positions:
        return rewards_T.sum()[None]
    q = rewards_T.cumsum(0)[positions]
    return q - torch.cat([q.new_zeros(1), q[:-1]])
