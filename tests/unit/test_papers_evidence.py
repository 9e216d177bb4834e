"""Effects, intervals and verdicts."""

import json

import numpy as np
import pytest

from guerdon.errors import ConfigError, DataError, UnknownName
from guerdon.papers import Claim, Result, bootstrap, paired_claim, recipe, statistic_claim
from guerdon.papers.evidence import require_scale


def test_identical_arms_have_no_effect_and_no_width():
    x = np.random.default_rng(0).random((3, 50))
    estimate, low, high, _ = bootstrap([x, x], resamples=200)
    assert (estimate, low, high) == (0.0, 0.0, 0.0)
    claim = paired_claim("c", "x > x", x, x, resamples=200)
    assert claim.holds is False and claim.p_value == 1.0


def test_a_constant_shift_is_found_exactly():
    x = np.random.default_rng(1).random((2, 40))
    claim = paired_claim("c", "better", x + 0.25, x, resamples=300)
    assert claim.estimate == pytest.approx(0.25)
    assert (claim.ci_low, claim.ci_high) == pytest.approx((0.25, 0.25))
    assert claim.holds is True and claim.p_value == pytest.approx(1 / 300)


def test_interval_matches_the_normal_theory_of_a_mean():
    x = np.random.default_rng(2).normal(size=(1, 400))
    _, low, high, samples = bootstrap([x], resamples=4000)
    se = x.std() / np.sqrt(400)
    assert samples.std() == pytest.approx(se, rel=0.05)
    assert (low, high) == pytest.approx((x.mean() - 1.96 * se, x.mean() + 1.96 * se), abs=0.15 * se)


def test_seeds_are_resampled_too():
    x = np.repeat(np.array([[0.0], [1.0]]), 100, axis=1)
    assert bootstrap([x], resamples=2000)[3].std() == pytest.approx(np.sqrt(0.25 / 2), rel=0.1)
    assert bootstrap([x], resamples=200, resample_seeds=False)[3].std() == pytest.approx(0.0, abs=1e-12)


def test_a_negative_margin_states_non_inferiority():
    rng = np.random.default_rng(3)
    x = (rng.random((3, 500)) < 0.7).astype(float)
    assert paired_claim("c", "not much worse", x - 0.01, x, margin=-0.02, resamples=200).holds is True
    assert paired_claim("c", "not much worse", x - 0.03, x, margin=-0.02, resamples=200).holds is False


def test_ratio_claim():
    a, b = np.full((2, 10), 0.9), np.full((2, 10), 1.0)
    claim = statistic_claim("r", "a / b > 0.85", [a, b], lambda x, y: x / y, margin=0.85, resamples=50)
    assert claim.estimate == pytest.approx(0.9) and claim.holds is True


def test_unpaired_or_broken_arms_are_refused():
    with pytest.raises(DataError, match="equal"):
        bootstrap([np.zeros((1, 3)), np.zeros((1, 4))])
    with pytest.raises(DataError, match="non-finite"):
        bootstrap([np.array([[1.0, np.nan]])])
    with pytest.raises(DataError, match="nothing"):
        bootstrap([np.zeros((1, 0))])


def test_result_round_trip_and_verdict(tmp_path):
    claim = Claim("a", "s", 0.1, 0.05, float("nan"), 0.01, True)
    result = Result("x", "cpu", (0, 1), (claim,), duration_s=1.0)
    path = result.write(tmp_path)
    raw = json.loads(path.read_text())
    assert raw["holds"] is True and raw["claims"][0]["ci_high"] is None
    assert {"slug", "scale", "seeds", "claims", "paper_numbers", "environment", "duration_s"} <= set(raw)
    assert Result.read(path).claims[0].estimate == 0.1
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert not Result("x", "cpu", (0,), (claim, Claim("b", "s", 0, 0, 0, 1, False))).holds
    assert Result("x", "smoke", (0,), (Claim("b", "s", 0, 0, 0, 1, None),)).holds


def test_a_file_that_is_no_result_is_refused(tmp_path):
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(DataError, match=r"r\.json"):
        Result.read(tmp_path / "r.json")


def test_unknown_scale_and_slug():
    with pytest.raises(ConfigError, match="smoke, cpu or gpu"):
        require_scale("huge")
    with pytest.raises(UnknownName, match="router-r1"):
        recipe.load("router-r2")
