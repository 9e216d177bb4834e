"""Flips, fallback and calibration against the branch tables of the paper."""

import math

import numpy as np
import pytest
import torch

from guerdon.errors import ConfigError
from guerdon.rewards import OPEN_PHRASES, BoxedMatch, PhraseReward
from guerdon.shaping import CalibrateLow, Fallback, FlipScores, GroupFlip, calibrate_low, fallback, flip, warm_up
from guerdon.types import Score, Span, StopReason, Task, Trajectory, Turn

T = torch.tensor


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def said(text, task="t", reference="4"):
    return Trajectory(Task(task, "q", reference), (Turn("policy", text),), StopReason.EOS)


def test_flip_table():
    out = flip(f64(1, 0, 1, 0, 1, 0), T([0, 0, 1, 1, 1, 1]).bool(), T([1, 1, 1, 1, 0, 0]).bool())
    assert out.tolist() == [1, 0, 0, 1, 0, 0] and out.dtype == torch.float64
    with pytest.raises(ValueError, match="0 or 1"):
        flip(f64(0.5), T([True]), T([True]))
    with pytest.raises(ValueError, match="0 or 1"):
        flip(f64(math.nan), T([True]), T([True]))
    with pytest.raises(ValueError, match="shapes differ"):
        flip(f64(1, 0), T([True]), T([True, True]))


def test_the_pattern_reward_for_wrong_answers():
    # (flip, outcome) -> reward: (0,1) 1, (0,0) rpr, (1,1) rpr, (1,0) 1; nothing without an answer
    noisy = flip(f64(1, 0, 1, 0, 0), T([0, 0, 1, 1, 1]).bool(), T([1, 1, 1, 1, 0]).bool())
    out = fallback(noisy, f64(0.3, 0.3, 0.3, 0.3, 0.3), T([1, 1, 1, 1, 0]).bool())
    assert out.tolist() == [1, 0.3, 0.3, 1, 0]
    with pytest.raises(ValueError, match="finite"):
        fallback(f64(0), f64(math.inf))


def test_groups_flip_whole_and_in_the_order_of_appearance():
    ids = ["b", "a", "b", "c", "a", "c"]
    flips = GroupFlip(0.5, seed=3)
    expected = dict(zip(("b", "a", "c"), np.random.Generator(np.random.PCG64(3)).random(3) < 0.5, strict=True))
    out = flips([1, 1, 0, 1, 0, 0], ids, [True] * 6)
    assert out.tolist() == [float(r != expected[g]) for r, g in zip([1, 1, 0, 1, 0, 0], ids, strict=True)]
    assert flips.last == expected and flips.counts["groups"] == 3
    assert flips.counts["flipped"] == sum(expected.values())


def test_the_rate_of_flips_is_p():
    flips = GroupFlip(0.4, seed=0)
    ones = torch.ones(20_000)
    share = 1 - flips(ones, torch.arange(20_000), ones.bool()).mean().item()
    assert share == pytest.approx(0.4, abs=4 * math.sqrt(0.24 / 20_000))


def test_no_noise_draws_nothing():
    flips = GroupFlip(0.0, seed=1)
    before = flips.state_dict()["generator"]
    assert flips([1, 0], [0, 1], [True, True]).tolist() == [1, 0]
    assert flips.state_dict()["generator"] == before
    loud = GroupFlip(1.0, seed=1)
    before = loud.state_dict()["generator"]
    assert loud([1, 0], [0, 1], [True, True], training=False).tolist() == [1, 0]
    assert loud.state_dict()["generator"] == before
    assert loud([1, 0, 0], [0, 0, 0], [True, True, False]).tolist() == [0, 1, 0]


def test_flips_resume_where_they_stopped():
    flips = GroupFlip(0.5, seed=5)
    flips([1] * 9, list(range(9)), [True] * 9)
    other = GroupFlip(0.5, seed=99)
    other.load_state_dict(flips.state_dict())
    again = [f([1] * 9, list(range(9)), [True] * 9).tolist() for f in (flips, other)]
    assert again[0] == again[1] and flips.counts == other.counts
    with pytest.raises(ConfigError, match=r"p=0\.5"):
        GroupFlip(0.4).load_state_dict(flips.state_dict())


def test_a_seed_of_none_is_told():
    a = GroupFlip(0.5)
    b = GroupFlip(0.5, a.seed)
    assert a([1] * 50, range(50), [True] * 50).tolist() == b([1] * 50, range(50), [True] * 50).tolist()


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, True, "0.4"])
def test_p_is_a_probability(p):
    with pytest.raises(ConfigError, match="p must be"):
        GroupFlip(p)


def test_group_flip_refuses_before_it_draws():
    flips = GroupFlip(0.5, seed=0)
    before = flips.state_dict()
    for rewards, ids, found in (([1, 0], [0], [True, True]), ([0.5], [0], [True]), ([1], [0], [True, False])):
        with pytest.raises(ValueError):
            flips(rewards, ids, found)
    assert flips.state_dict() == before
    assert flips([], [], []).shape == (0,)


def test_scores_are_flipped_by_task():
    tasks = [f"t{k // 2}" for k in range(20)]
    trajectories = [said("\\boxed{4}" if k % 2 else "\\boxed{5}", t) for k, t in enumerate(tasks)]
    shape = FlipScores(0.5, seed=0)
    out = shape(trajectories, BoxedMatch()(trajectories))
    for a, b in zip(out[::2], out[1::2], strict=True):
        assert a.value == 1 - b.value and a.parts["flipped"] == b.parts["flipped"] == a.value
        assert (a.parts["outcome"], b.parts["outcome"]) == (0.0, 1.0)
    assert 0 < shape.flips.counts["flipped"] < 10
    resumed = FlipScores(0.5, seed=7)
    resumed.load_state_dict(shape.state_dict())
    pair = [s(trajectories, BoxedMatch()(trajectories)) for s in (shape, resumed)]
    assert [s.value for s in pair[0]] == [s.value for s in pair[1]]


