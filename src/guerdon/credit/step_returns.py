"""Where step rewards go: onto tokens, into returns, and into advantages relative to the group.

With no discount the return from a step on is the sum of the rewards of this step and the later ones.
Source: Gao et al. 2024 (arXiv 2410.15115); process supervision relative to the group after Shao et al. 2024.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guerdon.credit.temporal import returns
from guerdon.parts import part

__all__ = ["returns_relative", "returns_to_go", "to_token_rewards"]


def returns_to_go(step_values: Any, mask: Any = None) -> Tensor:
    """Sum of the values from each step to the last one, undiscounted.

    Args:
        step_values: ``[B, K]``; anything outside the mask, NaN too.
        mask: ``[B, K]`` True on steps; all by default.

    Returns:
        ``[B, K]``, 0 outside the mask.

    Raises:
        ValueError: shapes that differ.
    """
    values_BK, mask_BK = _grid(step_values, mask)
    return returns(values_BK, mask_BK)


def to_token_rewards(step_values: Any, step_ends: Any, T: int) -> Tensor:
    """Put each step's value on its last token, and 0 on every other one.

    Spread over all tokens of a step, a value would be multiplied by the step's length.

    Args:
        step_values: ``[B, K]``; anything where there is no step.
        step_ends: ``[B, K]`` position of each step's last token (its separator's, where it has one); -1 where there is
            no step.
        T: number of tokens.

    Returns:
        ``[B, T]``.

    Raises:
        ValueError: shapes that differ, an end outside the ``T`` tokens, or two steps that end on one token.
    """
    ends_BK = torch.as_tensor(step_ends).long()
    values_BK, mask_BK = _grid(step_values, ends_BK >= 0)
    if bool((ends_BK >= T).any()) or bool((ends_BK < -1).any()):
        bad = int(ends_BK[(ends_BK >= T) | (ends_BK < -1)][0])
        raise ValueError(f"a step ends at token {bad}, outside the response of {T} tokens")
    row, column = mask_BK.nonzero(as_tuple=True)
    place = row * T + ends_BK[row, column]
    if len(place.unique()) < len(place):
        raise ValueError("two steps of a response end on the same token; a step covers at least one of its own")
    out = values_BK.new_zeros(len(values_BK) * T)
    out[place] = values_BK[row, column]
    return out.reshape(len(values_BK), T)


@part("credit")
def returns_relative(
    step_values: Tensor, mask: Tensor, group_ids: Tensor, *, scale: bool = True, eps: float = 1e-6
) -> Tensor:
    """Return from each step on, minus the mean of all such returns of the group, over their standard deviation.

    The sum over a trajectory, which group-relative advantages of outcomes would use, loses what the steps say: under
    Delta it is the first step's score alone.

    Args:
        step_values: ``[B, K]``; anything outside the mask.
        mask: ``[B, K]`` True on steps.
        group_ids: ``[B]`` integers; equal ids, one group.
        scale: divide by the (unbiased) standard deviation plus ``eps``.

    Returns:
        ``[B, K]``, 0 outside the mask and in groups whose returns are all equal.

    The mean is over steps, so long solutions weigh more in it. See :func:`guerdon.credit.step_leave_one_out` for a
    baseline that is unbiased where the policy chooses how many steps it takes.
    """
    values_BK, mask_BK = _grid(step_values, mask)
    if group_ids.shape != values_BK.shape[:1]:
        raise ValueError(f"group ids {tuple(group_ids.shape)} must be [B] with B = {len(values_BK)}")
    togo = returns(values_BK.double(), mask_BK)
    row = mask_BK.nonzero(as_tuple=True)[0]
    ids = torch.unique(group_ids, return_inverse=True)[1][row]
    x = togo[mask_BK]

    def total(y: Tensor) -> Tensor:
        return y.new_zeros(int(ids.max()) + 1 if len(ids) else 0).index_add_(0, ids, y)[ids]

    count = total(torch.ones_like(x))
    mean = total(x) / count
    centred = x - mean
    std = (total(centred**2) / (count - 1).clamp(min=1)).sqrt()
    # Equal returns may differ from their mean by rounding; divided by eps that would not be nothing.
    flat = std <= 1e-12 * mean.abs().clamp(min=1.0)
    centred = torch.where(flat, 0.0, centred / (std + eps) if scale else centred)
    out = torch.zeros_like(togo)
    out[mask_BK] = centred
    return out.to(values_BK.dtype)


def _grid(values: Any, mask: Any) -> tuple[Tensor, Tensor]:
    made = values if hasattr(values, "dtype") else torch.tensor(values, dtype=torch.float64)
    values_BK = torch.as_tensor(made)
    values_BK = values_BK if values_BK.is_floating_point() else values_BK.double()
    mask_BK = torch.ones_like(values_BK, dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool()
    if values_BK.ndim != 2 or values_BK.shape != mask_BK.shape:
        raise ValueError(f"values {tuple(values_BK.shape)} and mask {tuple(mask_BK.shape)} must have one shape [B, K]")
    return values_BK, mask_BK
