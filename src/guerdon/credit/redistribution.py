"""Rewards per turn: a return split over the turns that earned it, fused with grounding, placed on turn ends.

``L`` counts tokens of a row, ``T_i`` the turns of trajectory ``i``. A turn ends where the action mask goes from 1 to 0,
and at the last masked token.

Source: Wang et al. 2025, "SPA-RL: Reinforcing LLM Agents via Stepwise Progress Attribution" (arXiv 2505.20732).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "exact_redistribution",
    "fuse",
    "place_on_turn_ends",
    "redistribute",
    "turn_ends",
    "uniform_redistribution",
]


class Contributor(Protocol):
    """What :func:`redistribute` needs of an estimator."""

    def contributions(self, trajectory: Any, /) -> Tensor:
        """One value per turn of the policy, ``[T]``; their sum predicts the return."""
        ...


def redistribute(
    estimator: Contributor, trajectories: Sequence[Any], exact: bool = False, *, returns: Sequence[float] | None = None
) -> list[Tensor]:
    """Contribution of each turn to its trajectory's return, ``[T_i]`` per trajectory.

    Args:
        estimator: has ``contributions(trajectory) -> Tensor [T]``, for example a
            :class:`~guerdon.reward_models.ProgressEstimator`.
        trajectories: whatever the estimator takes. One without turns gets an empty tensor.
        exact: spread the prediction error evenly, so that the contributions sum to the return (an option, not the
            published method).
        returns: the returns, for ``exact``; by default each trajectory's own ``info["return"]``.

    Raises:
        ValueError: ``exact`` without a return, another number of returns than of trajectories, or an estimator that
            gives no finite ``[T]``.
    """
    if returns is not None and len(returns) != len(trajectories):
        raise ValueError(f"{len(returns)} returns for {len(trajectories)} trajectories; give one for each")
    out = []
    for i, trajectory in enumerate(trajectories):
        made = torch.as_tensor(estimator.contributions(trajectory)).detach()
        if made.ndim != 1 or not bool(torch.isfinite(made).all()):
            raise ValueError(f"the estimator gave trajectory {i} no finite [T] contributions but {made}")
        if exact:
            known = returns[i] if returns is not None else getattr(trajectory, "info", {}).get("return")
            if known is None:
                raise ValueError(f"exact=True needs the return of trajectory {i}: give returns=")
            made = exact_redistribution(made, float(known))
        out.append(made)
    return out


def exact_redistribution(contributions_T: Tensor, total: float) -> Tensor:
    """``c_t + (R - sum c) / T``: contributions that sum to the return. No turns: nothing to spread, an empty tensor.

    Raises:
        ValueError: contributions that are no ``[T]``, or a return that is not finite.
    """
    if contributions_T.ndim != 1:
        raise ValueError(f"contributions must be [T], got {tuple(contributions_T.shape)}")
    if not math.isfinite(total):
        raise ValueError(f"the return must be finite, got {total}")
    return contributions_T + (total - contributions_T.sum()) / max(len(contributions_T), 1)


def uniform_redistribution(total: float, turns: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """``R / T`` for every turn, ``[T]``: the split that knows nothing."""
    return exact_redistribution(torch.zeros(turns, dtype=dtype), total)


def fuse(
    contributions: Tensor | Sequence[float],
    grounding: Tensor | Sequence[float],
    alpha: float = 1.0,
    beta: float = 0.5,
) -> Tensor:
    """Reward of each turn: ``alpha * c_t + beta * g_t``; the return itself is not added again.

    Args:
        contributions: any shape, of either sign.
        grounding: the same shape, 1 where the action was executed and 0 where the environment rejected it.
        alpha, beta: finite weights; the paper's are 1 and 0.5.

    Raises:
        ValueError: shapes differ, a weight or a value is not finite, or grounding lies outside [0, 1].
    """
    c = torch.as_tensor(contributions)
    c = c if c.is_floating_point() else c.to(torch.get_default_dtype())
    g = torch.as_tensor(grounding, device=c.device).to(c.dtype)
    if c.shape != g.shape:
        raise ValueError(f"contributions {tuple(c.shape)} and grounding {tuple(g.shape)} must have one shape")
    if not (math.isfinite(alpha) and math.isfinite(beta)):
        raise ValueError(f"alpha and beta must be finite, got {alpha} and {beta}")
    if not bool(torch.isfinite(c).all()):
        raise ValueError("a contribution is NaN or infinite")
    if not bool(((g >= 0) & (g <= 1)).all()):
        raise ValueError("grounding must lie in [0, 1]: 1 for an executed action, 0 for a rejected one")
    return alpha * c + beta * g


def turn_ends(action_mask: Tensor, turn_index: Tensor | None = None) -> list[Tensor]:
    """Position of the last token of each turn, one int64 ``[T_i]`` per row.

    Args:
        action_mask: ``[B, L]`` (or one row ``[L]``), set on the policy's tokens.
        turn_index: same shape, the number of the turn that each masked token belongs to, where two turns of the
            policy may follow one another without a token of the environment between them.

    Raises:
        ValueError: a mask that is neither ``[L]`` nor ``[B, L]``, or an index of another shape.
    """
    mask = torch.as_tensor(action_mask).bool()
    if mask.ndim not in (1, 2):
        raise ValueError(f"the action mask must be [L] or [B, L], got {tuple(mask.shape)}")
    index = torch.zeros_like(mask, dtype=torch.long) if turn_index is None else torch.as_tensor(turn_index)
    if index.shape != mask.shape:
        raise ValueError(f"turn_index {tuple(index.shape)} must have the mask's shape {tuple(mask.shape)}")
    mask, index = torch.atleast_2d(mask), torch.atleast_2d(index)
    end = mask.clone()
    if mask.shape[1] > 1:
        end[:, :-1] &= ~mask[:, 1:] | (index[:, 1:] != index[:, :-1])
    return [torch.nonzero(row).squeeze(-1) for row in end]


def place_on_turn_ends(
    step_rewards: Tensor | Sequence[Tensor] | Sequence[Sequence[float]],
    action_mask: Tensor,
    *,
    turn_index: Tensor | None = None,
) -> Tensor:
    """Token rewards: each turn's reward on that turn's last token, 0 elsewhere; the shape of the mask.

    Args:
        step_rewards: ragged ``[T_i]`` per row; or ``[B, T]`` padded behind a row's turns with 0 or NaN; or ``[T]`` for
            a mask of one row.
        action_mask: ``[B, L]`` or ``[L]``.
        turn_index: see :func:`turn_ends`.

    Raises:
        ValueError: a row has another number of rewards than of turns, or a reward is not finite.
    """
    mask = torch.as_tensor(action_mask)
    ends = turn_ends(mask, turn_index)
    single = mask.ndim == 1
    if len(ends) == 1 and not _nested(step_rewards):
        rows: Sequence[Any] = [step_rewards]
    else:
        rows = list(step_rewards)
    padded = isinstance(step_rewards, Tensor) and step_rewards.ndim == 2
    if len(rows) != len(ends):
        raise ValueError(f"{len(rows)} rows of rewards for {len(ends)} rows of the mask")
    values = [torch.as_tensor(row, device=mask.device) for row in rows]
    floats = [v.dtype for v in values if v.is_floating_point()]
    dtype = floats[0] if floats else torch.get_default_dtype()
    out = torch.zeros((len(ends), mask.shape[-1]), dtype=dtype, device=mask.device)
    for i, (value, end) in enumerate(zip(values, ends, strict=True)):
        if padded and len(value) > len(end):
            rest = value[len(end) :]
            if bool((torch.isnan(rest) | (rest == 0)).all()):
                value = value[: len(end)]
        if value.ndim != 1 or len(value) != len(end):
            raise ValueError(f"row {i} has rewards {tuple(value.shape)} for {len(end)} turns; give one per turn")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"row {i} has a reward that is NaN or infinite")
        out[i, end] = value.to(dtype)
    return out[0] if single else out


def _nested(rows: Any) -> bool:
    """Whether rewards come row by row."""
    if isinstance(rows, Tensor):
        return rows.ndim > 1
    return len(rows) > 0 and not isinstance(rows[0], int | float) and torch.as_tensor(rows[0]).ndim > 0
