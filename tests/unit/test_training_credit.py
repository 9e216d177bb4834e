"""Credit in pure functions: hand-computed values, slow references, and the exact gradient of a small problem."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import guerdon as gd
from guerdon.credit import (
    leave_one_out,
    per_channel,
    process_relative,
    reinforce,
    reinforce_plus_plus,
    step_leave_one_out,
)

NAN = float("nan")


def grid(rows: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and mask of ragged rows; NaN behind them, which nobody may read."""
    width = max((len(r) for r in rows), default=0) + 1
    values = torch.full((len(rows), width), NAN, dtype=torch.float64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        values[b, : len(row)] = torch.tensor(row, dtype=torch.float64)
        mask[b, : len(row)] = True
    return values, mask


# REINFORCE --------------------------------------------------------------------------------------------------------------


def test_reinforce_by_hand() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    assert reinforce(rewards, baseline="none").tolist() == [1.0, 2.0, 6.0]
    assert reinforce(rewards, baseline="batch").tolist() == [1 - 4, 2 - 3.5, 6 - 1.5]
    assert reinforce(rewards, baseline="running", running=0.5).tolist() == [0.5, 1.5, 5.5]
    assert reinforce(torch.tensor([3]), baseline="batch").tolist() == [3.0]


def test_reinforce_leaves_invalid_members_out() -> None:
    rewards = torch.tensor([1.0, NAN, 3.0])
    valid = torch.tensor([True, False, True])
    assert reinforce(rewards, valid).tolist() == [-2.0, 0.0, 2.0]
    assert reinforce(rewards, valid, baseline="running", running=1.0).tolist() == [0.0, 0.0, 2.0]
    assert reinforce(torch.zeros(0)).tolist() == []
    with pytest.raises(ValueError, match="baseline must be"):
        reinforce(rewards, baseline="mean")
    with pytest.raises(ValueError, match=r"must be \[B\]"):
        reinforce(torch.zeros(2, 2))


def test_leave_one_out_is_group_relative_times_a_factor() -> None:
    rewards, ids = torch.randn(12, dtype=torch.float64), torch.arange(12) % 3
    centred = gd.credit.group_relative(rewards, ids, scale=False)
    assert torch.allclose(leave_one_out(rewards, ids), centred * 4 / 3)


# Several rewards --------------------------------------------------------------------------------------------------------


def test_channels_are_normalised_apart_before_they_are_weighted() -> None:
    """A channel of large variance does not drown a small one, as it does in the sum."""
    channels = torch.tensor([[0.0, 0.0], [0.0, 1.0], [100.0, 0.0], [100.0, 1.0]], dtype=torch.float64)
    ids = torch.zeros(4, dtype=torch.long)
    out = per_channel(channels, ids, [1.0, 1.0], eps=0.0)
    std0, std1 = math.sqrt(4 * 50.0**2 / 3), math.sqrt(4 * 0.25 / 3)
    want = [-50 / std0 - 0.5 / std1, -50 / std0 + 0.5 / std1, 50 / std0 - 0.5 / std1, 50 / std0 + 0.5 / std1]
    assert out.tolist() == pytest.approx(want)
    summed = gd.credit.group_relative(channels.sum(1), ids, eps=0.0)
    assert out[1] - out[0] == pytest.approx(float(out[2] - out[0])) and summed[1] - summed[0] < 0.02


def test_one_channel_is_group_relative_and_leave_one_out() -> None:
    rewards, ids = torch.randn(9, 1, dtype=torch.float64), torch.arange(9) % 2
    assert torch.allclose(per_channel(rewards, ids, [1.0]), gd.credit.group_relative(rewards[:, 0], ids))
    loo = per_channel(rewards, ids, [0.5], baseline="leave_one_out")
    assert torch.allclose(loo, 0.5 * leave_one_out(rewards[:, 0], ids))
    white = per_channel(rewards, ids, [3.0], whiten_batch=True)
    assert float(white.mean()) == pytest.approx(0.0, abs=1e-12) and float(white.std()) == pytest.approx(1.0, abs=1e-6)


def test_channels_need_a_weight_each() -> None:
    with pytest.raises(ValueError, match="one column per weight"):
        per_channel(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), [1.0])
    out = per_channel(
        torch.tensor([[NAN], [1.0], [3.0]]), torch.zeros(3, dtype=torch.long), [1.0], torch.tensor([False, True, True])
    )
    assert out[0] == 0.0 and torch.isfinite(out).all()


