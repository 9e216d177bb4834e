"""Rewards measured against frozen reference responses to the same prompt, and the counter-examples beside them.

All transforms come from one study of how a reward model's score should be shaped before RL: bounded, growing fast at
first and then converging slowly, and a function of the centred score. Source: Fu et al. 2025 (arXiv 2502.18770).

Shapes: ``B`` responses, each with ``M`` reference rewards (``M`` may differ between responses).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import ConfigError

__all__ = [
    "References",
    "centred",
    "fitted_sigmoid",
    "log_sigmoid_gaussian",
    "preference_probability",
    "reference_matrix",
    "relative",
    "slow_growth",
]

References = Tensor | np.ndarray | Sequence[Sequence[float] | Tensor | np.ndarray]
"""``[B, M]``, or one row of reference rewards per response."""


def preference_probability(rewards_B: Tensor, references: References, k: float = 1.0, max_refs: int = 10) -> Tensor:
    """``mean_m sigmoid(k (r - r_ref_m))``: the chance that the response beats a reference, by Bradley-Terry.

    It is 1/2 at parity and lies in [0, 1] (in (0, 1) but for rounding). The mean is of sigmoids, not inside one.

    Args:
        rewards_B: ``[B]`` scores of a Bradley-Terry reward model.
        references: scores of frozen reference responses to each prompt, by the same model.
        k: steepness, positive; an error e of a score moves the result by at most ``k e / 4``.
        max_refs: only so many references of each row are read, from the first on.

    Raises:
        ConfigError: k is not positive, ``max_refs`` below 1, or a response has no reference.
        ValueError: shapes do not fit, or a value is NaN or infinite.
    """
    _check_k(k)
    return relative(rewards_B, references, lambda z: torch.sigmoid(k * z), max_refs)


def centred(rewards_B: Tensor, references: References, max_refs: int = 10) -> Tensor:
    """``mean_m (r - r_ref_m)``: centred per prompt, unbounded; arguments and errors as above."""
    return relative(rewards_B, references, lambda z: z, max_refs)


def slow_growth(
    rewards_B: Tensor, references: References, k: float = 3.0, shift: float = 3.0, max_refs: int = 10
) -> Tensor:
    """``mean_m sigmoid(k (r - shift - r_ref_m))``: slow growth, fast convergence; the study's counter-example.

    The study draws it with k = 3 and leaves open which k its runs used; 3 is the default here.
    """
    _check_k(k)
    return relative(rewards_B, references, lambda z: torch.sigmoid(k * (z - shift)), max_refs)


def log_sigmoid_gaussian(rewards_B: Tensor, references: References, q: float = 0.85, max_refs: int = 10) -> Tensor:
    """``log sigmoid(r - q_ref)`` with the Gaussian quantile ``q_ref = mean + z_q (sd + 1e-5)`` of each row.

    This is the study's baseline; ``sd`` is the sample deviation, 0 where a row has one reference.
    :class:`guerdon.shaping.LogSigmoidCentered` is the transform of its own paper, with an empirical quantile.
    """
    if not 0.0 < q < 1.0:
        raise ConfigError(f"q must be strictly between 0 and 1, got {q}")
    rewards = _rewards(rewards_B)
    values, present = reference_matrix(references, len(rewards), max_refs, rewards)
    count = present.sum(1)
    mean = values.sum(1) / count
    squares = torch.where(present, (values - mean[:, None]) ** 2, 0.0).sum(1)
    deviation = (squares / (count - 1).clamp(min=1)).sqrt()
    threshold = mean + NormalDist().inv_cdf(q) * (deviation + 1e-5)
    return torch.nn.functional.logsigmoid(rewards - threshold).to(_out(rewards_B))


def relative(
    rewards_B: Tensor, references: References, function: Callable[[Tensor], Tensor], max_refs: int = 10
) -> Tensor:
    """``mean_m function(r - r_ref_m)`` for any elementwise function; ``[B]``.

    References are constants: no gradient flows into them.
    """
    rewards = _rewards(rewards_B)
    values, present = reference_matrix(references, len(rewards), max_refs, rewards)
    shaped = function(rewards[:, None] - values)
    return (torch.where(present, shaped, 0.0).sum(1) / present.sum(1)).to(_out(rewards_B))


@functools.cache
def _quintic() -> tuple[float, ...]:
    z = np.linspace(-5.0, 5.0, 100)
    return tuple(float(c) for c in np.polyfit(z, 1.0 / (1.0 + np.exp(-z)), 5))


def fitted_sigmoid(z: Tensor) -> Tensor:
    """The least-squares quintic to the sigmoid on 100 points of [-5, 5]; 0 for z <= -5 and 1 for z >= 5."""
    value = torch.zeros_like(z)
    inside = z.clamp(-5.0, 5.0)
    for c in _quintic():
        value = value * inside + c
    return torch.where(z <= -5, 0.0, torch.where(z >= 5, 1.0, value))


def reference_matrix(
    references: References | None, rows: int, max_refs: int = 10, like: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Reference rewards as ``[B, M]`` and which of them are there, ``[B, M]`` bool; absent ones are 0.

    Raises:
        ConfigError: there are no references at all, or none for some row, or ``max_refs`` is below 1.
        ValueError: another number of rows, a flat list, or a value that is NaN or infinite.
    """
    if isinstance(max_refs, bool) or not isinstance(max_refs, int) or max_refs < 1:
        raise ConfigError(f"max_refs must be an integer of at least 1, got {max_refs!r}")
    dtype, device = (like.dtype, like.device) if like is not None else (torch.float64, None)
    if references is None:
        raise ConfigError(
            "this shaping needs reference rewards and got none; score a few responses of the initial policy to each "
            "prompt with the same reward model and give them as ref_rewards (they are never taken to be 0)"
        )
    if len(references) != rows:
        raise ValueError(f"{len(references)} rows of reference rewards for {rows} rewards; give one row per reward")
    if isinstance(references, Tensor | np.ndarray) and references.ndim == 2 and references.shape[1]:
        whole = _row(references).to(dtype=dtype, device=device)[:, :max_refs]
        bad = torch.nonzero(~torch.isfinite(whole).all(1))
        if len(bad):
            raise ValueError(f"reference rewards of row {int(bad[0])} must be finite, got {whole[bad[0, 0]].tolist()}")
        return whole, torch.ones_like(whole, dtype=torch.bool)
    made = [_row(r) for r in references]
    for b, row in enumerate(made):
        if row.ndim != 1:
            raise ValueError(
                f"reference rewards of row {b} have shape {tuple(row.shape)}; give [B, M] or a list of B lists"
            )
        if not row.numel():
            raise ConfigError(f"row {b} has no reference rewards; sample at least one response to its prompt")
        if not bool(torch.isfinite(row).all()):
            raise ValueError(f"reference rewards of row {b} must be finite, got {row.tolist()}")
    made = [row[:max_refs] for row in made]
    width = max((row.numel() for row in made), default=0)
    values = torch.zeros((rows, width), dtype=dtype, device=device)
    present = torch.zeros((rows, width), dtype=torch.bool, device=device)
    for b, row in enumerate(made):
        values[b, : row.numel()] = row.to(values)
        present[b, : row.numel()] = True
    return values, present


