"""Rewards of length against hand-computed values."""

import numpy as np
import pytest
import torch

import guerdon as gd
from guerdon.errors import ConfigError, RewardError
from guerdon.rewards import HumpLength, LinearLength, OverlongPenalty, TargetLength, hump_length, policy_length
from guerdon.types import StopReason, Task, Trajectory, Turn


def said(n, stop=StopReason.EOS, **meta):
    turns = (Turn("policy", "x" * n, tuple(range(n))), Turn("environment", "yy", (1, 2)))
    return Trajectory(Task("t", "q", meta=meta), turns, stop)


def test_the_hump_of_the_paper():
    got = HumpLength(100)([0, 25, 50, 75, 100, 250])
    np.testing.assert_allclose(got, [0.0, 0.75, 1.0, 0.5, -1.0, -1.0], atol=1e-15)
    assert got.dtype == np.float64
    root = 100 * (0.5 + 0.5 / 2**0.5)
    np.testing.assert_allclose(HumpLength(100)([root]), [0.0], atol=1e-12)


def test_another_turning_point():
    # p = 0.2 of 10: x = 0.1 rises to 1 - 0.25, x = 0.6 falls to 1 - 2 * 0.25
    np.testing.assert_allclose(HumpLength(10, 0.2)([1, 2, 6, 10]), [0.75, 1.0, 0.5, -1.0], atol=1e-12)


def test_the_polyline():
    np.testing.assert_allclose(HumpLength(8, 0.5, "polyline")([0, 2, 4, 6, 8]), [0.0, 0.5, 1.0, 0.0, -1.0])


def test_value_and_slope_meet_at_the_turn():
    for p in (0.1, 0.5, 0.8):
        x = torch.tensor([p - 1e-7, p, p + 1e-7], dtype=torch.float64, requires_grad=True)
        y = hump_length(x, 1.0, p)
        (slope,) = torch.autograd.grad(y.sum(), x)
        assert torch.allclose(y, torch.ones(3, dtype=torch.float64), atol=1e-9)
        assert slope.abs().max() < 1e-3 and slope[1] == 0


def test_float_types_are_kept():
    assert hump_length(torch.zeros(2, dtype=torch.float32), 4).dtype == torch.float32
    assert hump_length(torch.zeros(2, dtype=torch.long), 4).dtype == torch.float64
    assert hump_length([], 4).shape == (0,)


@pytest.mark.parametrize("p", [0, 1, 0.0, 1.0, -0.5, 1.5, float("nan"), True])
def test_the_turn_lies_strictly_inside(p):
    with pytest.raises(ValueError, match="p must be strictly between 0 and 1"):
        HumpLength(10, p)


@pytest.mark.parametrize("max_len", [0, -1, float("inf"), float("nan"), True])
def test_the_budget_is_positive(max_len):
    with pytest.raises(ConfigError, match="max_len"):
        HumpLength(max_len)


def test_bad_lengths_and_shapes():
    with pytest.raises(ConfigError, match="shape"):
        HumpLength(10, shape="cubic")
    for bad in ([-1], [float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="lengths"):
            HumpLength(10)(bad)


def test_trajectories_count_the_tokens_of_the_policy_alone():
    scores = HumpLength(100)([said(50), said(75)])
    assert [s.value for s in scores] == [1.0, 0.5]
    assert [s.parts["length"] for s in scores] == [50.0, 75.0]
    assert HumpLength(10)([]) == []


def test_what_was_cut_off_has_the_whole_budget():
    cut = HumpLength(100)([said(50, StopReason.LENGTH), said(50, StopReason.CONTEXT), said(50, StopReason.MAX_TURNS)])
    assert [s.value for s in cut] == [-1.0, -1.0, 1.0]
    assert LinearLength(100)([said(50, StopReason.LENGTH)])[0].value == 1.0


def test_the_line():
    np.testing.assert_allclose(LinearLength(10)([0, 5, 10, 99]), [0, 0.5, 1, 1])


def test_the_overlong_penalty():
    np.testing.assert_allclose(OverlongPenalty(10, 4)([0, 6, 8, 10, 99]), [0, 0, -0.5, -1, -1])
    with pytest.raises(ConfigError, match="buffer"):
        OverlongPenalty(10, 11)


def test_the_target():
    reward = TargetLength(lambda t: t.task.meta["budget"], alpha=0.1)
    assert [s.value for s in reward([said(12, budget=10), said(7, budget=10)])] == pytest.approx([-0.2, -0.3])
    assert TargetLength(10, 0.1, only_above=True)([said(7)])[0].value == 0.0
    with pytest.raises((ConfigError, RewardError), match="target"):
        reward([said(1, budget=0)])
    with pytest.raises(ConfigError, match="target"):
        TargetLength(0)


def test_characters_never_stand_in_for_tokens():
    text = Trajectory(Task("t", "q"), (Turn("policy", "four words are here"),), StopReason.EOS)
    with pytest.raises(RewardError, match="count="):
        HumpLength(10)([text])
    assert policy_length(text, lambda s: len(s.split())) == 4
    assert HumpLength(8, count=lambda s: len(s.split())).text(completion="four words are here").value == 1.0
    assert gd.rewards.HumpLength(8).text(completion="").value == 0.0
