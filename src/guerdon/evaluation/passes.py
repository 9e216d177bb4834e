"""The chance that at least one of k samples is right, from n samples of which c were."""

from __future__ import annotations

import math

from guerdon.errors import ConfigError

__all__ = ["pass_at_k"]


def pass_at_k(n: int, c: int, k: int) -> float:
    """``1 - C(n - c, k) / C(n, k)``: the unbiased estimate of the chance that one of ``k`` samples is right.

    Args:
        n: samples drawn.
        c: how many of them are right.
        k: at most ``n``.

    Raises:
        ConfigError: not ``0 <= c <= n`` and ``1 <= k <= n``, or not integers.

    Source: Chen et al. 2021 (arXiv 2107.03374), eq. 1.
    """
    if not all(isinstance(x, int) and not isinstance(x, bool) for x in map(_plain, (n, c, k))):
        raise ConfigError(f"n, c and k must be integers, got {n!r}, {c!r}, {k!r}")
    if not (0 <= c <= n and 1 <= k <= n):
        raise ConfigError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k)) if n - c >= k else 1.0


def _plain(x: object) -> object:
    return x.item() if hasattr(x, "item") else x  # numpy and torch integers
