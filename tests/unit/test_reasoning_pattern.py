"""The reasoning pattern reward against its published rule, by hand."""

import time

import numpy as np
import pytest

from guerdon.errors import ConfigError
from guerdon.rewards import MATH_PHRASES, OPEN_PHRASES, PhraseReward, think_answer
from guerdon.types import StopReason, Task, Trajectory, Turn


def value(text, **options):
    return float(PhraseReward(**options)([text])[0])


def test_the_published_lists():
    assert len(MATH_PHRASES) == len(set(MATH_PHRASES)) == 40
    assert len(OPEN_PHRASES) == len(set(OPEN_PHRASES)) == 53
    assert {"makes sence", "first, ", "for example ", "since we "} <= set(MATH_PHRASES)
    assert {"1. ", "step 1 ", "step 3. ", "i'll"} <= set(OPEN_PHRASES) - set(MATH_PHRASES)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("", 0.0),
        ("wait", 0.05),
        ("WAIT wait Wait", 0.05),
        ("enthusiasm", 0.05),
        ("first", 0.0),
        ("First, we go", 0.05),
        ("for example, 3", 0.0),
        ("for example 3", 0.05),
        ("therefore hence thus so that", 0.2),
        ("wait <think> therefore", 0.05),
        ("wait therefore user: hm", 0.0),
        ("".join(MATH_PHRASES), 1.0),
    ],
)
def test_hand_computed_values(text, reward):
    assert value(text) == pytest.approx(reward)


def test_every_phrase_alone_counts_at_least_once():
    for phrase in OPEN_PHRASES:
        assert value(phrase, phrases=[phrase], divisor=1) == 1.0


def test_repetition_and_marker_are_subtracted():
    # Two times the same 20 words: 21 n-grams, of which the first repeats.
    words = " ".join(f"w{k}" for k in range(20))
    score = PhraseReward(["w1"], divisor=1).text(completion=f"{words} {words}")
    assert score.parts["repetition"] == pytest.approx(1 / 21)
    assert score.value == pytest.approx(1 - 1 / 21)
    full = "".join(MATH_PHRASES)
    assert value(full + " user: ") == 0.0
    assert value(full + " User: ", stop_marker=None) == 1.0
    assert value("a a a a", phrases=["a"], divisor=1, ngram=2) == pytest.approx(1 - 1 / 3)


def test_positional_arguments_are_those_of_the_paper():
    assert PhraseReward(["a"], 2, 3, "stop")(["a"])[0] == 0.5


def test_word_boundaries_are_an_option():
    assert value("enthusiasm", word_boundary=True) == 0.0
    assert value("thus.", word_boundary=True) == 0.05
    assert value("for example, 3", word_boundary=True) == 0.05


def test_without_an_answer_there_is_nothing():
    reward = PhraseReward(answer="boxed")
    np.testing.assert_allclose(reward(["wait thus", "wait thus \\boxed{}", "wait thus \\boxed{3}"]), [0, 0, 0.1])
    task = Task("t", "put it into \\boxed{7}")
    asked = Trajectory(task, (Turn("policy", "wait thus"), Turn("environment", "\\boxed{7}")), StopReason.EOS)
    assert reward([asked])[0].value == 0.0 and reward([asked])[0].parts["extracted"] == 0.0
    assert PhraseReward(answer=lambda text: None)(["wait"])[0] == 0.0


def test_plain_and_trajectory_calls_agree():
    reward = PhraseReward()
    turns = (Turn("policy", "wait, "), Turn("environment", "thus"), Turn("policy", "therefore"))
    score = reward([Trajectory(Task("t", "hence"), turns, StopReason.EOS)])[0]
    assert score.value == pytest.approx(reward(["wait, therefore"])[0]) == pytest.approx(0.1)
    assert score.parts["phrases"] == 2.0
    assert reward.found("Therefore WAIT") == ("wait", "therefore")
    assert reward([]) == []


def test_refusals():
    for bad in ({"phrases": "wait"}, {"phrases": []}, {"phrases": [" "]}, {"divisor": 0}, {"divisor": float("nan")},
                {"ngram": 0}, {"answer": "tagged"}):  # fmt: skip
        with pytest.raises(ConfigError):
            PhraseReward(**bad)
    with pytest.raises(ConfigError, match="list of responses"):
        PhraseReward()("wait")
    with pytest.raises(ConfigError, match="number 1 is of type NoneType"):
        PhraseReward()(["wait", None])


def test_a_megabyte_is_read_in_a_moment():
    start = time.perf_counter()
    for text in ("thus " * 200_000, "\x00" * 1_000_000, "<think>" * 140_000, "user: " * 160_000):
        assert 0.0 <= value(text) <= 1.0
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think> a </think><answer> b </answer>", ("a", "b")),
        ("x<think>old</think><think>a</think> <answer>old</answer><answer>b</answer>", ("a", "b")),
        ("<think>a</think><answer>b</answer><answer>c</answer>", ("a", "c")),
        ("<think></think><answer>b</answer>", None),
        ("<think>a</think><answer> </answer>", None),
        ("<answer>b</answer><think>a</think>", None),
        ("<think>a<answer>b</answer>", None),
        ("a</think><answer>b</answer>", None),
        ("", None),
    ],
)
def test_thought_and_answer(text, parts):
    got = think_answer(text)
    assert (got and (got.think, got.answer)) == parts


def test_a_prompt_may_have_opened_the_thought():
    got = think_answer("a</think><answer>b</answer>", opened=True)
    assert got is not None and (got.think, got.answer) == ("a", "b")
