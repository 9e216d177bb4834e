"""Format reward, gated sum, the baseline that sees the key, and pass@k."""

import time

import numpy as np
import pytest
import torch

from guerdon.errors import ConfigError, DataError, RewardError
from guerdon.evaluation import pass_at_k
from guerdon.rewards import (
    BoxedFormat,
    BoxedMatch,
    GatedSum,
    HumpLength,
    LinearLength,
    Reward,
    extract_answer,
    format_length,
    gated_sum,
)
from guerdon.types import StopReason, Task, Trajectory, Turn


def said(text, n=5, reference="4", stop=StopReason.EOS):
    return Trajectory(Task("t", "put it into \\boxed{}", reference), (Turn("policy", text, tuple(range(n))),), stop)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{4}", "4"),
        ("\\boxed{3} no, \\boxed{4}", "4"),
        ("<think>\\boxed{3}</think> it is \\boxed{4}", "4"),
        ("<think>\\boxed{3}</think> it is 4", ""),
        ("four", ""),
        ("<answer> 4 </answer>", "4"),
        ("<answer>so \\boxed{4}</answer> \\boxed{5}", "4"),
        ("<answer>it is \\( 3 \\) or \\( 4 \\)</answer>", "4"),
        ("<answer>open \\( 3</answer>", "open \\( 3"),
        ("<answer>\\( 3 \\) and \\( 5</answer>", "3"),
        ("<answer>) \\) 4</answer>", ") \\) 4"),
        ("<answer>1</answer><answer>2</answer>", "2"),
        ("<answer>4", ""),
        ("", ""),
    ],
)
def test_where_the_answer_is_read(text, answer):
    assert extract_answer(text) == answer


def test_format_looks_at_the_form_alone():
    texts = ["\\boxed{4}", "\\boxed{wrong but fine}", "\\boxed{17}", "\\boxed{}", "no box", "\\boxed{1+}", "\\boxed{x=3}",
             "\\boxed{4", "\\boxed{2^(10^9)}", "\\boxed{\\frac{1}{2}}", "\\boxed{4} \\boxed{+}"]  # fmt: skip
    np.testing.assert_array_equal(BoxedFormat()(texts), [1, 0, 1, 0, 0, 0, 1, 0, 1, 1, 0])
    assert BoxedFormat(validate="sympy", timeout=1.0)(["\\boxed{1}"])[0] == 1.0
    assert [s.value for s in BoxedFormat()([said("\\boxed{4}"), said("4")])] == [1.0, 0.0]


def test_the_box_of_the_prompt_does_not_count():
    assert BoxedFormat()([said("nothing")])[0].value == 0.0


def test_a_validator_of_ones_own_is_limited_and_counted():
    def validate(answer):
        if answer == "slow":
            time.sleep(5)
        if answer == "bad":
            raise ArithmeticError(answer)
        return answer == "good"

    reward = BoxedFormat(validate, timeout=0.1)
    start = time.perf_counter()
    np.testing.assert_array_equal(
        reward([f"\\boxed{{{a}}}" for a in ("good", "slow", "bad", "no", "")]), [1, 0, 0, 0, 0]
    )
    assert time.perf_counter() - start < 2
    assert reward.failures == {"validate timed_out": 1, "validate raised": 1}
    for bad in ({"validate": "numbers"}, {"validate": 3}, {"timeout": 0}):
        with pytest.raises(ConfigError):
            BoxedFormat(**bad)


def test_the_key_is_seen_by_the_baseline_alone():
    scores = BoxedMatch()(
        [said("\\boxed{4.0}"), said("\\boxed{5}"), said("4"), said("\\boxed{1/2}", reference=["1", "0.5"])]
    )
    assert [s.value for s in scores] == [1.0, 0.0, 0.0, 1.0]
    assert [s.parts["extracted"] for s in scores] == [1.0, 1.0, 0.0, 1.0]
    with pytest.raises((DataError, RewardError)):
        BoxedMatch()([said("\\boxed{4}", reference=[])])