def _row(row: object) -> Tensor:
    return torch.as_tensor(row).detach() if isinstance(row, Tensor) else torch.as_tensor(row, dtype=torch.float64)


def _rewards(rewards_B: Tensor) -> Tensor:
    """``[B]`` in at least float32; integers as float64."""
    rewards = rewards_B if isinstance(rewards_B, Tensor) else torch.as_tensor(np.asarray(rewards_B, dtype=np.float64))
    if rewards.ndim != 1:
        raise ValueError(f"rewards must be [B], got shape {tuple(rewards.shape)}")
    if not rewards.is_floating_point():
        rewards = rewards.double()
    if rewards.dtype in (torch.float16, torch.bfloat16):
        rewards = rewards.float()
    bad = int((~torch.isfinite(rewards)).sum())
    if bad:
        raise ValueError(f"{bad} of {rewards.numel()} rewards are NaN or infinite; leave such responses out first")
    return rewards


def _out(rewards_B: Tensor) -> torch.dtype:
    floating = isinstance(rewards_B, Tensor) and rewards_B.is_floating_point()
    return rewards_B.dtype if floating else torch.float64


def _check_k(k: float) -> None:
    if isinstance(k, bool) or not 0.0 < k < math.inf:
        raise ConfigError(f"k must be positive and finite, got {k!r}")
