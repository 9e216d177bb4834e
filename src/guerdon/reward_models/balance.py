"""A training set for a scorer whose labels are spread evenly over their range."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from guerdon.errors import ConfigError

__all__ = ["balanced_bins"]


def balanced_bins(scores: Any, n_bins: int = 10, low: int = 5000, high: int = 15000, seed: int = 0) -> np.ndarray:
    """Indices of a subset whose scores are spread over equal bins of [0, 1]: at most ``high`` of each bin.

    A bin with more is sampled without replacement. One with fewer than ``low`` is given whole, and the shortage is
    warned of: an item is never repeated. (The paper states 5,000 to 15,000 per bin and not what it did with fewer.)

    Args:
        scores: ``[N]`` in [0, 1]; the last bin holds 1 too.
        n_bins: number of bins.
        low, high: fewest and most items of a bin.
        seed: of the sampling.

    Returns:
        Ascending indices.

    Raises:
        ValueError: a score outside [0, 1], or NaN. ConfigError: ``n_bins < 1``, or not ``0 <= low <= high``.

    Source: Fan et al. 2025 (arXiv 2505.17018), data of the thinking reward model.
    """
    values = np.asarray(scores, dtype=np.float64)
    if n_bins < 1 or not 0 <= low <= high:
        raise ConfigError(f"balanced_bins needs n_bins >= 1 and 0 <= low <= high, got {n_bins}, {low} and {high}")
    if values.ndim != 1 or not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError("scores must be [N] numbers in [0, 1]")
    # 0.3 * 10 may be 2.9999...: a score on a border belongs to the bin above it.
    bins = np.minimum((values * n_bins + 1e-9).astype(int), n_bins - 1)
    rng = np.random.default_rng(seed)
    chosen, short = [], {}
    for b in range(n_bins):
        members = np.flatnonzero(bins == b)
        if len(members) > high:
            members = rng.choice(members, high, replace=False)
        elif len(members) < low:
            short[b] = len(members)
        chosen.append(members)
    if short:
        some = ", ".join(f"bin {b} holds {n}" for b, n in list(short.items())[:3])
        warnings.warn(f"{len(short)} of {n_bins} bins hold fewer than low={low} items ({some})", stacklevel=2)
    return np.sort(np.concatenate(chosen))