def test_the_gated_sum_of_the_paper():
    gate = torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=torch.float64)
    bonus = torch.tensor([1.0, 0, -1, 1, 0, -1], dtype=torch.float64)
    assert gated_sum(gate, bonus).tolist() == [2, 1, 0, 0, 0, -1]
    assert gated_sum(gate, bonus, 0.5).tolist() == [1.5, 0.5, -0.5, 0, 0, -1]
    assert gated_sum(torch.zeros(0), torch.zeros(0)).shape == (0,)


def test_gated_sum_refuses():
    one = torch.ones(1)
    for gate, bonus, weight in ((one * 0.5, one, 1.0), (one, one * float("nan"), 1.0), (one, torch.ones(2), 1.0),
                                (one, one, -1.0), (one, one, float("nan"))):  # fmt: skip
        with pytest.raises(ValueError):
            gated_sum(gate, bonus, weight)


def test_the_reward_of_the_paper_both_ways():
    reward = GatedSum(BoxedFormat(), HumpLength(100))
    texts = ["\\boxed{4}", "\\boxed{4}", "four", "four"]
    batch = reward(texts, [50, 100, 50, 100])
    np.testing.assert_allclose(batch.total, [2, 0, 0, -1])
    np.testing.assert_allclose(batch.parts["gate"], [1, 1, 0, 0])
    np.testing.assert_allclose(batch.parts["bonus"], [1, -1, 1, -1])
    scores = reward([said(t, n) for t, n in zip(texts, (50, 100, 50, 100), strict=True)])
    assert [s.value for s in scores] == batch.total.tolist()
    assert scores[0].parts["bonus/length"] == 50.0 and scores[0].parts["gate/extracted"] == 1.0
    assert reward.range == (-1.0, 2.0)
    assert format_length(100, format_weight=0.5)([said("\\boxed{4}", 50)])[0].value == 1.5
    assert reward([said("\\boxed{4}", 50, stop=StopReason.LENGTH)])[0].value == 0.0
    assert reward([]) == []
    with pytest.raises(ValueError, match="1 lengths for 2"):
        reward(["a", "b"], [1])


def test_gates_must_be_closed_or_open():
    class Half(Reward):
        def score_one(self, trajectory):
            return 0.5

    with pytest.raises(RewardError, match="must give 0 or 1"):
        GatedSum(Half(), HumpLength(10))([said("x")])
    with pytest.raises(ConfigError, match="gate must be a reward"):
        GatedSum(None, HumpLength(10))
    broken = GatedSum(BoxedFormat(), LinearLength(10, count=None, on_error="drop"), on_error="drop")
    assert not broken([Trajectory(Task("t", "q"), (Turn("policy", "no ids"),), StopReason.EOS)])[0].valid


def test_hostile_texts():
    start = time.perf_counter()
    for text in ("\\boxed{" * 140_000, "<answer>" + "\\(" * 400_000 + "</answer>", "\x00" * 1_000_000, "\\boxed{1e999}",
                 "\\boxed{" + "(" * 900_000 + "}", "<answer>" * 120_000, "\\boxed{\ud800}"):  # fmt: skip
        assert BoxedFormat()([text])[0] in (0.0, 1.0)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("n", "c", "k", "p"),
    [(5, 0, 3, 0.0), (5, 5, 1, 1.0), (4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 2, 2, 5 / 6), (4, 2, 3, 1.0)],
)
def test_pass_at_k(n, c, k, p):
    assert pass_at_k(n, c, k) == pytest.approx(p)
    assert pass_at_k(np.int64(n), np.int64(c), k) == pytest.approx(p)


def test_pass_at_k_by_counting_subsets():
    from itertools import combinations

    for n, c, k in ((7, 3, 2), (6, 1, 4), (8, 5, 3)):
        subsets = list(combinations(range(n), k))
        share = sum(any(i < c for i in s) for s in subsets) / len(subsets)
        assert pass_at_k(n, c, k) == pytest.approx(share)
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4), (3.0, 1, 1), (3, True, 1)])
def test_pass_at_k_refuses(bad):
    with pytest.raises(ConfigError):
        pass_at_k(*bad)