# Steps ------------------------------------------------------------------------------------------------------------------


def test_process_relative_by_hand() -> None:
    values, mask = grid([[1.0, 0.0], [0.0], [5.0, 5.0]])
    out = process_relative(values, mask, torch.tensor([0, 0, 1]), eps=0.0)
    mean = 1 / 3
    std = math.sqrt(((1 - mean) ** 2 + 2 * mean**2) / 2)
    first, second = (1 - mean) / std, -mean / std
    assert out[0].tolist() == pytest.approx([first + second, second, 0.0])
    assert out[1].tolist() == pytest.approx([second, 0.0, 0.0])
    assert out[2].tolist() == [0.0, 0.0, 0.0]  # a group without variance


def slow_leave_one_out(rows: list[list[float]], ids: list[int], valid: list[bool], gamma: float) -> list[list[float]]:
    def togo(row: list[float], k: int) -> float:
        return sum(gamma ** (j - k) * r for j, r in enumerate(row) if j >= k)

    out = []
    for b, row in enumerate(rows):
        others = [c for c in range(len(rows)) if c != b and ids[c] == ids[b] and valid[c]]
        if not valid[b] or not others:
            out.append([0.0] * len(row))
            continue
        out.append([togo(row, k) - sum(togo(rows[c], k) for c in others) / len(others) for k in range(len(row))])
    return out


ROWS = st.lists(st.lists(st.floats(-3, 3), max_size=5), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.data())
def test_step_leave_one_out_equals_the_slow_reference(rows: list[list[float]], data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    valid = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    gamma = data.draw(st.sampled_from([1.0, 0.5, 0.0]))
    values, mask = grid(rows)
    for b, ok in enumerate(valid):
        if not ok:
            values[b] = NAN
    got = step_leave_one_out(values, mask, torch.tensor(ids), torch.tensor(valid), gamma=gamma)
    clean = [row if ok else [0.0] * len(row) for row, ok in zip(rows, valid, strict=True)]
    for b, want in enumerate(slow_leave_one_out(clean, ids, valid, gamma)):
        assert got[b, : len(want)].tolist() == pytest.approx(want, abs=1e-9)
        assert not got[b, len(want) :].any()


@settings(max_examples=30, deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_order_does_not_matter(rows: list[list[float]], rng) -> None:
    values, mask = grid(rows)
    ids = torch.tensor([k % 2 for k in range(len(rows))])
    order = list(range(len(rows)))
    rng.shuffle(order)
    for function in (process_relative, step_leave_one_out):
        straight = function(values, mask, ids)
        shuffled = function(values[order], mask[order], ids[order])
        assert torch.allclose(straight[order], shuffled, atol=1e-9)


def test_steps_must_be_gathered_to_the_left_and_shapes_must_agree() -> None:
    values = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="first columns"):
        step_leave_one_out(values, torch.tensor([[True, False, True]]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"one \[B, K\] each"):
        process_relative(values, torch.ones(1, 2), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"group ids"):
        process_relative(values, torch.ones(1, 3), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="gamma"):
        step_leave_one_out(values, torch.ones(1, 3), torch.tensor([0]), gamma=1.5)
    for function in (process_relative, step_leave_one_out):
        assert function(torch.zeros(0, 0), torch.zeros(0, 0), torch.zeros(0, dtype=torch.long)).shape == (0, 0)
        assert function(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 0])).tolist() == [[0.0] * 3] * 2


def test_reinforce_plus_plus_is_whitened_returns() -> None:
    values, mask = grid([[0.0, 1.0], [2.0]])
    out = reinforce_plus_plus(values, mask, gamma=0.5)
    togo = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    want = (togo - togo.mean()) / togo.std()
    assert torch.allclose(out[mask], want, atol=1e-6) and not out[~mask].any()


def test_float64_stays_and_float32_stays() -> None:
    for dtype in (torch.float32, torch.float64):
        values, mask, ids = torch.randn(4, 3, dtype=dtype), torch.ones(4, 3), torch.tensor([0, 0, 1, 1])
        for out in (
            process_relative(values, mask, ids),
            step_leave_one_out(values, mask, ids),
            reinforce_plus_plus(values, mask),
            per_channel(values, ids, [1.0, 2.0, 3.0]),
            reinforce(values[:, 0]),
        ):
            assert out.dtype == dtype


