"""Whatever a policy writes, text rewards give a number in their range, and the same one both ways of calling."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.reward_models import parse_unit_score, reasoning_of
from guerdon.rewards import (
    BoxedFormat,
    PhraseReward,
    extract_answer,
    is_expression,
    normalise_expression,
    same_answer,
    think_answer,
)
from guerdon.rewards.plain import plain_trajectories

pytestmark = pytest.mark.property

PIECES = ["\\boxed{", "}", "{", "\\frac", "1", "x", " ", "<answer>", "</answer>", "<think>", "</think>", "\\(", "\\)", "=", "+",
          "^", "wait", "thus ", "user: ", "\n", "|", "\\left", "\\", "$", ",", ".", "\x00", "\ud800", "é", "cm"]  # fmt: skip
texts = st.text(max_size=40) | st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


@settings(max_examples=300, deadline=None)
@given(texts)
def test_text_rewards_stay_in_range(text: str) -> None:
    for reward in (BoxedFormat(), PhraseReward(answer="boxed"), PhraseReward(["wait"], 1, 1)):
        (plain,) = reward([text])
        assert reward.range[0] <= plain <= reward.range[1]
        assert reward(plain_trajectories([text]))[0].value == plain
    assert plain in (0.0, 1.0) or math.isfinite(plain)


@settings(max_examples=300, deadline=None)
@given(texts)
def test_readers_never_fail(text: str) -> None:
    answer = extract_answer(text)
    assert BoxedFormat()([text])[0] == float(bool(answer.strip()) and is_expression(answer))
    assert isinstance(reasoning_of(text), str)
    score = parse_unit_score(text)
    assert score is None or 0 <= score <= 1
    parts = think_answer(text)
    assert parts is None or (parts.think and parts.answer)
    if normalise_expression(text):
        assert same_answer(text, text)


@settings(max_examples=200, deadline=None)
@given(st.integers(-9999, 9999), st.integers(1, 99))
def test_numbers_are_expressions_and_equal_themselves(a: int, b: int) -> None:
    for text in (str(a), f"{a}/{b}", f"\\frac{{{a}}}{{{b}}}", f"{a}.{b}", f"x = {a}", f"{a},{b}", f"{a} \\text{{ cm}}"):
        assert is_expression(text)
    assert same_answer(f"{a}/{b}" if a >= 0 else f"-{-a}/{b}", f"{'-' if a < 0 else ''}\\frac{{{abs(a)}}}{{{b}}}")
