"""Losses that make a log-ratio reward agree with outcomes: one entry per response or pair, nothing is reduced.

The rewards are ``r(y) = beta * sum_t log[pi(y_t) / ref(y_t)]``, summed over the response's tokens, never averaged.

Source: Yuan et al. 2024 (arXiv 2412.01981), section 3.2. The published cross-entropy lacks its minus sign.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["implicit_ce", "implicit_dpo", "implicit_kto", "implicit_nca"]


def implicit_ce(rewards_B: Tensor, labels_B: Tensor, *, soft: bool = False) -> Tensor:
    """Binary cross-entropy of ``sigmoid(r)``: ``-l log sigmoid(r) - (1 - l) log(1 - sigmoid(r))``, ``[B]``.

    ``ln 2`` where the model still equals its reference.

    Args:
        rewards_B: ``[B]``.
        labels_B: ``[B]`` 0 or 1; with ``soft``, anything between (a share of tests that passed).

    Raises:
        ValueError: shapes differ, or a label is out of range.
    """
    _same(rewards_B, labels_B)
    _check_labels(labels_B, soft)
    return F.binary_cross_entropy_with_logits(rewards_B, labels_B.to(rewards_B.dtype), reduction="none")


def implicit_dpo(better_P: Tensor, worse_P: Tensor) -> Tensor:
    """``-log sigmoid(r_w - r_l)`` for each pair of a right and a wrong response to one prompt, ``[P]``.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.
    """
    _same(better_P, worse_P)
    return -F.logsigmoid(better_P - worse_P)


def implicit_nca(better_P: Tensor, worse_P: Tensor) -> Tensor:
    """``-[log sigmoid(r_w) + 0.5 log sigmoid(-r_w) + 0.5 log sigmoid(-r_l)]`` for each pair, ``[P]``.

    Source: Chen et al. 2024 (arXiv 2402.05369), with two responses.
    """
    _same(better_P, worse_P)
    return -(F.logsigmoid(better_P) + 0.5 * F.logsigmoid(-better_P) + 0.5 * F.logsigmoid(-worse_P))


def implicit_kto(
    rewards_B: Tensor,
    labels_B: Tensor,
    reference_point: Tensor | float = 0.0,
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """``w_d (1 - sigmoid(r - z0))`` for right responses, ``w_u (1 - sigmoid(z0 - r))`` for wrong ones, ``[B]``.

    Args:
        rewards_B: ``[B]``.
        labels_B: ``[B]`` 0 or 1.
        reference_point: the mean reward of responses to other prompts (an estimate of beta times the KL to the
            reference); a constant, and 0 where it is negative.
        desirable_weight, undesirable_weight: of the two kinds.

    Raises:
        ValueError: shapes differ, or a label is neither 0 nor 1.

    Source: Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 8.
    """
    _same(rewards_B, labels_B)
    _check_labels(labels_B, soft=False)
    z0 = torch.as_tensor(reference_point, dtype=rewards_B.dtype, device=rewards_B.device).detach().clamp(min=0)
    right = desirable_weight * torch.sigmoid(z0 - rewards_B)
    wrong = undesirable_weight * torch.sigmoid(rewards_B - z0)
    return torch.where(labels_B == 1, right, wrong)


def _same(a: Tensor, b: Tensor) -> None:
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"expected two tensors of one length, got shapes {tuple(a.shape)} and {tuple(b.shape)}")


def _check_labels(labels: Tensor, soft: bool) -> None:
    bad = ~((labels >= 0) & (labels <= 1)) if soft else ~((labels == 0) | (labels == 1))
    if bool(bad.any()):
        allowed = "between 0 and 1" if soft else "0 or 1"
        raise ValueError(f"labels must be {allowed}, got {labels[bad][0].item()}")
