"""Metrics of routing benchmarks: published vectors, hand-computed values, limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import ConfigError, DataError
from guerdon.routing.bench import metrics as M


@pytest.mark.parametrize(
    ("accuracy", "usd", "expected"),
    [
        (0.7969, 0.27, 77.62),
        (0.7976, 0.70, 76.21),
        (0.6809, 0.54, 66.67),
        (0.3201, 0.07, 33.75),
        (0.7396, 10.02, 64.32),
    ],
)
def test_arena_score_reproduces_leaderboard_rows(accuracy, usd, expected):
    assert M.arena_score(accuracy, usd) == pytest.approx(expected, abs=0.01)


def test_arena_score_clamps_cost_and_has_its_limits():
    assert M.arena_score(0.75, 0.0) == M.arena_score(0.75, 0.0044)
    assert M.arena_score(0.75, 1000.0) == 0.0
    assert M.arena_score(0.0, 0.1) == 0.0
    assert M.arena_score(0.0, 500.0) == 0.0
    assert M.arena_score(1.0, 0.0044) == pytest.approx(100.0)
    assert M.arena_score(np.array([0.75, 0.75]), np.array([0.1, 100])) == pytest.approx([74.6, 38.2], abs=0.05)


@pytest.mark.parametrize(("accuracy", "usd"), [(1.2, 1), (-0.1, 1), (0.5, -1)])
def test_arena_score_refuses_nonsense(accuracy, usd):
    with pytest.raises(DataError):
        M.arena_score(accuracy, usd)


def test_hull_and_aiq_vector():
    xs, ys = M.upper_hull([1, 2, 3, 10], [0.5, 0.4, 0.8, 0.82])
    assert np.interp(2, xs, ys) == pytest.approx(0.65)
    # Areas: (.5 + .8) / 2 * 2 + (.8 + .82) / 2 * 7 = 6.97.
    assert M.aiq([1, 2, 3, 10], [0.5, 0.4, 0.8, 0.82]) == pytest.approx(0.697)
    assert M.aiq([1, 2, 3, 10], [0.5, 0.4, 0.8, 0.82], convention="range") == pytest.approx(6.97 / 9)


def test_aiq_of_one_point_and_of_a_common_range():
    assert M.aiq([2], [0.5], 4) == pytest.approx(0.25)
    assert M.aiq([2], [0.5], 4, convention="range") == pytest.approx(0.5)
    assert M.aiq([2], [0.5], convention="range") == 0.5
    assert M.aiq([0], [0.5]) == 0.5
    with pytest.raises(DataError, match="largest_cost"):
        M.aiq([2, 5], [0.5, 0.6], 4)
    with pytest.raises(ConfigError, match="convention"):
        M.aiq([2], [0.5], convention="other")
    with pytest.raises(DataError):
        M.aiq([], [])


points = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(points)
def test_hull_lies_above_all_points_rises_and_is_concave(ps):
    cost, quality = np.array(ps).T
    xs, ys = M.upper_hull(cost, quality)
    assert (np.diff(xs) > 0).all() and (np.diff(ys) > 0).all()
    above = np.interp(cost, xs, ys)
    assert (above >= quality - 1e-9).all()
    slopes = np.diff(ys) / np.diff(xs)
    assert (np.diff(slopes) <= 1e-6 * np.abs(slopes[1:]) + 1e-12).all()


@settings(max_examples=60, deadline=None)
@given(points)
def test_pareto_matches_the_definition(ps):
    mask = M.pareto(*np.array(ps).T)
    for k, (c, q) in enumerate(ps):
        beaten = any(c2 <= c and q2 >= q and (c2 < c or q2 > q) for c2, q2 in ps)
        assert mask[k] != beaten


def test_pareto_keeps_ties():
    assert M.pareto([1, 1, 2], [0.5, 0.5, 0.5]).tolist() == [True, True, False]


def test_pgr_apgr_cpt_by_hand():
    assert M.pgr(0.5, 0.2, 0.6) == pytest.approx(0.75)
    assert math.isnan(M.pgr(0.5, 0.6, 0.6))
    # A straight line from weak to strong recovers half on average.
    assert M.apgr([0, 0.5, 1], [0.2, 0.4, 0.6], 0.2, 0.6) == pytest.approx(0.5)
    # Shuffled input is sorted; area of (0, .2) (.5, .6) (1, .6) is .2 + .3 = .5, PGR .75.
    assert M.apgr([1, 0, 0.5], [0.6, 0.2, 0.6], 0.2, 0.6) == pytest.approx(0.75)
    assert M.apgr([0.3], [0.5], 0.2, 0.6) == pytest.approx(0.75)
    assert M.cpt(50, [0, 0.5, 1], [0.2, 0.4, 0.6], 0.2, 0.6) == pytest.approx(0.5)


def test_cpt_takes_the_first_crossing_of_a_curve_that_falls_again():
    # .4 is first reached on the way to .9 at x = .5, at 2/7 of the way; np.interp over y would be lost.
    assert M.cpt(50, [0, 0.5, 0.8, 1], [0.2, 0.9, 0.3, 0.6], 0.2, 0.6) == pytest.approx(0.5 * 2 / 7)
    assert M.cpt(80, [0.1, 1], [0.6, 0.6], 0.2, 0.6) == pytest.approx(0.1)
    assert math.isnan(M.cpt(80, [0, 1], [0.2, 0.3], 0.2, 0.6))
    assert math.isnan(M.cpt(50, [0, 1], [0.2, 0.3], 0.6, 0.2))
    with pytest.raises(ConfigError):
        M.cpt(120, [0, 1], [0, 1], 0, 1)


QUALITY = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0], [0.5, 0, 0.5]])
COST = np.array([[1.0, 2, 4]] * 5)


def test_optimality_by_hand():
    # Stars: member 0, 1, 2, none, none. Choices: 1 (right, dear), 1 (star), 0 (wrong), 0, 2.
    out = M.optimality([1, 1, 0, 0, 2], QUALITY, COST, resamples=50)
    assert out["opt_sel"].value == pytest.approx(1 / 3)
    assert out["opt_sel"].denominator == 3
    assert out["opt_cost"].value == pytest.approx((1 + 2) / (2 + 2))
    assert out["opt_cost"].denominator == 2
    assert out["opt_acc"].value == pytest.approx(2 / 3)
    assert out["opt_acc"].denominator == 3
    # All five: best picks are rows 1 and 3; best money 1 + 2 + 4 + 1 + 1; own 2 + 2 + 1 + 1 + 4.
    assert out["best_pick"].value == pytest.approx(2 / 5)
    assert out["cost_ratio"].value == pytest.approx(9 / 10)
    assert out["quality_ratio"].value == pytest.approx(2.5 / 3.5)
    assert {out[k].denominator for k in ("best_pick", "cost_ratio", "quality_ratio")} == {5}


def test_optimality_leaves_out_what_was_not_run_and_free_failures():
    quality, cost = QUALITY.copy(), COST.copy()
    quality[0, 1] = cost[0, 1] = np.nan
    cost[2, 0] = 0.0
    out = M.optimality([1, 1, 0, 0, 2], quality, cost, resamples=50)
    assert out["opt_sel"].denominator == 1
    assert out["best_pick"].denominator == 4


def test_optimality_where_nobody_is_right_is_undefined():
    out = M.optimality([0, 1], np.zeros((2, 2)), np.ones((2, 2)), resamples=50)
    assert math.isnan(out["opt_sel"].value) and out["opt_sel"].denominator == 0
    assert math.isnan(out["quality_ratio"].value)
    assert out["best_pick"].value == 1.0


def test_robustness_counts_matched_pairs_only():
    out = M.robustness([0, 1, 2, None, 1], [0, 2, 2, 1, -1], resamples=50)
    assert out.value == pytest.approx(2 / 3)
    assert out.denominator == 3
    assert math.isnan(M.robustness([], []).value)
    with pytest.raises(DataError):
        M.robustness([0], [])


def test_interval_of_a_mean_matches_theory_and_is_reproducible():
    x = (np.arange(400) < 100).astype(float)
    a = M.bootstrap(x, lambda s: s[..., 0], resamples=4000, seed=1)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert a.ci_low == pytest.approx(0.25 - half, abs=0.006)
    assert a.ci_high == pytest.approx(0.25 + half, abs=0.006)
    assert a == M.bootstrap(x, lambda s: s[..., 0], resamples=4000, seed=1)
    assert a != M.bootstrap(x, lambda s: s[..., 0], resamples=4000, seed=2)


def test_equal_seeds_pair_the_figures_of_two_routers():
    rng = np.random.default_rng(0)
    x = rng.random(50)
    both = M.bootstrap(np.column_stack([x, x]), lambda s: s[..., 0] - s[..., 1], resamples=100)
    assert both.ci_low == both.ci_high == 0.0


def test_bootstrap_refuses_nan_and_reports_nothing_for_nothing():
    with pytest.raises(DataError):
        M.bootstrap([1.0, math.nan], lambda s: s[..., 0])
    assert M.bootstrap([], lambda s: s[..., 0]).denominator == 0


def test_curve_figures_of_a_perfect_pair_router():
    # Strong wins on the first half only and ties elsewhere: sending that half recovers everything.
    weak, strong = np.zeros(10), np.r_[np.ones(5), np.zeros(5)]
    calls = np.arange(10)[:, None] < np.arange(11)[None]
    out = M.curve_figures(calls, weak, strong, resamples=20)
    assert out["cpt50"].value == pytest.approx(0.25)
    assert out["apgr"].value == pytest.approx(0.75)
