"""Where is the first error of a wrong solution? Binary search over the values of its prefixes."""

from __future__ import annotations

import math
from collections.abc import Callable

from guerdon.errors import ConfigError, DataError

__all__ = ["locate_first_error"]


def locate_first_error(mc_of_prefix: Callable[[int], float], n_steps: int) -> int | None:
    """Number (from 1) of the first step after which no rollout succeeds, in at most ``floor(log2 n_steps) + 1`` estimates.

    It relies on monotonicity: behind an error every prefix is taken to be as dead. Monte Carlo noise can break that: a
    prefix of success rate p looks dead with probability ``(1 - p) ** k`` under k rollouts.

    Args:
        mc_of_prefix: share of successes after the first ``m`` steps, ``m`` in 1 .. n_steps. That of the whole (wrong)
            solution is 0 and needs no rollout.
        n_steps: steps of the solution.

    Returns:
        None where no prefix is dead, or where there is no step.

    Raises:
        ConfigError: ``n_steps`` is negative.
        DataError: an estimate is missing (NaN): the budget ran out before the search was over.

    Source: Luo et al. 2024 (OmegaPRM, arXiv 2406.06592), section 3.2.
    """
    if n_steps < 0:
        raise ConfigError(f"n_steps must not be negative, got {n_steps}")
    low, high = 1, n_steps
    while low <= high:
        middle = (low + high) // 2
        value = float(mc_of_prefix(middle))
        if math.isnan(value):
            raise DataError(f"the value after {middle} of {n_steps} steps is missing; the search needs it")
        if value > 0:
            low = middle + 1
        else:
            high = middle - 1
    return low if low <= n_steps else None
