"""Properties of turn rewards: contributions sum to the prediction, placing loses nothing, potentials telescope."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.credit import exact_redistribution, fuse, place_on_turn_ends, redistribute, turn_ends
from guerdon.environments.gridworld_text import ACTIONS, NOTHING, TextGrid, random_layout
from guerdon.reward_models import ProgressEstimator
from guerdon.rewards import grounding_signal
from guerdon.types import StopReason, Task, Trajectory, Turn

pytestmark = pytest.mark.property
torch.set_num_threads(1)

finite = st.floats(-10, 10, allow_nan=False)
masks = st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4)


@given(masks, st.randoms())
def test_placing_keeps_every_reward_on_a_policy_token_and_nothing_else(rows, rng):
    mask = torch.tensor(rows)
    ends = turn_ends(mask)
    rewards = [[rng.uniform(-1, 1) for _ in e] for e in ends]
    out = place_on_turn_ends([torch.tensor(r, dtype=torch.float64) for r in rewards], mask)
    assert torch.equal(out[~mask], torch.zeros(int((~mask).sum()), dtype=torch.float64))
    for row, made, end in zip(rewards, out, ends, strict=True):
        assert made[end].tolist() == row and sum(row) == pytest.approx(float(made.sum()))
    for row, end in zip(mask, ends, strict=True):
        starts = int(row[0]) + int((row[1:] & ~row[:-1]).sum())
        assert len(end) == starts, "as many ends as turns begin"


@given(st.lists(finite, min_size=1, max_size=12), finite)
def test_exact_contributions_sum_to_the_return_and_keep_their_differences(values, total):
    c = torch.tensor(values, dtype=torch.float64)
    out = exact_redistribution(c, total)
    assert float(out.sum()) == pytest.approx(total, abs=1e-9)
    assert torch.allclose(out - out[0], c - c[0], atol=1e-9)


@given(st.lists(st.tuples(finite, st.booleans()), max_size=12), finite, finite)
def test_fusing_is_linear(turns, alpha, beta):
    c, g = [t[0] for t in turns], [float(t[1]) for t in turns]
    out = fuse(torch.tensor(c, dtype=torch.float64), g, alpha, beta)
    assert float(out.sum()) == pytest.approx(alpha * sum(c) + beta * sum(g), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 1000))
def test_the_prediction_is_the_sum_of_contributions_and_batching_changes_nothing(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    estimator = ProgressEstimator(3, hidden=8, seed=seed)
    with torch.no_grad():
        estimator.head[-1].weight.normal_(generator=generator)
    rows = [torch.randn(n, 3, generator=generator) for n in lengths]
    made = redistribute(estimator, rows)
    for row, c, batched in zip(rows, made, estimator.step_scores(rows), strict=True):
        assert c.shape == (len(row),)
        assert estimator.predict(row) == pytest.approx(float(c.double().sum()), abs=1e-5)
        assert torch.allclose(c, batched, atol=1e-5)
        for t in range(len(row)):
            assert torch.allclose(estimator.contributions(row[: t + 1]), c[: t + 1], atol=1e-5), "causal"


@given(st.lists(st.tuples(st.sampled_from("pe"), st.sampled_from(["go", f"x {NOTHING}", ""])), max_size=12))
def test_grounding_gives_one_sign_per_turn(said):
    turns = tuple(Turn("policy" if who == "p" else "environment", text) for who, text in said)
    signal = grounding_signal(Trajectory(Task("t", "q"), turns, StopReason.DONE), last=None)
    assert len(signal) == sum(who == "p" and bool(text) for who, text in said) and set(signal) <= {0.0, 1.0}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.sampled_from([*ACTIONS, "take door", ""]), max_size=20))
def test_potential_gains_telescope_and_rejected_actions_gain_nothing(seed, actions):
    layout = random_layout(random.Random(seed), width=5, height=3, shortest=(5, 12))
    game = TextGrid(layout)
    gains, before = [], layout.potential(game.state)
    for action in actions:
        if game.over:
            break
        info = game.step(action)[4]
        gains.append(info["potential"] - before)
        before = info["potential"]
        if not info["executed"]:
            assert gains[-1] == 0
    assert sum(gains) == pytest.approx(layout.potential(game.state)) and before <= 1.0
    assert (before == 1.0) == (game.state.at == layout.goal)
