"""Figures of merit of a router on recorded outcomes, each with its denominator and a bootstrap interval.

The plain functions (:func:`arena_score`, :func:`pgr`, :func:`aiq`, ...) map numbers to numbers. The
functions that return :class:`Figure` take one row per query and resample queries, the same ones for
every column, so that figures of different routers under one seed are paired.

Sources: RouterArena (arena score, Opt.*, robustness), RouteLLM (PGR, APGR, CPT), RouterBench (AIQ).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from guerdon.errors import ConfigError, DataError

__all__ = [
    "Figure",
    "aiq",
    "apgr",
    "arena_score",
    "bootstrap",
    "cpt",
    "curve_figures",
    "optimality",
    "pareto",
    "pgr",
    "robustness",
    "summarise",
    "upper_hull",
]

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Figure:
    """A number, what it is a number of, and its 95% interval.

    Attributes:
        value: NaN where it is undefined (an empty denominator, say).
        denominator: over how many queries it was taken.
        ci_low, ci_high: percentile interval of the bootstrap over queries.
    """

    value: float
    denominator: int
    ci_low: float
    ci_high: float

    def to_dict(self) -> dict[str, float | int]:
        """JSON-ready form."""
        return {"value": self.value, "denominator": self.denominator, "ci_low": self.ci_low, "ci_high": self.ci_high}


def bootstrap(
    columns: Any,
    statistic: Callable[[Array], Array],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    denominator: int | None = None,
) -> Figure:
    """Paired bootstrap over queries of any statistic of column means.

    Args:
        columns: ``[n, k]``, one row per query.
        statistic: maps means ``[..., k]`` to values ``[...]``; NaN where undefined.
        resamples, seed, level: of the percentile interval. Equal seeds and n draw equal queries.
        denominator: what to report as such; n otherwise.

    Raises:
        DataError: a column is not finite.
    """
    columns = np.asarray(columns, dtype=np.float64)
    if columns.ndim == 1:
        columns = columns[:, None]
    n = len(columns)
    shown = n if denominator is None else denominator
    if n == 0:
        return Figure(np.nan, shown, np.nan, np.nan)
    if not np.isfinite(columns).all():
        raise DataError(f"figures need finite values per query, got {int((~np.isfinite(columns)).sum())} that are not")
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(columns.mean(0)[None])[0])
        rng = np.random.default_rng(seed)
        counts = rng.multinomial(n, np.full(n, 1.0 / n), size=resamples)
        draws = np.asarray(statistic(counts @ columns / n), dtype=np.float64)
    draws = draws[np.isfinite(draws)]
    if not len(draws) or not np.isfinite(value):
        return Figure(value if np.isfinite(value) else np.nan, shown, np.nan, np.nan)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Figure(value, shown, float(low), float(high))


def arena_score(
    accuracy: Any, usd_per_1000: Any, *, beta: float = 0.1, cheapest: float = 0.0044, dearest: float = 200.0
) -> Any:
    """Weighted harmonic mean of accuracy and logarithmic cheapness, times 100.

    Args:
        accuracy: in [0, 1], failed calls counted as 0.
        usd_per_1000: USD per 1,000 queries, >= 0; clamped to ``[cheapest, dearest]``, which are fixed
            numbers and not the pool's own least and largest cost.
        beta: weight; small values favour accuracy.

    Returns:
        ``100 (1 + beta) A C / (beta A + C)`` with ``C`` falling from 1 at ``cheapest`` to 0 at ``dearest``.

    Raises:
        DataError: accuracy outside [0, 1] or a negative cost.
    """
    a, usd = np.asarray(accuracy, dtype=np.float64), np.asarray(usd_per_1000, dtype=np.float64)
    if (a < -1e-12).any() or (a > 1 + 1e-12).any():
        raise DataError(f"accuracy must be in [0, 1], got {a.min():g} to {a.max():g}")
    if (usd < 0).any():
        raise DataError(f"usd_per_1000 must be >= 0, got {usd.min():g}")
    usd = np.clip(usd, cheapest, dearest)
    cheap = (np.log2(dearest) - np.log2(usd)) / (np.log2(dearest) - np.log2(cheapest))
    below = beta * a + cheap
    out = 100 * np.divide((1 + beta) * a * cheap, below, out=np.zeros(np.broadcast(a, usd).shape), where=below > 0)
    return float(out) if out.ndim == 0 else out


def summarise(quality: Array, usd: Array, *, resamples: int = 1000, seed: int = 0) -> dict[str, Figure]:
    """Mean quality, USD per 1,000 queries and arena score of one router.

    Args:
        quality: ``[n]`` in [0, 1], 0 for a failed call.
        usd: ``[n]`` what each query cost.
    """
    both = np.column_stack([quality, usd])
    options = {"resamples": resamples, "seed": seed}
    out = {
        "quality": bootstrap(both[:, 0], lambda s: s[..., 0], **options),
        "usd_per_1000": bootstrap(both[:, 1], lambda s: 1000 * s[..., 0], **options),
    }
    if len(both) and both[:, 0].min() >= 0 and both[:, 0].max() <= 1:
        out["arena"] = bootstrap(both, lambda s: np.atleast_1d(arena_score(s[..., 0], 1000 * s[..., 1])), **options)
    return out


def optimality(
    chosen: Array, quality: Array, cost: Array, *, right: float = 1.0, resamples: int = 1000, seed: int = 0
) -> dict[str, Figure]:
    """How near the choices come to the cheapest right member of each query.

    ``opt_sel``, ``opt_cost`` and ``opt_acc`` follow RouterArena after its correction (pull request 97):
    only queries count on which some member is right, ``opt_cost`` only those which the router got right.
    The mended figures count every query, and the best member is the one of highest quality, then lowest
    cost: ``best_pick`` is the share of choices as good and as cheap as it; ``cost_ratio`` its money over
    the router's money; ``quality_ratio`` the router's quality over its quality.

    Args:
        chosen: ``[n]`` member indices.
        quality: ``[n, m]``, NaN where a member was not run.
        cost: ``[n, m]`` USD.
        right: least quality that is a right answer.

    Returns:
        The six figures, each with its own denominator.
    """
    chosen = np.asarray(chosen, dtype=int)
    rows = np.arange(len(chosen))
    q, c = np.asarray(quality, dtype=np.float64), np.asarray(cost, dtype=np.float64)
    own_q, own_c = q[rows, chosen], c[rows, chosen]
    known = np.isfinite(own_q) & np.isfinite(own_c)
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}

    able = np.where(q >= right, c, np.inf)
    star = able.argmin(1)
    counted = known & np.isfinite(able.min(1)) & ~((own_q == 0) & (own_c == 0))
    hit = counted & (own_q >= right)
    zero = np.zeros(len(chosen))

    def ratio(over: Array, under: Array, of: Array) -> Figure:
        # All n rows are resampled, so that figures with different denominators stay paired.
        columns = np.column_stack([np.where(of, over, zero), np.where(of, under, zero)])
        columns[~of] = 0.0
        return bootstrap(columns, _quotient, denominator=int(of.sum()), **options)

    one = np.ones(len(chosen))
    best_q = np.nanmax(np.where(np.isfinite(q), q, -np.inf), axis=1)
    best_c = np.where(q == best_q[:, None], c, np.inf).min(1)
    return {
        "opt_sel": ratio((hit & (chosen == star)).astype(float), one, counted),
        "opt_cost": ratio(c[rows, star], own_c, hit),
        "opt_acc": ratio(own_q, q[rows, star], counted),
        "best_pick": ratio(((own_q >= best_q) & (own_c <= best_c)).astype(float), one, known),
        "cost_ratio": ratio(best_c, own_c, known),
        "quality_ratio": ratio(own_q, best_q, known),
    }


def _quotient(sums: Array) -> Array:
    return np.divide(sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], np.nan), where=sums[..., 1] > 0)


def pgr(quality: Any, weak: Any, strong: Any) -> Any:
    """Performance gap recovered: ``(quality - weak) / (strong - weak)``; NaN where there is no gap."""
    y, w, s = (np.asarray(v, dtype=np.float64) for v in (quality, weak, strong))
    gap = s - w
    out = np.divide(y - w, gap, out=np.full(np.broadcast(y, gap).shape, np.nan), where=gap != 0)
    return float(out) if out.ndim == 0 else out


def apgr(share: Any, quality: Any, weak: Any, strong: Any) -> Any:
    """Average performance gap recovered: the PGR curve's mean height over its own range of shares.

    Args:
        share: ``[..., k]`` share of calls to the strong member, in any order.
        quality: ``[..., k]`` quality reached.
        weak, strong: ``[...]`` quality of always calling one or the other.

    Returns:
        Trapezoidal area of the PGR over the range, divided by the range; with one point, its PGR.
    """
    x, y = np.asarray(share, dtype=np.float64), np.asarray(quality, dtype=np.float64)
    order = np.argsort(x, axis=-1, kind="stable")
    x, y = np.take_along_axis(x, order, -1), np.take_along_axis(y, order, -1)
    width = x[..., -1] - x[..., 0]
    step, height = np.diff(x, axis=-1), (y[..., 1:] + y[..., :-1]) / 2
    mean = np.divide(
        (step * height).sum(-1), width, out=np.asarray(y.mean(-1), dtype=np.float64).copy(), where=width > 0
    )
    return pgr(mean, weak, strong)


def cpt(percent: float, share: Any, quality: Any, weak: float, strong: float) -> float:
    """Call-performance threshold: the smallest share of strong calls that recovers ``percent`` % of the gap.

    The curve may rise and fall: the first crossing counts, found by linear interpolation between
    neighbouring shares.

    Returns:
        The share; NaN where the curve never gets there or there is no positive gap.

    Raises:
        ConfigError: percent outside [0, 100].
    """
    if not 0 <= percent <= 100:
        raise ConfigError(f"percent must be in [0, 100], got {percent}")
    if not strong > weak:
        return float("nan")
    x, y = np.asarray(share, dtype=np.float64), np.asarray(quality, dtype=np.float64)
    order = np.lexsort((-y, x))
    x, y = x[order], y[order]
    # Sums of ones and zeros end a rounding error below the strong member's own mean.
    target = weak + percent / 100 * (strong - weak) - 1e-12
    above = np.flatnonzero(y >= target)
    if not len(above):
        return float("nan")
    k = int(above[0])
    if k == 0 or y[k] == y[k - 1]:
        return float(x[k])
    return float(x[k - 1] + (x[k] - x[k - 1]) * (target - y[k - 1]) / (y[k] - y[k - 1]))


def upper_hull(cost: Any, quality: Any) -> tuple[Array, Array]:
    """Vertices of the non-decreasing concave hull above the points, from the cheapest point on.

    Args:
        cost, quality: ``[k]`` each, finite.

    Returns:
        Their costs and qualities, rising. Any point on it is reached by mixing two settings at random.
    """
    cost, quality = _points(cost, quality)
    hull: list[tuple[float, float]] = []
    for x, y in sorted(zip(cost.tolist(), quality.tolist(), strict=True), key=lambda p: (p[0], -p[1])):
        if hull and (y <= hull[-1][1] or x == hull[-1][0]):
            continue
        while len(hull) > 1 and _turns_left(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return np.array([p[0] for p in hull]), np.array([p[1] for p in hull])


def _turns_left(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])


def aiq(
    cost: Any, quality: Any, largest_cost: float | None = None, *, convention: Literal["zero", "range"] = "zero"
) -> float:
    """Average improvement in quality: mean height of the hull over a range of costs.

    Args:
        cost, quality: ``[k]`` settings of one router.
        largest_cost: where the range ends, at or beyond every cost of all routers compared; this one's
            largest otherwise. The hull is level beyond its last vertex.
        convention: ``"zero"`` divides by ``largest_cost``, so that the strip left of the cheapest setting
            counts as 0; ``"range"`` divides by what lies between the cheapest setting and ``largest_cost``.

    Raises:
        DataError: no points, or ``largest_cost`` below one of them.
        ConfigError: unknown convention.
    """
    if convention not in ("zero", "range"):
        raise ConfigError(f"convention must be 'zero' or 'range', got {convention!r}")
    cost, quality = _points(cost, quality)
    end = float(cost.max()) if largest_cost is None else float(largest_cost)
    if end < cost.max() * (1 - 1e-9):
        raise DataError(f"largest_cost {end:g} is below the largest cost of the points, {cost.max():g}")
    xs, ys = upper_hull(cost, quality)
    xs, ys = np.append(xs, max(end, xs[-1])), np.append(ys, ys[-1])
    area = float((np.diff(xs) * (ys[1:] + ys[:-1]) / 2).sum())
    width = end if convention == "zero" else end - float(xs[0])
    return area / width if width > 0 else float(ys[-1])


def _points(cost: Any, quality: Any) -> tuple[Array, Array]:
    cost, quality = np.asarray(cost, dtype=np.float64).ravel(), np.asarray(quality, dtype=np.float64).ravel()
    if len(cost) != len(quality) or not len(cost):
        raise DataError(f"needs as many costs as qualities and at least one, got {len(cost)} and {len(quality)}")
    if not (np.isfinite(cost).all() and np.isfinite(quality).all()):
        raise DataError("costs and qualities must be finite")
    return cost, quality


def pareto(cost: Any, quality: Any) -> Array:
    """``[k]`` True for each point that no other beats: none is as cheap and as good, and better in one."""
    cost, quality = _points(cost, quality)
    no_worse = (cost[None] <= cost[:, None]) & (quality[None] >= quality[:, None])
    better = (cost[None] < cost[:, None]) | (quality[None] > quality[:, None])
    return ~(no_worse & better).any(1)


def robustness(before: Sequence[Any], after: Sequence[Any], *, resamples: int = 1000, seed: int = 0) -> Figure:
    """Share of choices that a harmless change of the query leaves alone, where both exist.

    A constant router scores 1: read it beside the quality.

    Args:
        before, after: the choice per query; ``None`` or a negative index where there was none.

    Raises:
        DataError: different lengths.
    """
    if len(before) != len(after):
        raise DataError(f"robustness compares equally many choices, got {len(before)} and {len(after)}")
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if _made(a) and _made(b)]
    return bootstrap([float(a == b) for a, b in pairs], lambda s: s[..., 0], resamples=resamples, seed=seed)


def _made(choice: Any) -> bool:
    return choice is not None and not (isinstance(choice, int | np.integer) and choice < 0)


def curve_figures(
    strong_calls: Array,
    weak_quality: Array,
    strong_quality: Array,
    *,
    percents: Sequence[float] = (20, 50, 80),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Figure]:
    """APGR and CPT of a router between two members, swept over thresholds.

    Args:
        strong_calls: ``[n, k]`` True where setting k sends query n to the strong member.
        weak_quality, strong_quality: ``[n]`` quality of the two on each query.

    Returns:
        ``apgr`` and ``cpt20``, ``cpt50``, ...
    """
    calls = np.asarray(strong_calls, dtype=np.float64)
    w, s = np.asarray(weak_quality, dtype=np.float64), np.asarray(strong_quality, dtype=np.float64)
    k = calls.shape[1]
    columns = np.column_stack([calls, calls * s[:, None] + (1 - calls) * w[:, None], w, s])
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}

    def crossing(percent: float) -> Callable[[Array], Array]:
        return lambda m: np.array([cpt(percent, r[:k], r[k : 2 * k], r[-2], r[-1]) for r in m])

    out = {
        "apgr": bootstrap(
            columns, lambda m: np.atleast_1d(apgr(m[:, :k], m[:, k : 2 * k], m[:, -2], m[:, -1])), **options
        )
    }
    for percent in percents:
        out[f"cpt{percent:g}"] = bootstrap(columns, crossing(percent), **options)
    return out