# Length bias ------------------------------------------------------------------------------------------------------------


class Stopping:
    """The policy may stop at each of three steps; every step it takes is paid, the more the later it dares to go.

    At step k it stops with probability sigmoid(theta_k); after the third step it is over in any case.
    """

    def __init__(self, theta: list[float]) -> None:
        self.theta = np.array(theta)
        self.rewards = {(0, 0): -0.3, (0, 1): 0.4, (1, 0): -0.5, (1, 1): 0.1, (2, 0): 2.5, (2, 1): 0.2}

    def trajectories(self):
        """All of them: probability, rewards and scores (d log pi / d theta) of each step."""
        stop = 1 / (1 + np.exp(-self.theta))
        for length in (1, 2, 3):
            for last in (0, 1) if length == 3 else (1,):
                actions = [0] * (length - 1) + [last]
                probability = float(np.prod([stop[k] if a else 1 - stop[k] for k, a in enumerate(actions)]))
                scores = np.zeros((length, 3))
                for k, a in enumerate(actions):
                    scores[k, k] = (1 - stop[k]) if a else -stop[k]
                yield probability, [self.rewards[k, a] for k, a in enumerate(actions)], scores

    def exact(self) -> np.ndarray:
        """Gradient of the expected return."""
        return sum(p * sum(rewards) * scores.sum(0) for p, rewards, scores in self.trajectories())

    def expected(self, estimate, members: int) -> np.ndarray:
        """Expectation of the group's gradient, over all groups of so many independent trajectories."""
        total = np.zeros(3)
        for group in itertools.product(list(self.trajectories()), repeat=members):
            weight = math.prod(p for p, _, _ in group)
            values, mask = grid([rewards for _, rewards, _ in group])
            advantage = estimate(values, mask).numpy()
            for b, (_, rewards, scores) in enumerate(group):
                total += weight / members * (advantage[b, : len(rewards), None] * scores).sum(0)
        return total


def per_index(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The tempting baseline: the mean over all members that reached this step, the member itself included."""
    togo = gd.credit.returns(values, mask)
    count = mask.double().sum(0)
    return torch.where(mask, togo - togo.sum(0) / count.clamp(min=1), 0.0)


@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("theta", [[0.0, 0.0, 0.0], [-1.0, 0.5, 0.3]])
def test_the_baseline_is_unbiased_where_the_policy_chooses_its_length(theta: list[float], members: int) -> None:
    problem = Stopping(theta)
    exact = problem.exact()
    ids = torch.zeros(members, dtype=torch.long)

    ours = problem.expected(lambda values, mask: step_leave_one_out(values, mask, ids), members)
    assert ours == pytest.approx(exact, abs=1e-12)

    naive = problem.expected(per_index, members)
    # Not even proportional: no step size makes up for it.
    scaled = naive * (naive @ exact) / (naive @ naive)
    assert np.linalg.norm(scaled - exact) > 0.3 * np.linalg.norm(exact)
    # Late steps, which few reach, are the ones that it neglects.
    shares = naive / exact
    assert abs(shares[2]) < abs(shares[1]) < abs(shares[0]) < 1


def test_the_other_baselines_of_token_returns_are_unbiased_too() -> None:
    problem, members = Stopping([0.2, -0.4, 0.1]), 3
    ids = torch.zeros(members, dtype=torch.long)

    def total(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        togo = gd.credit.returns(values, mask)
        others = gd.credit.group_statistics(togo[:, 0], ids).others
        return torch.where(mask, togo - others[:, None], 0.0)

    assert problem.expected(total, members) == pytest.approx(problem.exact(), abs=1e-12)
    plain = problem.expected(lambda values, mask: gd.credit.returns(values, mask), members)
    assert plain == pytest.approx(problem.exact(), abs=1e-12)


def test_process_supervision_of_the_paper_is_biased_and_says_so() -> None:
    problem, members = Stopping([0.0, 0.0, 0.0]), 2
    ids = torch.zeros(members, dtype=torch.long)
    biased = problem.expected(lambda values, mask: process_relative(values, mask, ids, scale=False), members)
    scaled = biased * (biased @ problem.exact()) / (biased @ biased)
    assert np.linalg.norm(scaled - problem.exact()) > 0.04 * np.linalg.norm(problem.exact())
    assert "step_leave_one_out" in (process_relative.__doc__ or "")
