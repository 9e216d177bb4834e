"""Rule outcomes by type of task, word error rate and ROUGE: by hand, and against the packages where they are installed."""

import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import guerdon as gd
from guerdon.errors import DataError, RewardError
from guerdon.rewards import TypedOutcome, rouge, think_then_answer, word_error_rate
from guerdon.types import StopReason, Task, Trajectory, Turn


@pytest.mark.parametrize(
    ("text", "reference", "rate"),
    [
        ("the cat sat", "the cat sat", 0.0),
        ("the cat", "the cat sat", 1 / 3),
        ("the dog sat down", "the cat sat", 2 / 3),
        ("", "a b", 1.0),
        ("x y z w", "a b", 2.0),
        ("b a", "a b", 1.0),
        ("A", "a", 1.0),
    ],
)
def test_word_error_rate(text, reference, rate):
    assert word_error_rate(text, reference) == pytest.approx(rate)


def test_a_blank_reference_has_no_rate():
    with pytest.raises(DataError, match="blank"):
        word_error_rate("a", "  ")


words = st.lists(st.sampled_from(["a", "b", "c", "running", "runs", "ran", "Cats", "cat.", "x1"]), max_size=12)


@pytest.mark.property
@settings(max_examples=60, deadline=None)
@given(words, words.filter(bool))
def test_word_error_rate_is_that_of_jiwer(said, gold):
    jiwer = pytest.importorskip("jiwer")
    assert word_error_rate(" ".join(said), " ".join(gold)) == pytest.approx(jiwer.wer(" ".join(gold), " ".join(said)))


def test_rouge_by_hand():
    # words 2 of 3 and 2; pairs 1 of 2 and 1; subsequence 2
    assert rouge("the big cat", "big cat", ("1",), stem=False) == pytest.approx(0.8)
    assert rouge("the big cat", "big cat", ("2",), stem=False) == pytest.approx(2 / 3)
    assert rouge("the big cat", "big cat", ("L",), stem=False) == pytest.approx(0.8)
    assert rouge("the big cat", "big cat", stem=False) == pytest.approx((0.8 + 2 / 3 + 0.8) / 3)
    assert rouge("", "a", stem=False) == rouge("a", "", stem=False) == rouge("é", "é", stem=False) == 0.0


@pytest.mark.property
@settings(max_examples=60, deadline=None)
@given(words, words)
def test_rouge_is_that_of_the_package(said, gold):
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    for stem in (True, False):
        theirs = scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stem).score(
            " ".join(gold), " ".join(said)
        )
        mean = sum(s.fmeasure for s in theirs.values()) / 3
        assert rouge(" ".join(said), " ".join(gold), stem=stem) == pytest.approx(mean)


def test_long_texts_take_no_time():
    rng = random.Random(0)
    text = " ".join(rng.choice("abcdefgh") for _ in range(20_000))
    start = time.perf_counter()
    assert 0 < rouge(text, text[::-1], stem=False) <= 1
    assert word_error_rate(text, " ".join(text.split()[:50])) > 100
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>a</think><answer>b</answer>", ("a", "b")),
        ("<think>a</think> so <answer>b</answer> bye", ("a", "b")),
        ("<think>a</think>x</think><answer>1</answer><answer>b</answer>", ("a", "b")),
        ("<think>a</think><answer><answer>b</answer></answer>", ("a", "b")),
        ("<think></think><answer></answer>", ("", "")),
        (" <think>a</think><answer>b</answer>", None),
        ("<think>a<answer>b</answer>", None),
        ("<think>a<answer>b</answer></think>", None),
        ("<think>a</think><answer>b", None),
        ("<think>a</think></answer><answer>", None),
        ("", None),
    ],
)
def test_the_form_is_that_of_the_published_expression(text, parts):
    import re

    published = re.compile(r"<think>(.*?)</think>.*<answer>(.*?)</answer>.*", re.DOTALL).fullmatch(text)
    assert think_then_answer(text) == parts == (published and published.groups())


@pytest.mark.property
@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "a", "\n"]), max_size=9).map("".join))
def test_the_form_on_any_sequence_of_tags(text):
    import re

    published = re.compile(r"<think>(.*?)</think>.*<answer>(.*?)</answer>.*", re.DOTALL).fullmatch(text)
    assert think_then_answer(text) == (published and published.groups())


def outcome(kind, answer, gold, text=None, **options):
    text = f"<think>x</think><answer>{answer}</answer>" if text is None else text
    task = Task("t", "q", gold, {"type": kind})
    return TypedOutcome(**{"stem": False, **options})([Trajectory(task, (Turn("policy", text),), StopReason.EOS)])[0]


@pytest.mark.parametrize(
    ("kind", "answer", "gold", "value"),
    [
        ("numerical", "$0.5$", "1/2", 1.0),
        ("numerical", "0.4", "1/2", 0.0),
        ("numerical", "3", ["4", "$$3$$"], 1.0),
        ("multiple choice", "A", "A", 1.0),
        ("multiple choice", " B , A", "A,B", 1.0),
        ("multiple choice", "A", "A,B", 0.0),
        ("multiple choice", "A,C", "A,B", 0.0),
        ("multiple choice", "A,A", "A,B", 0.0),
        ("OCR", "the cat", "the cat sat", math.exp(-1 / 3)),
        ("ocr", "", "a", math.exp(-1)),
        ("free-form", "the big\ncat", "big cat", (0.8 + 2 / 3 + 0.8) / 3),
    ],
)
def test_outcomes_by_type(kind, answer, gold, value):
    assert outcome(kind, answer, gold).value == pytest.approx(value)


def test_without_the_form_there_is_nothing():
    score = outcome("numerical", "", "3", text="3")
    assert score.value == 0.0 and score.parts["format"] == 0.0
    assert outcome("numerical", "3", "3").parts["format"] == 1.0
    assert outcome("numerical", "", "3", text="").value == 0.0


def test_stems_and_verifiers():
    pytest.importorskip("nltk")
    assert outcome("free-form", "running cats", "run cat", stem=True).value == pytest.approx(1.0)
    assert outcome("numerical", "x", "y", equal=lambda a, b: True).value == 1.0


def test_refusals():
    with pytest.raises((DataError, RewardError), match="riddle"):
        outcome("riddle", "3", "3")
    with pytest.raises((DataError, RewardError), match="empty"):
        outcome("numerical", "3", [])
    assert gd.rewards.TypedOutcome is TypedOutcome


def test_hostile_texts():
    start = time.perf_counter()
    for text in ("<think>" + "</think><answer>" * 60_000, "<think></think>" + "</answer>" * 100_000, "<think>" * 140_000,
                 "<think></think><answer>" + "9" * 1_000_000 + "</answer>"):  # fmt: skip
        assert outcome("numerical", "", "3", text=text).value == 0.0
    assert time.perf_counter() - start < 5
