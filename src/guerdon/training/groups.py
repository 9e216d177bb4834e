"""Which groups of a step are learned from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from guerdon.errors import RewardError
from guerdon.types import Group, Score, StopReason

if TYPE_CHECKING:
    from guerdon.training.config import FilterConfig

__all__ = ["informative"]


def informative(
    groups: Sequence[Group], scores: Sequence[Score], filter: FilterConfig | None, *, variance: bool
) -> list[bool]:
    """For each group, whether it is learned from.

    Args:
        groups: as sampled.
        scores: flat, in their order. Invalid scores and failed trajectories count in no mean; a group without any
            other is not learned from.
        filter: accuracy band and least deviation, both of what is left.
        variance: also ask that the outcomes are not all equal.

    Raises:
        RewardError: the filter names a part that a valid score does not have.
    """
    out: list[bool] = []
    at = 0
    for group in groups:
        members = [
            score
            for score, trajectory in zip(scores[at : at + len(group)], group.trajectories, strict=True)
            if score.valid and trajectory.stop not in (StopReason.ERROR, StopReason.ABORTED)
        ]
        at += len(group)
        values = np.array([s.value for s in members])
        use = len(values) > 0
        if use and variance:
            use = bool(values.min() < values.max())
        if use and filter is not None:
            use = _passes(group, members, values, filter)
        out.append(use)
    return out


def _passes(group: Group, members: Sequence[Score], values: np.ndarray, filter: FilterConfig) -> bool:
    if filter.min_std > 0 and (len(values) < 2 or values.std(ddof=1) < filter.min_std):
        return False
    if filter.accuracy is None:
        return True
    if filter.part is not None:
        missing = next((s for s in members if filter.part not in s.parts), None)
        if missing is not None:
            raise RewardError(
                f"filter.part={filter.part!r}: the score of task {group.task.id!r} has no such part; "
                f"its parts are {', '.join(missing.parts) or 'none'}"
            )
        values = np.array([s.parts[filter.part] for s in members])
    low, high = filter.accuracy
    # A mean of equal shares may miss the band's edge by rounding.
    return bool(low - 1e-9 <= values.mean() <= high + 1e-9)
