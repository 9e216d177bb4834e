"""Answers, formats and composition of rule rewards, against hand-computed values."""

import time

import pytest

import guerdon as gd
from guerdon.errors import ConfigError, DataError, RewardError
from guerdon.rewards.answer import normalise_answer, token_f1
from guerdon.rewards.grammar import blocks, boxed, fenced, last_block
from guerdon.types import Score, StopReason, Task, Trajectory, Turn


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel-Tower!", "eiffeltower"),
        ("a an the", ""),
        ("Theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("an apple", "apple"),
    ],
)
def test_normalisation(text, normal):
    assert normalise_answer(text) == normal


@pytest.mark.parametrize(
    ("answer", "golds", "f1"),
    [
        ("new york city", ["new york"], 0.8),
        ("yes", ["yes it is"], 0.0),
        ("no", ["no"], 1.0),
        ("noanswer", ["x"], 0.0),
        ("red red blue", ["red blue blue"], 2 / 3),
        ("paris", ["london", "paris france"], 2 / 3),
        ("", ["x"], 0.0),
    ],
)
def test_token_f1(answer, golds, f1):
    assert token_f1(answer, golds) == pytest.approx(f1)


def test_the_last_answer_of_the_policy_counts():
    match = gd.rewards.ExactMatch()
    assert match.text(completion="<answer>A</answer><answer> The b. </answer>", reference=["B"]).value == 1.0
    assert match.text(completion="B", reference=["B"]).value == 0.0
    forged = Trajectory(
        Task("t", "q", ["Rome"]),
        (Turn("policy", "<answer>Oslo</answer>"), Turn("environment", "<answer>Rome</answer>")),
        StopReason.DONE,
    )
    assert match([forged])[0].value == 0.0
    assert gd.rewards.ExactMatch(scope="response")([forged])[0].value == 1.0


def test_an_empty_gold_list_is_an_error_not_a_zero():
    with pytest.raises((DataError, RewardError), match="empty"):
        gd.rewards.ExactMatch().text(completion="<answer>x</answer>", reference=[])


GOOD = "<think>a</think><search> qwen : capital of Peru? </search><information>Lima</information><think>b</think><answer>Lima</answer>"


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        (GOOD, []),
        ("  <think>a</think><answer>x</answer>\n", []),
        ("plain", [1, 5, 6, 7]),
        ("<think>a</think><answer>x</answer></think>", [2, 7]),
        ("<think> ... </think><answer>x</answer>", [3]),
        ("<think></think><answer>x</answer>", [3]),
        ("<think>a<search></think><answer>x</answer>", [2, 4]),
        ("<think>a</think><answer>x</answer><answer>y</answer>", [5]),
        ("<answer>x</answer>", [5, 6]),
        ("hm <think>a</think><answer>x</answer>", [6]),
        ("<think>a</think><answer>x</answer> bye", [7]),
        (GOOD.replace("capital of Peru?", "ratio 3:4"), [8]),
        (GOOD.replace("capital of Peru?", " "), [8]),
        (GOOD.replace("capital of Peru?", "ask qwen"), [8]),
        (GOOD.replace(" qwen :", " gpt :"), [9]),
        (GOOD.replace("<information>Lima</information>", ""), [5]),
    ],
)
def test_the_nine_rules(text, broken):
    form = gd.rewards.RouterFormat(["Qwen", "llama"])
    assert form.check(text) == broken
    assert form.text(completion=text).value == (-1.0 if broken else 0.0)


def test_severities_are_parameters():
    form = gd.rewards.RouterFormat(["qwen"], severities={6: -0.25})
    assert form.text(completion="hm <think>a</think><answer>x</answer>").value == -0.25
    with pytest.raises(ConfigError, match="10"):
        gd.rewards.RouterFormat(severities={10: -1})


def test_composition_and_parts():
    reward = gd.rewards.ExactMatch() + 0.2 * gd.rewards.TagFormat("think", "answer")
    score = reward.text(completion="<think>x</think><answer>Lima</answer>", reference=["Lima"])
    assert score.value == pytest.approx(1.2)
    assert score.parts["ExactMatch"] == 1.0 and score.parts["TagFormat"] == 1.0
    assert reward.range == (0.0, pytest.approx(1.2))


class Odd(gd.rewards.Reward):
    def __init__(self, value, **kwargs):
        super().__init__(**kwargs)
        self.value = value

    def score_one(self, trajectory):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


@pytest.mark.parametrize("value", [ValueError("boom"), None, float("nan"), "high"])
def test_failures_are_named_counted_and_handled_as_chosen(value):
    with pytest.raises(RewardError, match="Odd"):
        Odd(value).text(completion="x")
    dropped = Odd(value, on_error="drop")
    score = dropped.text(completion="x")
    assert not score.valid and "Odd" in score.reason and sum(dropped.failures.values()) == 1
    assert Odd(value, on_error=-3.0).text(completion="x").value == -3.0


def test_an_invalid_term_makes_the_sum_invalid():
    total = gd.rewards.ExactMatch() + Odd(float("nan"), on_error="drop")
    total.on_error = "drop"
    assert not total.text(completion="<answer>a</answer>", reference="a").valid


async def _later(value):
    return value


def test_rewards_may_be_coroutines():
    class Slow(gd.rewards.Reward):
        async def score_one(self, trajectory):
            return await _later(0.5)

    assert Slow().text(completion="x").value == 0.5


def test_grammar_is_linear_on_hostile_text():
    start = time.perf_counter()
    assert blocks("<think>" * 150_000, ["think", "answer"]) == []
    assert last_block("<answer>" * 100_000 + "x</answer>", "answer") is not None
    assert time.perf_counter() - start < 20


def test_boxed_and_fenced():
    assert boxed(r"so \boxed{1} or \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert boxed(r"\boxed{open") is None
    assert fenced("a\n```sql\nSELECT 1\n```\n```py\nx\n```", "sql") == ["SELECT 1"]


def test_scores_refuse_half_steps():
    with pytest.raises(ValueError, match="together"):
        Score(1.0, steps=(1.0,))
