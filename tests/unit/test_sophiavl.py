"""Trust weights, their combination with an annealed judge, and balanced bins: by hand and against a slow reference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import ConfigError
from guerdon.reward_models import JudgeRewardModel, balanced_bins
from guerdon.shaping import TrustCombine, TrustScores, trust_weight
from guerdon.types import Score, Span, StopReason, Task, Trajectory, Turn

NAN = math.nan


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-12)


def test_trust_by_hand():
    outcome = [1, 0, 1, 0, 1, 1, 0, 0]
    thinking = [0.9, 0.1, 0.2, 0.8, 0.1, 0.3, 0.9, 0.7]
    groups = [0, 0, 1, 1, 2, 2, 3, 3]
    # right above wrong; right 0.6 below wrong; nothing wrong; nothing right
    close(trust_weight(outcome, thinking, groups), [1, math.exp(-0.6), 1, 1])
    close(trust_weight(outcome, thinking, groups, exponent=2.0)[1], math.exp(-1.2))


def test_the_threshold_itself_is_right():
    close(trust_weight([0.5, 0.4], [0.0, 1.0], [0, 0]), [math.exp(-1)])
    close(trust_weight([0.5, 0.4], [0.0, 1.0], [0, 0], 0.51), [1])


def test_groups_of_any_size_and_order_are_sorted():
    close(trust_weight([1, 0, 0, 1, 1], [0.2, 0.5, 0.7, 0.9, 0.6], ["b", "b", "b", "a", "b"]), [1, math.exp(0.4 - 0.6)])
    assert trust_weight([], [], []).shape == (0,)
    assert trust_weight(torch.ones(2), torch.ones(2), torch.tensor([5, 2])).tolist() == [1, 1]


def test_the_weight_is_a_constant():
    thinking = torch.tensor([0.1, 0.9], requires_grad=True)
    assert not trust_weight(torch.tensor([1.0, 0.0]), thinking, [0, 0]).requires_grad
    assert not TrustCombine(anneal=None)(torch.tensor([1.0, 0.0]), thinking, [0, 0], 0).total.requires_grad


def test_refusals_of_the_weight():
    for outcome, thinking, groups in (([1, 0], [1], [0, 0]), ([1], [1], [0, 0]), ([1.5], [1], [0]), ([NAN], [1], [0])):
        with pytest.raises(ValueError):
            trust_weight(outcome, thinking, groups)


unit = st.floats(0, 1)
rows = st.lists(st.tuples(unit, unit, st.integers(0, 3)), min_size=1, max_size=20)


@pytest.mark.property
@settings(max_examples=80, deadline=None)
@given(rows, st.integers(0, 500), st.booleans())
def test_against_a_slow_reference(drawn, step, skip):
    outcome, thinking, ids = (list(x) for x in zip(*drawn, strict=True))
    combine = TrustCombine(T=200.0, skip_uniform=(0.1, 0.9) if skip else None)
    batch = combine(outcome, thinking, ids, step)
    for g, gamma in zip(sorted(set(ids)), batch.gamma.tolist(), strict=True):
        member = [i for i in range(len(ids)) if ids[i] == g]
        right = [thinking[i] for i in member if outcome[i] >= 0.5]
        wrong = [thinking[i] for i in member if outcome[i] < 0.5]
        expected = 1.0
        if right and wrong:
            expected = min(1.0, math.exp(sum(right) / len(right) - sum(wrong) / len(wrong)))
        if skip and (all(outcome[i] >= 0.9 for i in member) or all(outcome[i] <= 0.1 for i in member)):
            expected = 0.0
        assert gamma == pytest.approx(expected, abs=1e-9)
        assert gamma == 0 or math.exp(-1) - 1e-12 <= gamma <= 1
        for i in member:
            total = outcome[i] + expected * 0.3 * math.exp(-step / 200) * thinking[i]
            assert batch.total[i].item() == pytest.approx(total, abs=1e-9)


@pytest.mark.property
@settings(max_examples=30, deadline=None)
@given(rows, st.randoms())
def test_the_order_of_samples_does_not_matter(drawn, random):
    order = list(range(len(drawn)))
    random.shuffle(order)
    combine = TrustCombine(anneal=None)
    whole = combine(*(list(x) for x in zip(*drawn, strict=True)), 0).total
    mixed = combine(*(list(x) for x in zip(*[drawn[i] for i in order], strict=True)), 0).total
    close(mixed, whole[order])


def test_the_formula_of_the_paper():
    batch = TrustCombine(alpha=0.3, T=100)([1, 0], [0.2, 0.8], [0, 0], 50)
    gamma, factor = math.exp(-0.6), math.exp(-0.5)
    close(batch.gamma, [gamma])
    assert batch.anneal == pytest.approx(factor)
    close(batch.total, [1 + gamma * 0.3 * factor * 0.2, gamma * 0.3 * factor * 0.8])


def test_ablations():
    outcome, thinking, ids = [1, 0], [0.2, 0.8], [0, 0]
    close(TrustCombine(anneal=None, trust=False)(outcome, thinking, ids, 9).total, [1.06, 0.24])
    close(TrustCombine(anneal=None)(outcome, thinking, ids, 9).gamma, [math.exp(-0.6)])
    # Released code: wrong samples are not judged, so the weight is 1.
    close(TrustCombine(anneal=None, min_outcome=0.2)(outcome, thinking, ids, 0).total, [1.06, 0])
    close(TrustCombine(alpha=0, anneal=None)(outcome, thinking, ids, 0).total, outcome)


def test_uniform_groups_are_left_to_the_outcome():
    outcome, thinking = [1, 0.9, 0, 0.1, 1, 0], [0.2, 0.8, 0.2, 0.8, 0.5, 0.5]
    ids = [0, 0, 1, 1, 2, 2]
    combine = TrustCombine(anneal=None)
    batch = combine(outcome, thinking, ids, 0)
    close(batch.total, [1, 0.9, 0, 0.1, 1.15, 0.15])
    close(batch.gamma, [0, 0, 1])
    assert combine.counts["skipped"] == 2 and combine.counts["groups"] == 3
    assert combine.asks(outcome, ids).tolist() == [False] * 4 + [True] * 2
    close(TrustCombine(anneal=None, skip_uniform=None)(outcome, thinking, ids, 0).total[:2], [1.06, 1.14])


def test_missing_and_outlying_judgements():
    combine = TrustCombine(anneal=None)
    batch = combine([1, 0, 0, 1], [NAN, None, 1.7, -0.5], [0, 0, 0, 0], 0)
    # right: 0 and 0, wrong: 0 and 1
    close(batch.gamma, [math.exp(-0.5)])
    close(batch.total, [1, 0, 0.3 * math.exp(-0.5), 1])
    assert combine.counts["missing"] == 2 and combine.counts["clipped"] == 2
    other = TrustCombine(anneal=None)
    other.load_state_dict(combine.state_dict())
    assert other.counts == combine.counts


def test_annealing_needs_a_constant():
    assert TrustCombine().factor(0) == 1.0
    with pytest.raises(ConfigError, match="T"):
        TrustCombine()([1, 0], [0, 0], [0, 0], 1)
    for bad in (
        {"T": 0},
        {"T": -1},
        {"T": math.inf},
        {"alpha": -1},
        {"anneal": "linear"},
        {"skip_uniform": (0.9, 0.1)},
    ):
        with pytest.raises(ConfigError):
            TrustCombine(**bad)
    with pytest.raises(ValueError, match="step"):
        TrustCombine(T=1)([1], [1], [0], -1)


def said(text, task):
    return Trajectory(Task(task, "q"), (Turn("policy", text),), StopReason.EOS)


def test_as_the_shape_of_a_run():
    asked = []

    def judge(trajectories):
        asked.extend(t.turns[0].text for t in trajectories)
        return [Score(0.2) if "right" in t.turns[0].text else 0.8 for t in trajectories]

    shape = TrustScores(judge, TrustCombine(T=10))
    given = [said("right", "b"), said("wrong", "b"), said("sure", "a"), said("sure", "a"), said("x", "b")]
    scores = [Score(1.0), Score(0.0), Score(1.0), Score(1.0), Score.invalid("broken")]
    first = shape(given, scores)
    gamma = math.exp(-0.6)
    close([s.value for s in first[:4]], [1 + gamma * 0.3 * 0.2, gamma * 0.3 * 0.8, 1, 1])
    assert asked == ["right", "wrong"] and not first[4].valid
    assert first[0].parts == pytest.approx({"outcome": 1.0, "thinking": 0.2, "gamma": gamma, "anneal": 1.0})
    second = TrustScores(judge, TrustCombine(T=10))
    second.load_state_dict(shape.state_dict())
    values = [[s.value for s in one(given, scores)[:4]] for one in (shape, second)]
    assert values[0] == values[1] and values[0][1] == pytest.approx(gamma * 0.3 * math.exp(-0.1) * 0.8)


def test_a_failed_judgement_is_missing_not_fatal():
    judge = JudgeRewardModel(lambda prompts: ["no idea" for _ in prompts])
    shape = TrustScores(judge, TrustCombine(anneal=None))
    out = shape([said("a", "t"), said("b", "t")], [Score(1.0), Score(0.0)])
    assert [s.value for s in out] == [1.0, 0.0] and shape.combine.counts["missing"] == 2
    assert judge.judge.failures["unreadable"] == 2


def test_refusals_of_the_shape():
    with pytest.raises(ConfigError, match="T"):
        TrustScores(lambda t: [], TrustCombine())
    shape = TrustScores(lambda t: [0.0] * len(t), TrustCombine(anneal=None))
    with pytest.raises(ValueError, match="step or token"):
        shape([said("a", "t")], [Score(1.0, (1.0,), (Span(0, 1),))])
    with pytest.raises(ValueError, match="0 scores"):
        shape([said("a", "t")], [])


def test_bins_by_hand():
    scores = [0.0, 0.05, 0.1, 0.3, 0.7, 0.95, 1.0]
    with pytest.warns(UserWarning, match="5 of 10 bins"):
        picked = balanced_bins(scores, low=1, high=9)
    assert picked.tolist() == list(range(7))


def test_borders_belong_to_the_bin_above():
    scores = [k / 10 for k in range(10) for _ in range(5)]
    picked = balanced_bins(scores, low=1, high=2)
    assert sorted(np.bincount((np.array(scores)[picked] * 10 + 0.5).astype(int)).tolist()) == [2] * 10


@pytest.mark.property
@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=60), st.integers(1, 12), st.integers(0, 9), st.integers(0, 3))
def test_bins_hold_no_more_than_they_may(scores, n_bins, high, seed):
    picked = balanced_bins(scores, n_bins, 0, high, seed)
    assert len(set(picked.tolist())) == len(picked)
    bins = np.minimum((np.array(scores, dtype=float) * n_bins + 1e-9).astype(int), n_bins - 1)
    for b in range(n_bins):
        assert (bins[picked] == b).sum() == min((bins == b).sum(), high)
    assert picked.tolist() == balanced_bins(scores, n_bins, 0, high, seed).tolist()


def test_refusals_of_the_bins():
    for scores in ([1.1], [-0.1], [NAN], [[0.1]]):
        with pytest.raises(ValueError):
            balanced_bins(scores)
    for bad in ({"n_bins": 0}, {"low": 5, "high": 4}, {"low": -1}):
        with pytest.raises(ConfigError):
            balanced_bins([0.1], **bad)