def test_scores_without_an_answer_or_without_a_value():
    given = [said("no answer"), said("\\boxed{5}")]
    out = FlipScores(1.0)(given, BoxedMatch()(given))
    assert [s.value for s in out] == [0.0, 1.0]
    bad = Score.invalid("broken")
    assert FlipScores(1.0)([given[0]], [bad])[0] is bad
    with pytest.raises(ValueError, match="extracted"):
        FlipScores(0.5)(given[:1], [Score(1.0)])
    with pytest.raises(ValueError, match="step or token"):
        FlipScores(0.5)(given[:1], [Score(1.0, (1.0,), (Span(0, 1),))])
    with pytest.raises(ValueError, match="2 scores for 1"):
        FlipScores(0.5)(given[:1], [bad, bad])


def test_flipped_scores_may_fall_back_on_the_pattern_reward():
    given = [said("wait thus \\boxed{4}", "a"), said("wait thus \\boxed{5}", "a"), said("wait thus", "a")]
    clean = FlipScores(0.0, wrong=PhraseReward())(given, BoxedMatch()(given))
    assert [s.value for s in clean] == pytest.approx([1.0, 0.1, 0.0])
    flipped = FlipScores(1.0, wrong=PhraseReward())(given, BoxedMatch()(given))
    assert [s.value for s in flipped] == pytest.approx([0.1, 1.0, 0.0])


def test_fallback_of_two_functions():
    both = Fallback(lambda texts: [float("ok" in t) for t in texts], PhraseReward())
    assert both(["ok", "wait", "wait"], [True, True, False]).tolist() == pytest.approx([1, 0.05, 0])
    assert both(["ok", "wait"]).tolist() == pytest.approx([1, 0.05])


def test_the_warm_up():
    a, b = f64(1.0), f64(2.0)
    assert [warm_up(a, b, k, 2).item() for k in range(4)] == [1, 1, 2, 2]
    assert warm_up(a, b, 10**9, math.inf) is a and warm_up(a, b, 0, 0) is b
    for step, steps in ((0, -1), (0, math.nan), (-1, 1)):
        with pytest.raises(ValueError):
            warm_up(a, b, step, steps)


def test_calibration_by_hand():
    base, bonus = f64(0.0, 0.49, 0.5, 0.9, 0.3), f64(0.5, 1.0, 1.0, 1.0, 1.0)
    valid = T([1, 1, 1, 1, 0]).bool()
    assert calibrate_low(base, bonus, valid).tolist() == pytest.approx([0.05, 0.59, 0.5, 0.9, 0.0])
    assert calibrate_low(base, bonus, valid, pay_invalid=True).tolist() == pytest.approx([0.05, 0.59, 0.5, 0.9, 0.1])
    assert calibrate_low(f64(0.45), f64(1), T([True]), alpha=0.9, cap=1.0).item() == 1.0
    assert calibrate_low(f64(0.0), f64(1), T([True]), squash="sigmoid").item() == 0.5
    assert calibrate_low(f64(math.nan), f64(1), T([False])).item() == 0.0


@pytest.mark.parametrize(
    ("options", "base", "bonus"),
    [
        ({"alpha": -1}, 0.1, 0.1), ({"tau": math.inf}, 0.1, 0.1), ({"cap": 0.1}, 0.1, 0.1), ({"squash": "tanh"}, 0.1, 0.1),
        ({}, 1.5, 0.1), ({}, -0.1, 0.1), ({}, math.nan, 0.1), ({}, 0.1, 1.5), ({}, 0.1, math.nan),
    ],
)  # fmt: skip
def test_calibration_refuses(options, base, bonus):
    with pytest.raises(ValueError):
        calibrate_low(f64(base), f64(bonus), T([True]), **options)


def test_gradients_flow_through_the_calibration():
    base = f64(0.2, 0.7, 0.3).requires_grad_()
    calibrate_low(base, f64(1, 1, 1), T([1, 1, 0]).bool()).sum().backward()
    assert base.grad.tolist() == [1, 1, 0]


def test_calibration_of_texts_is_for_training():
    calibrate = CalibrateLow(PhraseReward(OPEN_PHRASES, stop_marker=None, think_tag=None))
    texts = ["wait, i will", "wait, i will", "wait"]
    out = calibrate([0.2, 0.8, 0.2], texts, [True, True, False])
    assert out.tolist() == pytest.approx([0.21, 0.8, 0.0])
    assert calibrate([0.2, 0.8, 0.2], texts, [True, True, False], training=False).tolist() == [0.2, 0.8, 0.0]
    with pytest.raises(ValueError, match="1 texts for 2"):
        calibrate([0.1, 0.2], ["x"], [True, True])
    with pytest.raises(ConfigError, match="alpha"):
        CalibrateLow(PhraseReward(), alpha=-1)
    scores = [Score(0.2, parts={"extracted": 1.0}), Score.invalid("broken"), Score(0.2, parts={"extracted": 0.0})]
    shaped = calibrate.scores([said(t) for t in texts], scores)
    assert shaped[0].value == pytest.approx(0.21) and shaped[0].parts["uncalibrated"] == 0.2
    assert not shaped[1].valid and shaped[2].value == 0.0
