"""Progress of episodes of thought, and the regret of a policy that spends tokens without making any.

``J_j`` is the success probability of an answer that is forced after the first ``j`` episodes; ``J_0`` that of an answer
without any thought.

Source: Qu et al. 2025, "Optimizing Test-Time Compute via Meta Reinforcement Fine-Tuning" (arXiv 2503.07572).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from guerdon.credit.groups import group_statistics
from guerdon.parts import part

__all__ = ["best_trace", "cumulative_regret", "normalized_regret", "progress_bonus", "termination_relative"]


def progress_bonus(j_values: Tensor | Sequence[float]) -> Tensor:
    """Progress of each episode: ``J_{j+1} - J_j``, ``[..., k]`` in [-1, 1].

    Each episode has its own difference; their sum telescopes to ``J_k - J_0``, which belongs to no single one. The
    result carries no gradient.

    Args:
        j_values: ``[..., k + 1]``, ``J_0`` first.

    Raises:
        ValueError: no value at all, or one outside [0, 1] (NaN is an unknown value: estimate it first).
    """
    j = _floats(j_values)
    if j.ndim == 0 or j.shape[-1] == 0:
        raise ValueError("progress needs at least J_0, got no value")
    _check_success("a J value", j)
    return j[..., 1:] - j[..., :-1]


def cumulative_regret(j_values: Tensor | Sequence[float], best: float | Tensor | Sequence[float] = 1.0) -> float:
    """``sum_j (J*_j - J_j)`` over the prefixes ``j = 0 .. k - 1`` of one trace.

    Args:
        j_values: ``[k]``, the value before each of the ``k`` episodes.
        best: what the best policy of ``j`` episodes would have, one number or ``[k]``; 1 in practice, or the best of
            the compared models.

    Raises:
        ValueError: a value outside [0, 1], or another number of best values.
    """
    j, ideal = _floats(j_values).double(), torch.as_tensor(best, dtype=torch.float64)
    if j.ndim != 1 or ideal.shape not in ((), j.shape):
        raise ValueError(f"expected values [k] and best [k] or one number, got {tuple(j.shape)}, {tuple(ideal.shape)}")
    _check_success("a J value", j)
    _check_success("a best value", ideal)
    return float((ideal - j).sum())


def normalized_regret(tokens: Sequence[float], success: Sequence[float], budget: float) -> float:
    """One minus the area under success against tokens up to a budget, as a share of the budget; in [0, 1].

    The curve goes from (0, 0) through the given points, linear in between, and holds its last value up to the budget.
    What lies beyond the budget is cut off.

    Args:
        tokens: ``[k]`` tokens spent when each answer is given, the forced answer's own included; not decreasing.
        success: ``[k]`` success probability of that answer, in [0, 1].
        budget: in tokens, positive.

    Returns:
        the regret; 1 where nothing was ever answered.

    Raises:
        ValueError: lengths differ, tokens are negative, not finite or decreasing, a success lies outside [0, 1], or the
            budget is not positive and finite.
    """
    if not 0 < budget < math.inf:
        raise ValueError(f"the budget must be a positive number of tokens, got {budget}")
    x, y = [float(t) for t in tokens], [float(s) for s in success]
    if len(x) != len(y):
        raise ValueError(f"{len(x)} token counts for {len(y)} success values; give one for each")
    if not all(math.isfinite(t) and t >= 0 for t in x) or any(b < a for a, b in pairwise(x)):
        raise ValueError(f"tokens must be finite, not negative and not decreasing, got {x}")
    if not all(0 <= s <= 1 for s in y):
        raise ValueError(f"success must lie in [0, 1], got {y}")
    area, at, height = 0.0, 0.0, 0.0
    for t, s in zip(x, y, strict=True):
        if t > budget:
            # Only the part of the segment that lies within the budget.
            s = height + (s - height) * (budget - at) / (t - at)
            t = budget
        area += (t - at) * (height + s) / 2
        at, height = t, s
        if at >= budget:
            break
    area += max(0.0, budget - at) * height
    return min(1.0, max(0.0, 1.0 - area / budget))


def best_trace(j_values: Sequence[Sequence[float]], correct: Sequence[bool]) -> tuple[int, int] | None:
    """Which of a problem's traces to learn from, and after how many of its episodes to stop.

    Among the traces that end correctly the one with the largest total progress ``J_k - J_0`` (the first of equals), cut
    at the first prefix at which its J reaches its maximum: no later episode makes progress beyond it.

    Args:
        j_values: per trace ``[k_i + 1]``.
        correct: whether each ends with a right answer.

    Returns:
        index of the trace and number of episodes to keep; None where no trace is correct.

    Raises:
        ValueError: lengths differ, or a J value outside [0, 1].
    """
    if len(j_values) != len(correct):
        raise ValueError(f"{len(j_values)} traces for {len(correct)} verdicts; give one for each")
    totals = [float(progress_bonus(_floats(j).double()).sum()) for j in j_values]
    right = [i for i, ok in enumerate(correct) if ok]
    if not right:
        return None
    chosen = max(right, key=lambda i: (totals[i], -i))
    row = _floats(j_values[chosen]).double()
    return chosen, int((row == row.max()).nonzero()[0])


@part("credit")
def termination_relative(
    rewards_B: Tensor, group_ids_B: Tensor, terminated_B: Tensor, valid_B: Tensor | None = None
) -> Tensor:
    """Reward minus the mean reward of those members of the group that stopped thinking at once, ``[B]``.

    All members go on from one prefix. What thinking on is worth is measured against answering now, in place of the mean
    over the group.

    Args:
        rewards_B: ``[B]``; may be NaN where not valid.
        group_ids_B: ``[B]`` integers; equal ids, one prefix.
        terminated_B: ``[B]`` bool, members that were made to answer at once.
        valid_B: ``[B]`` bool; invalid members get 0 and are in no mean.

    Returns:
        ``[B]``; 0 in a group without a valid member that answered at once, which has nothing to compare with.

    Source: the public recipe of MRT, ``advantage = R - R_termination``.
    """
    if not rewards_B.shape == group_ids_B.shape == terminated_B.shape or rewards_B.ndim != 1:
        raise ValueError(
            f"rewards {tuple(rewards_B.shape)}, group ids {tuple(group_ids_B.shape)} and terminated "
            f"{tuple(terminated_B.shape)} must be one [B] each"
        )
    valid = torch.ones_like(terminated_B, dtype=torch.bool) if valid_B is None else valid_B.bool()
    stopped = group_statistics(rewards_B, group_ids_B, valid & terminated_B.bool())
    known = torch.where(valid, rewards_B.double(), 0.0)
    out = torch.where(valid & (stopped.count > 0), known - stopped.mean, 0.0)
    return out.to(rewards_B.dtype if rewards_B.is_floating_point() else torch.float32)


def _floats(values: Tensor | Sequence[float]) -> Tensor:
    out = torch.as_tensor(values).detach()
    return out if out.is_floating_point() else out.to(torch.get_default_dtype())


def _check_success(what: str, values: Tensor) -> None:
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"{what} lies outside [0, 1] or is NaN: {values.tolist()}")
