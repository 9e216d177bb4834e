"""Clip and Delta: hand-computed vectors, the consequences that the paper draws, and the hack that they stop."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.credit import returns_relative, returns_to_go, to_token_rewards
from guerdon.errors import ConfigError, DataError, RewardError
from guerdon.evaluation import filler_check
from guerdon.parts import build
from guerdon.reward_models import ProcessReward
from guerdon.rewards import Reward
from guerdon.shaping import (
    Compose,
    StepClip,
    StepDelta,
    StepNormalise,
    choose_eta,
    clip_steps,
    delta_steps,
    normalise_steps,
    split_steps,
)
from guerdon.training import OnlineConfig
from guerdon.training.rules.process import ReturnsRelative
from guerdon.training.streams import collect
from guerdon.types import Group, Score, Span, StopReason, Task, Trajectory, Turn

NAN = math.nan
M = torch.tensor([[0.9, 0.4, 0.6, 0.8], [0.2, 0.7, NAN, NAN], [0.3, NAN, NAN, NAN], [NAN] * 4], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-12)


def test_clip_by_hand():
    close(StepClip(0.5)(M, MASK), [[0, -0.1, 0, 0], [-0.3, 0, 0, 0], [-0.2, 0, 0, 0], [0, 0, 0, 0]])
    close(clip_steps([[0.5]], eta=0.5), [[0.0]])


def test_delta_by_hand():
    # 0.9 - 0.4, 0.4 - 0.6, the last but one keeps 0.6, the last gets 0
    close(StepDelta()(M, MASK), [[0.5, -0.2, 0.6, 0], [0.2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    close(delta_steps([[0.3, 0.7, 0.1]]), [[0.3 - 0.7, 0.7, 0.0]])


def test_clip_then_delta_by_hand():
    both = Compose(StepClip(0.5), StepDelta())
    close(both(M, MASK), [[0 + 0.1, -0.1, 0, 0], [-0.3, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


def test_padding_is_no_neighbour():
    wide = torch.cat([M[:, :2], torch.full((4, 3), 7.0, dtype=torch.float64)], 1)
    mask = torch.tensor([[1, 1, 0, 0, 0]] * 4).bool()
    close(delta_steps(wide[:2], mask[:2])[:, :2], delta_steps(M[:2, :2]))


def test_gaps_in_the_mask_are_stepped_over():
    close(delta_steps([[0.9, 5.0, 0.4, 5.0, 0.8]], [[1, 0, 1, 0, 1]]), [[0.5, 0, 0.4, 0, 0]])


def test_normalised_by_hand():
    got = normalise_steps([[1.0, 0.0], [0.5, NAN]], [[1, 1], [1, 0]], eps=0.0)
    close(got, [[1, -1], [0, 0]])
    close(StepNormalise()([[0.7, 0.7]]), [[0, 0]])
    assert normalise_steps(torch.zeros(0, 0)).shape == (0, 0)


scores = st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=6), min_size=1, max_size=5)


def grid(rows):
    width = max(len(r) for r in rows)
    values = torch.tensor([r + [NAN] * (width - len(r)) for r in rows], dtype=torch.float64)
    return values, torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows]).bool()


@pytest.mark.property
@settings(max_examples=60, deadline=None)
@given(scores, st.floats(0.05, 0.95), st.floats(0, 3))
def test_the_consequences_hold(rows, eta, alpha):
    m, mask = grid(rows)
    clip, delta, both = StepClip(eta), StepDelta(), Compose(StepClip(eta), StepDelta())
    c, d, cd = (alpha * f(m, mask) for f in (clip, delta, both))
    for k, row in enumerate(rows):
        n = len(row)
        assert -alpha * eta * n - 1e-9 <= c[k].sum() <= 0
        lows = [min(x - eta, 0.0) for x in row]
        if n > 1:
            assert d[k].sum().item() == pytest.approx(alpha * row[0], abs=1e-9)
            assert cd[k].sum().item() == pytest.approx(alpha * lows[0], abs=1e-9)
        for values, own in ((d, row), (cd, lows)):
            togo = returns_to_go(values, mask)[k]
            for j in range(n - 1):
                assert togo[j].item() == pytest.approx(alpha * own[j], abs=1e-9)
            assert togo[n - 1] == 0 and bool((togo[n:] == 0).all())
        assert bool((returns_to_go(cd, mask)[k] <= 1e-9).all())


@pytest.mark.property
@settings(max_examples=40, deadline=None)
@given(scores, st.integers(1, 4))
def test_more_padding_changes_nothing(rows, extra):
    m, mask = grid(rows)
    wide = torch.cat([m, torch.full((len(m), extra), 0.5, dtype=torch.float64)], 1)
    pad = torch.cat([mask, torch.zeros(len(m), extra, dtype=torch.bool)], 1)
    for f in (StepClip(0.5), StepDelta(), StepNormalise(), Compose(StepClip(0.5), StepDelta())):
        close(f(wide, pad)[:, : m.shape[1]], f(m, mask))
        assert bool((f(wide, pad)[:, m.shape[1] :] == 0).all())


def test_missing_scores_are_neutral_and_counted():
    clip = StepClip(0.5)
    close(clip([[NAN, 0.2]]), [[0, -0.3]])
    assert clip.missing == 1
    with pytest.raises(ValueError, match="NaN"):
        StepDelta()([[NAN, 0.2]])


@pytest.mark.parametrize("eta", [0, 1, -0.1, NAN, True])
def test_eta_lies_strictly_inside(eta):
    with pytest.raises(ConfigError, match="eta"):
        StepClip(eta)


def test_refusals_of_the_transforms():
    for bad in ([[1.2]], [[-0.1]], [[math.inf]]):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            StepClip(0.5)(bad)
    with pytest.raises(ValueError, match="shape"):
        StepDelta()([[0.1, 0.2]], [[1]])
    with pytest.raises(ValueError, match="shape"):
        StepDelta()([0.1, 0.2])
    with pytest.raises(ConfigError, match="before StepDelta"):
        Compose(StepDelta(), StepClip(0.5))


def test_float_types_and_empty_batches():
    for f in (StepClip(0.5), StepDelta(), Compose()):
        assert f(torch.zeros(2, 3, dtype=torch.float32), torch.ones(2, 3)).dtype == torch.float32
        assert f(torch.zeros(0, 3)).shape == (0, 3) and f(torch.zeros(2, 0)).shape == (2, 0)
    close(Compose()(M, MASK), torch.where(MASK, M, 0.0))


def test_eta_is_a_quantile_of_the_first_policy():
    assert choose_eta([[0.1, 0.2, 0.3, 0.4, NAN]], quantile=0.5) == pytest.approx(0.25)
    assert choose_eta([[1.0, 1.0]]) == 0.99
    for bad in ({"quantile": 0}, {"quantile": 1}):
        with pytest.raises(ConfigError):
            choose_eta([[0.1]], **bad)
    with pytest.raises(ValueError, match="no step scores"):
        choose_eta([[NAN]])


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("12+7=19\n19-5=14\nanswer 14", ["12+7=19\n", "19-5=14\n", "answer 14"]),
        ("a\n\n\nb\n", ["a\n\n\n", "b\n"]),
        ("a\n  \nb", ["a\n  \n", "b"]),
        ("\n\na\nb", ["\n\na\n", "b"]),
        ("one", ["one"]),
        ("", []),
        (" \n ", []),
    ],
)
def test_where_steps_lie(text, steps):
    assert [text[a:b] for a, b in split_steps(text)] == steps


def test_other_splitters():
    assert split_steps("a\nb\n\nc", "\n\n") == [(0, 5), (5, 6)]
    assert split_steps("a<s>b<s><s>c", "<s>") == [(0, 4), (4, 11), (11, 12)]
    with pytest.raises(ConfigError):
        split_steps("a", "")


def test_returns_and_placement_by_hand():
    close(returns_to_go([[1.0, 2, 3], [4, NAN, NAN]], [[1, 1, 1], [1, 0, 0]]), [[6, 5, 3], [4, 0, 0]])
    close(to_token_rewards([[1.0, 2], [3, NAN]], [[1, 3], [0, -1]], 4), [[0, 1, 0, 2], [3, 0, 0, 0]])
    assert to_token_rewards(torch.zeros(2, 0), torch.zeros(2, 0), 3).tolist() == [[0] * 3] * 2
    for ends, match in (([[1, 4]], "outside"), ([[1, 1]], "same token"), ([[-2, 1]], "outside")):
        with pytest.raises(ValueError, match=match):
            to_token_rewards([[1.0, 2]], ends, 4)


def test_placement_before_returns_is_the_same_as_after():
    values, ends = torch.rand(3, 4, dtype=torch.float64), torch.tensor([[0, 2, 5, 6], [1, 3, 4, -1], [6, -1, -1, -1]])
    tokens = to_token_rewards(values, ends, 7)
    togo = tokens.flip(-1).cumsum(-1).flip(-1)
    steps = returns_to_go(values, ends >= 0)
    for b, k in (ends >= 0).nonzero().tolist():
        assert togo[b, ends[b, k]].item() == pytest.approx(steps[b, k].item())


def test_relative_returns_against_a_slow_reference():
    rng = np.random.default_rng(0)
    mask = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=bool)
    values = np.where(mask, rng.normal(size=mask.shape), np.nan)
    ids = np.array([7, 7, 3, 3, 3])
    expected = np.zeros(mask.shape)
    togo = [[sum(values[b, j] for j in range(k, 3) if mask[b, j]) for k in range(3)] for b in range(5)]
    for g in (3, 7):
        pool = [togo[b][k] for b in range(5) for k in range(3) if ids[b] == g and mask[b, k]]
        for b in range(5):
            for k in range(3):
                if ids[b] == g and mask[b, k]:
                    expected[b, k] = (togo[b][k] - np.mean(pool)) / (np.std(pool, ddof=1) + 1e-6)
    got = returns_relative(torch.tensor(values), torch.tensor(mask), torch.tensor(ids))
    close(got, expected)
    order = [4, 0, 2, 1, 3]
    close(
        returns_relative(torch.tensor(values[order]), torch.tensor(mask[order]), torch.tensor(ids[order])),
        expected[order],
    )
    flat = returns_relative(torch.tensor([[0.0, 0.3], [0.0, 0.3]]), torch.ones(2, 2), torch.tensor([0, 0]), scale=False)
    assert flat.abs().max() < 1e-6
    assert returns_relative(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0).long()).shape == (0, 2)
    with pytest.raises(ValueError, match="group ids"):
        returns_relative(torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(3))


def test_the_rule_credits_every_token_of_a_step_with_its_return():
    def member(task, *lengths):
        n = sum(lengths)
        turns = (Turn("environment", "e", (9,)), Turn("policy", "x" * n, tuple(range(n)), (-1.0,) * n))
        starts = np.cumsum([1, *lengths])
        spans = tuple(Span(int(a), int(a) + k) for a, k in zip(starts[:-1], lengths, strict=True))
        return Trajectory(task, turns, StopReason.EOS, prompt_ids=(0,)), spans

    task = Task("t", "q")
    (a, a_spans), (b, b_spans) = member(task, 2, 1), member(task, 3)
    scores = [Score(1.3, (0.3, 1.0), a_spans), Score(0.1, (0.1,), b_spans)]
    experience = collect([Group(task, (a, b))], scores)
    config = OnlineConfig(prompts_per_step=1, group_size=2)
    got = ReturnsRelative(scale=False)(experience, config)
    mean = (1.3 + 1.0 + 0.1) / 3
    close(got, [0, 1.3 - mean, 1.3 - mean, 1.0 - mean, 0, *[0.1 - mean] * 3])
    scaled = build("credit", "returns_relative")(experience, config)
    close(scaled, got / (np.std([1.3, 1.0, 0.1], ddof=1) + 1e-6))


TABLE = {"good": 0.9, "bad": 0.2, "filler": 0.95, "answer": 0.6, "lost": NAN, "odd": 1.5}


def prm(question, steps):
    return [TABLE[s.strip()] for s in steps]


def plain(text, correct=1.0, **options):
    made = ProcessReward(prm, **{"alpha": 0.5, **options})(["q"], [text], [correct])
    return made.values[0][made.mask[0]].tolist()


def test_process_reward_by_hand():
    text = "good\nbad\nanswer"
    assert plain(text) == pytest.approx([0.45, 0.1, 1.3])
    assert plain(text, transform=StepClip(0.5)) == pytest.approx([0, -0.15, 1])
    assert plain(text, transform=StepDelta()) == pytest.approx([0.35, 0.1, 1])
    assert plain(text, 0.0, transform=Compose(StepClip(0.5), StepDelta())) == pytest.approx([0.15, -0.15, 0])
    assert plain(text, alpha=0) == [0, 0, 1]


def test_short_solutions():
    both = {"transform": Compose(StepClip(0.5), StepDelta())}
    assert plain("bad", **both) == [1.0] and plain("bad", transform=StepDelta()) == [1.0]
    assert plain("bad\nanswer", transform=StepDelta()) == pytest.approx([0.1, 1.0])
    assert plain("") == [] and plain("\n\n") == []


def test_step_ends_are_last_characters():
    made = ProcessReward(prm)(["q", "q", "q"], ["good\nanswer", "answer", ""], [1, 0, 1])
    assert made.step_ends.tolist() == [[4, 10], [5, -1], [-1, -1]]
    tokens = to_token_rewards(made.values, made.step_ends, 11)
    assert tokens[0].nonzero()[:, 0].tolist() == [4, 10] and tokens[2].sum() == 0


def test_missing_scores_take_eta():
    reward = ProcessReward(prm, Compose(StepClip(0.3), StepDelta()), alpha=1.0)
    made = reward(["q"], ["lost\nbad\nanswer"], [1])
    assert made.values[0].tolist() == pytest.approx([0.1, -0.1, 1.0]) and reward.missing == 1
    assert ProcessReward(prm).neutral == 0.5 and reward.neutral == 0.3


def test_refusals_of_the_reward():
    with pytest.raises(RewardError, match="probabilities"):
        plain("odd")
    with pytest.raises(RewardError, match="1 scores for the 2 steps"):
        ProcessReward(lambda q, s: [0.5])(["q"], ["a\nb"], [1])
    with pytest.raises(ValueError, match="verdicts"):
        ProcessReward(prm)(["q"], ["good"], [])
    for bad in ({"alpha": -1}, {"alpha": NAN}, {"neutral": 2}, {"splitter": ""}):
        with pytest.raises(ConfigError):
            ProcessReward(prm, **bad)
    with pytest.raises(ConfigError, match="prm"):
        ProcessReward(None)
    with pytest.raises(ConfigError, match="correct="):
        ProcessReward(prm)([said("good")])


class Right(Reward):
    def score_one(self, trajectory):
        return float(trajectory.task.reference)


def said(text, right=1.0, stop=StopReason.EOS, end=True):
    ids = tuple(range(len(text) + end))
    ends = (*range(1, len(text) + 1), *[len(text)] * end)
    return Trajectory(Task("t", "q", right), (Turn("policy", text, ids, token_ends=ends),), stop)


def test_trajectories_get_step_values_and_spans():
    reward = ProcessReward(prm, Compose(StepClip(0.5), StepDelta()), alpha=0.5, correct=Right())
    one, cut, silent, short = reward(
        [said("good\nbad\nanswer"), said("good\nbad", stop=StopReason.LENGTH), said(""), said("answer", 0.0)]
    )
    assert one.steps == pytest.approx((0.15, -0.15, 1.0))
    assert one.step_spans == (Span(0, 5), Span(5, 9), Span(9, 16))
    assert one.value == pytest.approx(1.0) and one.parts["correct"] == 1.0 and one.parts["steps"] == 3.0
    assert one.parts["learned"] == pytest.approx(0.0) and one.parts["proxy"] == pytest.approx(0.5 * 1.7)
    # Cut off: not correct, and the unfinished line is the last step.
    assert cut.steps == pytest.approx((0.0, 0.0)) and cut.parts["correct"] == 0.0
    assert silent.steps == () and silent.value == 0.0 and silent.parts["correct"] == 0.0
    assert short.steps == (0.0,)
    assert reward([]) == []


def test_a_step_scorer_is_asked_with_the_same_cut():
    class Scorer:
        def step_scores(self, trajectories, segmenter):
            self.seen = [len(segmenter.spans(t)) for t in trajectories]
            return [torch.full((n,), 0.4) for n in self.seen]

    scorer = Scorer()
    reward = ProcessReward(scorer, StepClip(0.5), alpha=1.0, correct=Right())
    score = reward([said("good\nbad\nanswer"), said("")])[0]
    assert scorer.seen == [3] and score.steps == pytest.approx((-0.1, -0.1, 0.9))
    with pytest.raises(ConfigError, match="reads tokens"):
        reward(["q"], ["good"], [1])
    # Without weight the model is not asked.
    scorer.seen = None
    ProcessReward(scorer, alpha=0.0, correct=Right())([said("good")])
    assert scorer.seen is None


def test_bad_scores_are_handled_as_chosen():
    rows = [said("good"), said("odd")]
    dropped = ProcessReward(prm, correct=Right(), on_error="drop")(rows)
    assert dropped[0].valid and not dropped[1].valid and "task 't'" in dropped[1].reason
    with pytest.raises(RewardError, match="probabilities"):
        ProcessReward(prm, correct=Right())(rows)

    class Broken(Reward):
        def score_one(self, trajectory):
            return None

    assert not ProcessReward(prm, correct=Broken(on_error="drop"), on_error="drop")(rows)[0].valid


def test_the_filler_check_tells_the_hackable_reward():
    curves = {
        name: filler_check(ProcessReward(prm, transform, alpha=0.5), "q", "good\nbad\nanswer", "filler", times=6)
        for name, transform in {
            "sum": None, "clip": StepClip(0.5), "delta": StepDelta(), "both": Compose(StepClip(0.5), StepDelta()),
        }.items()
    }  # fmt: skip
    np.testing.assert_allclose(np.diff(curves["sum"].returns), 0.5 * 0.95)
    assert curves["sum"].hackable() and curves["sum"].slope == pytest.approx(0.475)
    assert curves["sum"].solution.count("filler\n") == 6 and curves["sum"].solution.endswith("answer")
    for name in ("clip", "delta", "both"):
        assert not curves[name].hackable() and curves[name].gain <= 1e-12


def test_greedy_fillers_gain_once_under_delta():
    curve = filler_check(
        ProcessReward(prm, StepDelta(), alpha=1.0), "q", "bad\nanswer", "filler\n", times=6, where="best"
    )
    assert curve.gain == pytest.approx(0.95 - 0.2) and not curve.hackable()
    # The first step is charged with its own score alone, so a filler before a bad one buys the difference once.
    both = filler_check(
        ProcessReward(prm, Compose(StepClip(0.5), StepDelta())), "q", "bad\nanswer", "filler", where="best"
    )
    assert both.gain == pytest.approx(0.5 * 0.3) and not both.hackable()
    assert filler_check(ProcessReward(prm), "q", "bad\nanswer", "filler", where="best").hackable()


def test_refusals_of_the_filler_check():
    with pytest.raises(DataError, match="no steps"):
        filler_check(ProcessReward(prm), "q", "", "filler")
    for bad in ({"times": 1}, {"where": "middle"}):
        with pytest.raises(ConfigError):
            filler_check(ProcessReward(prm), "q", "good", "filler", **bad)
