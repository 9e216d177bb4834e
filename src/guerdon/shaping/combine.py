"""Several rewards into one: pure functions on torch tensors, one entry per trajectory (any shape)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from guerdon.errors import ConfigError
from guerdon.parts import part

__all__ = [
    "affine",
    "clip",
    "condition",
    "gate",
    "hierarchical",
    "linear_anneal",
    "product",
    "quantile_rescale",
    "signed_geometric_mean",
    "weighted_sum",
]


def hierarchical(
    format_B: Tensor, outcome_B: Tensor, cost_B: Tensor, alpha: float, *, gate_wrong: bool = True
) -> Tensor:
    """Format gate, then outcome, then cost.

    Args:
        format_B: ``[B]``; a negative entry is the whole reward.
        outcome_B: ``[B]`` in [0, 1].
        cost_B: ``[B]`` in [0, 1], 1 being the cheapest.
        alpha: weight of the cost in [0, 1].
        gate_wrong: pay the cost only where the outcome is not 0; False is the plain sum behind the format
            gate, as the paper writes it.

    Returns:
        ``[B]``: the format reward where negative; else 0 where the outcome is 0 (with ``gate_wrong``); else
        ``(1 - alpha) * outcome + alpha * cost``.

    Raises:
        ConfigError: alpha outside [0, 1].

    Source: Router-R1 (arXiv 2506.09033), released reward manager.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ConfigError(f"alpha must be in [0, 1], got {alpha}")
    if not format_B.shape == outcome_B.shape == cost_B.shape:
        raise ValueError(f"shapes differ: {tuple(format_B.shape)}, {tuple(outcome_B.shape)}, {tuple(cost_B.shape)}")
    paid = (1.0 - alpha) * outcome_B + alpha * cost_B
    if gate_wrong:
        paid = torch.where(outcome_B == 0, torch.zeros_like(paid), paid)
    return torch.where(format_B < 0, format_B.to(paid.dtype), paid)


def weighted_sum(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_k w_k x_k``."""
    if len(values) != len(weights) or not values:
        raise ValueError(f"{len(values)} values for {len(weights)} weights")
    return torch.stack([w * x for w, x in zip(weights, values, strict=True)]).sum(0)


def product(values: Sequence[Tensor]) -> Tensor:
    """``prod_k x_k``."""
    return torch.stack(list(values)).prod(0)


def signed_geometric_mean(values: Sequence[Tensor]) -> Tensor:
    """``(prod |x_k|)^(1/K)``, with the sign of the product; 0 where any factor is 0."""
    stacked = torch.stack(list(values))
    size = stacked.abs().clamp(min=torch.finfo(stacked.dtype).tiny).log().mean(0).exp()
    return stacked.sign().prod(0) * size


def gate(open_: Tensor, value: Tensor, closed: Tensor | float = 0.0) -> Tensor:
    """``value`` where ``open_``, ``closed`` elsewhere; what is not chosen may be NaN."""
    return torch.where(open_.bool(), value, torch.as_tensor(closed, dtype=value.dtype, device=value.device))


def condition(test: Tensor, threshold: float, above: Tensor, below: Tensor) -> Tensor:
    """``above`` where ``test >= threshold``, else ``below``."""
    return torch.where(test >= threshold, above, below)


@part("shape")
def affine(x: Tensor, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """``scale * x + shift``."""
    return scale * x + shift


@part("shape")
def clip(x: Tensor, low: float, high: float) -> Tensor:
    """``x`` held within [low, high]."""
    if not low <= high:
        raise ConfigError(f"low must not exceed high, got {low} and {high}")
    return x.clamp(low, high)


@part("shape")
def quantile_rescale(x: Tensor, low: float = 0.05, high: float = 0.95) -> Tensor:
    """Map the ``low`` and ``high`` quantiles of ``x`` to 0 and 1, clipped; 0.5 where they coincide."""
    if not 0 <= low < high <= 1:
        raise ConfigError(f"low and high must be increasing quantiles in [0, 1], got {low} and {high}")
    a, b = torch.quantile(x, torch.tensor([low, high], dtype=x.dtype, device=x.device))
    if b - a < 1e-8:
        return torch.full_like(x, 0.5)
    return ((x - a) / (b - a)).clamp(0, 1)


def linear_anneal(step: int, steps: int, start: float, end: float) -> float:
    """From ``start`` at step 0 to ``end`` at ``steps``, constant afterwards."""
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    return start + (end - start) * min(max(step, 0) / steps, 1.0)
