"""Reasoning reflection: how much a trace makes the reference likely, on the reference tokens that depend on the trace.

``L[i, j]`` is the log-probability of reference token j behind trace i. Most reference tokens are as likely under every
trace and dilute their sum; those whose log-probability varies over the traces say which trace reasoned well.

Everything here is a constant of the loss: no gradient flows into the scoring policy, the deviations or the weights.

Source: Xu et al. 2025, "Direct Reasoning Optimization" (arXiv 2506.13351, first version). It fixes the weight of a token
only as non-decreasing in its deviation; the default, the deviation over the sum of deviations, is a choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import ConfigError

__all__ = ["R3Filter", "ReasoningReflection", "outcome_length_reward", "reflection_weights"]

Weight = Literal["std", "threshold", "power", "uniform"]


def _matrix(L_GT: Tensor, valid_G: Tensor | None) -> tuple[Tensor, Tensor]:
    if L_GT.ndim != 2 or not L_GT.shape[1]:
        raise ValueError(f"log-probabilities must be [G, T] with at least one reference token, got {tuple(L_GT.shape)}")
    values = L_GT.detach().double()
    valid = torch.ones(len(values), dtype=torch.bool, device=values.device) if valid_G is None else valid_G.bool()
    if valid.shape != values.shape[:1]:
        raise ValueError(f"valid {tuple(valid.shape)} must be [G] with G = {len(values)}")
    values = torch.where(valid[:, None], values, 0.0)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("log-probabilities of valid traces must be finite; clamp them, or mark such traces invalid")
    return values, valid


def deviations(L_GT: Tensor, valid_G: Tensor | None = None, *, floor: float | None = None) -> Tensor:
    """``[T]`` float64: population standard deviation of each token's log-probability over the valid traces.

    Args:
        L_GT: ``[G, T]``.
        valid_G: ``[G]``; traces without an end of reasoning are not valid.
        floor: log-probabilities below it are held there first, so that one absurd token does not own all the weight.
    """
    values, valid = _matrix(L_GT, valid_G)
    chosen = values[valid]
    if floor is not None:
        chosen = chosen.clamp(min=floor)
    return chosen.std(0, correction=0) if len(chosen) else values.new_zeros(values.shape[1])


def reflection_weights(
    L_GT: Tensor,
    valid_G: Tensor | None = None,
    weight: Weight = "std",
    *,
    power: float = 2.0,
    quantile: float = 0.9,
    floor: float | None = None,
) -> Tensor:
    """``[T]`` float64 weights of the reference tokens, non-negative, summing to 1.

    Args:
        L_GT, valid_G, floor: see :func:`deviations`.
        weight: ``"std"`` (proportional to the deviation), ``"power"`` (to its ``power``), ``"threshold"`` (equal for tokens
            whose deviation is at least the ``quantile``), ``"uniform"`` (the aggregate likelihood).

    Where no deviation is above 0 all tokens weigh the same.
    """
    sigma = deviations(L_GT, valid_G, floor=floor)
    # Equal log-probabilities may deviate by rounding.
    flat = bool(sigma.max() <= 1e-9)
    if weight == "uniform" or flat:
        raw = torch.ones_like(sigma)
    elif weight == "std":
        raw = sigma
    elif weight == "power":
        raw = (sigma / sigma.max()) ** power
    elif weight == "threshold":
        raw = (sigma >= torch.quantile(sigma, quantile)).double()
    else:
        raise ConfigError(f"weight must be std, threshold, power or uniform, got {weight!r}")
    return raw / raw.sum()


class ReasoningReflection:
    """The reward of each trace of a group: ``R3_i = sum_j w_j (L[i, j] - M[j])``.

    Args:
        weight: see :func:`reflection_weights`.
        baseline: ``"masked"`` subtracts M, the log-probabilities behind masked reasoning, where it is given. M and w are
            shared by the group, so this shifts all rewards of a group alike and cancels in group-relative advantages; it
            matters for reported values, sums with other rewards, and filters.
        propagation: ``gamma`` of the variant in which a poorly predicted reflective token discounts the tokens behind it:
            ``P_k(j) = p_k + (1 - p_k)(1 - exp(-gamma (j - k)))``, with M left out; None for the plain sum.
        power, quantile, floor: of the weights; ``quantile`` also chooses the reflective tokens of the variant.
    """

    def __init__(
        self,
        weight: Weight = "std",
        baseline: Literal["masked"] | None = "masked",
        propagation: float | None = None,
        *,
        power: float = 2.0,
        quantile: float = 0.9,
        floor: float | None = None,
    ) -> None:
        if weight not in ("std", "threshold", "power", "uniform"):
            raise ConfigError(f"weight must be std, threshold, power or uniform, got {weight!r}")
        if baseline not in ("masked", None):
            raise ConfigError(f"baseline must be 'masked' or None, got {baseline!r}")
        if propagation is not None and not 0 < propagation < math.inf:
            raise ConfigError(f"propagation must be a positive rate or None, got {propagation!r}")
        if not 0 < power < math.inf or not 0 <= quantile < 1:
            raise ConfigError(f"power must be positive and quantile in [0, 1), got {power} and {quantile}")
        if floor is not None and not floor < 0:
            raise ConfigError(f"floor must be a negative log-probability or None, got {floor!r}")
        self.weight, self.baseline, self.propagation = weight, baseline, propagation
        self.power, self.quantile, self.floor = power, quantile, floor

    def weights_(self, L: Tensor, valid: Tensor | None = None) -> Tensor:
        """``[T]`` weights of this group's reference tokens."""
        return reflection_weights(L, valid, self.weight, power=self.power, quantile=self.quantile, floor=self.floor)

    def __call__(self, L: Tensor, M: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """``[G]`` float64 rewards; NaN for invalid traces, and for all where fewer than two are valid.

        Args:
            L: ``[G, T]``.
            M: ``[T]``, or ``[G, T]`` where the masked context differs by trace.
            valid: ``[G]``.
        """
        values, ok = _matrix(L, valid)
        missing = torch.full((len(values),), math.nan, dtype=torch.float64, device=values.device)
        if int(ok.sum()) < 2:
            return missing
        w = self.weights_(L, valid)
        if self.propagation is not None:
            values = values + self._discount(values, ok)
        elif self.baseline == "masked" and M is not None:
            masked = M.detach().double()
            if masked.shape not in (values.shape, values.shape[1:]):
                raise ValueError(f"M {tuple(masked.shape)} must be [T] or [G, T] with T = {values.shape[1]}")
            values = values - masked
        return torch.where(ok, values @ w, missing)

    def _discount(self, values: Tensor, ok: Tensor) -> Tensor:
        """``[G, T]`` sum over reflective tokens k < j of ``log P_k(j)``."""
        assert self.propagation is not None
        sigma = deviations(values, ok, floor=self.floor)
        out = torch.zeros_like(values)
        if bool(sigma.max() <= 1e-9):
            return out
        T = values.shape[1]
        positions = torch.arange(T, device=values.device)
        for k in torch.nonzero(sigma >= torch.quantile(sigma, self.quantile)).flatten().tolist():
            p = values[:, k].exp().clamp(max=1.0)[:, None]
            distance = (positions[k + 1 :] - k).double()
            factor = p + (1 - p) * (1 - torch.exp(-self.propagation * distance))
            out[:, k + 1 :] += factor.clamp(min=torch.finfo(torch.float64).tiny).log()
        return out


def outcome_length_reward(n_out: Sequence[int] | np.ndarray, n_ref: int, beta: float = 1.0) -> np.ndarray:
    """``1 - beta |n_ref - n_out| / n_ref`` per response, unclipped: of the final outcome alone, not of the reasoning.

    Args:
        n_out: ``[G]`` tokens of each response's outcome.
        n_ref: tokens of the reference.
        beta: weight.

    Raises:
        ValueError: a reference without tokens.
    """
    if n_ref < 1:
        raise ValueError(f"the reference must have at least one token, got {n_ref}")
    return 1.0 - beta * np.abs(n_ref - np.asarray(n_out, dtype=np.float64)) / n_ref


class R3Filter:
    """Chooses questions that can be learned from, by the same log-probabilities; run before training and now and then.

    Too hard: even the best trace leaves the least expected ``rho`` of the reference tokens, on average, outside the
    ``top_k`` predictions. Too easy: the largest deviation of any token is among the smallest ``drop_fraction``.

    Args:
        rho: share of the tokens with the largest ranks.
        top_k: largest mean rank that is kept.
        drop_fraction: of the questions that pass the first stage.
        carry: share of the round before that is kept along.
        seed: of the draw of those.
    """

    def __init__(
        self, rho: float = 0.1, top_k: float = 50, drop_fraction: float = 0.2, carry: float = 0.1, *, seed: int = 0
    ) -> None:
        if not 0 < rho <= 1 or not top_k >= 1:
            raise ConfigError(f"rho must be in (0, 1] and top_k at least 1, got {rho} and {top_k}")
        if not 0 <= drop_fraction < 1 or not 0 <= carry <= 1:
            raise ConfigError(f"drop_fraction must be in [0, 1) and carry in [0, 1], got {drop_fraction} and {carry}")
        self.rho, self.top_k, self.drop_fraction, self.carry, self.seed = rho, top_k, drop_fraction, carry, seed

    def hardness(self, ranks_GT: Tensor) -> float:
        """Smallest over traces of the mean of the ``rho`` largest ranks (1 is the most likely token)."""
        n = max(1, math.ceil(self.rho * ranks_GT.shape[1] - 1e-9))
        return float(ranks_GT.double().topk(n, dim=1).values.mean(1).min())

    def select(
        self,
        L: Sequence[Tensor],
        ranks: Sequence[Tensor],
        question_ids: Sequence[str],
        previous: Sequence[str] = (),
        valid: Sequence[Tensor | None] | None = None,
    ) -> np.ndarray:
        """Indices into ``question_ids`` that are trained on, ascending.

        Args:
            L, ranks: per question ``[G, T]``.
            question_ids: names.
            previous: names of the round before, some of which are carried along.
            valid: per question ``[G]``; a question with fewer than two valid traces is dropped.

        Raises:
            ValueError: lists of different lengths.
        """
        if not len(L) == len(ranks) == len(question_ids):
            raise ValueError(f"{len(L)} matrices, {len(ranks)} ranks and {len(question_ids)} ids: give one of each")
        kept: list[tuple[float, int]] = []
        for k, (matrix, rank) in enumerate(zip(L, ranks, strict=True)):
            ok = torch.ones(len(matrix), dtype=torch.bool) if valid is None or valid[k] is None else valid[k].bool()  # type: ignore[union-attr]
            if int(ok.sum()) >= 2 and self.hardness(rank[ok]) <= self.top_k:
                kept.append((float(deviations(matrix, ok).max()), k))
        kept.sort(key=lambda item: (-item[0], item[1]))
        chosen = {k for _, k in kept[: len(kept) - int(self.drop_fraction * len(kept))]}
        old = [k for k, name in enumerate(question_ids) if name in set(previous)]
        n = round(self.carry * len(old))
        chosen |= set(np.random.default_rng(self.seed).choice(old, n, replace=False).tolist()) if n else set()
        return np.array(sorted(chosen), dtype=np.int64)
