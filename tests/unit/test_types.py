"""The nouns: masks, step spans and what may not be built."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guerdon.types import (
    Group,
    Score,
    Segmenter,
    Span,
    StopReason,
    Task,
    Trajectory,
    Turn,
    Usage,
    action_mask,
    group_ids,
    last_action_index,
    policy_text,
    response_ids,
    response_logprobs,
    response_text,
    step_ends,
    step_ids,
    step_spans,
    validate_score,
)


def said(text: str, *, speaker: str = "policy", first: int = 0) -> Turn:
    """One token for every character."""
    ids = tuple(range(first, first + len(text)))
    logprobs = tuple(-0.5 for _ in text) if speaker == "policy" else None
    return Turn(speaker, text, ids, logprobs, tuple(range(1, len(text) + 1)))  # type: ignore[arg-type]


def trajectory(*turns: Turn) -> Trajectory:
    return Trajectory(Task("t", "q"), turns, StopReason.DONE)


def test_a_task_takes_text_or_messages_and_knows_its_question() -> None:
    assert Task("a", "why?").prompt == ({"role": "user", "content": "why?"},)
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "two"},
    ]
    assert Task("a", chat).question == "two"
    assert isinstance(Task("a", chat).prompt, tuple)
    assert Task("a", [{"role": "system", "content": "be brief"}]).question == ""


def test_masks_ids_and_texts_over_several_turns() -> None:
    t = trajectory(said("ab"), said("XYZ", speaker="environment", first=10), said("c", first=20))
    assert response_ids(t) == [0, 1, 10, 11, 12, 20]
    assert action_mask(t) == [1, 1, 0, 0, 0, 1]
    assert response_logprobs(t) == [-0.5, -0.5, 0.0, 0.0, 0.0, -0.5]
    assert (response_text(t), policy_text(t), len(t)) == ("abXYZc", "abc", 6)
    assert last_action_index(t) == 5
    assert last_action_index(trajectory(said("XY", speaker="environment"))) is None
    assert last_action_index(trajectory()) is None


def test_a_policy_turn_without_logprobs_is_named() -> None:
    with pytest.raises(ValueError, match="turn 0 of task 't' has no recorded"):
        response_logprobs(trajectory(Turn("policy", "a", (1,))))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"speaker": "tool", "text": "a"}, "speaker must be"),
        ({"speaker": "policy", "text": "a", "token_ids": (1,), "logprobs": (0.0, 0.0)}, "logprobs has 2 entries for 1"),
        ({"speaker": "policy", "text": "a", "token_ids": (1,), "token_ends": ()}, "token_ends has 0 entries for 1"),
        ({"speaker": "environment", "text": "a", "token_ids": (1,), "logprobs": (0.0,)}, "was not sampled"),
    ],
)
def test_a_turn_that_contradicts_itself_is_refused(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Turn(**fields)


def test_group_numbers_follow_the_groups_not_their_size() -> None:
    one, two = trajectory(said("a")), trajectory(said("b"))
    assert group_ids([Group(one.task, (one, two)), Group(one.task, ()), Group(one.task, (one,))]) == [0, 0, 2]


def test_usage_adds_up() -> None:
    assert Usage(1, 2, 3, 0.5, 1.0) + Usage(1, 1, 1, 0.25, 0.5) == Usage(2, 3, 4, 0.75, 1.5)


# -- steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "text", "pieces"),
    [
        ("turns", "a\nb", ["a\nb"]),
        ("lines", "ab\ncd\ne", ["ab\n", "cd\n", "e"]),
        ("lines", "ab\n\n\ncd", ["ab\n\n\n", "cd"]),
        ("lines", "\n\nab\ncd\n", ["\n\nab\n", "cd\n"]),
        ("blank_lines", "a\nb\n\nc\n \nd", ["a\nb\n\n", "c\n \n", "d"]),
        ("lines", "   ", ["   "]),
        ("lines", "", []),
    ],
)
def test_text_is_cut_where_a_reader_would_cut_it(by: str, text: str, pieces: list[str]) -> None:
    ends = Segmenter(by).offsets(text)  # type: ignore[arg-type]
    assert [text[a:b] for a, b in pairwise([0, *ends])] == pieces


def test_steps_skip_the_environment_and_never_cross_a_turn() -> None:
    t = trajectory(said("a\nb"), said("X\nY", speaker="environment"), said("c\nd"))
    spans = step_spans(t, Segmenter("lines"))
    assert spans == (Span(0, 2), Span(2, 3), Span(6, 8), Span(8, 9))
    assert step_ends(spans) == [1, 2, 7, 8]
    assert step_ids(spans, len(t)) == [0, 0, 1, -1, -1, -1, 2, 2, 3]


def test_a_token_across_a_cut_belongs_to_the_step_in_which_it_starts() -> None:
    turn = Turn("policy", "ab\ncd", (1, 2, 3), (0.0, 0.0, 0.0), (2, 4, 5))  # "ab", "\nc", "d"
    assert step_spans(trajectory(turn), Segmenter("lines")) == (Span(0, 2), Span(2, 3))


def test_cutting_inside_a_turn_needs_token_ends() -> None:
    with pytest.raises(ValueError, match="token_ends"):
        step_spans(trajectory(Turn("policy", "a\nb", (1, 2), (0.0, 0.0))), Segmenter("lines"))


@pytest.mark.parametrize(
    "fields", [{"by": "words"}, {"by": "regex"}, {"by": "lines", "pattern": "x"}, {"by": "callable"}, {"cut": len}]
)
def test_a_segmenter_that_contradicts_itself_is_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match=r"required|must be"):
        Segmenter(**fields)


@pytest.mark.parametrize("spans", [[Span(0, 3), Span(2, 4)], [Span(2, 3), Span(0, 1)], [Span(0, 9)]])
def test_spans_that_overlap_or_exceed_are_refused(spans: list[Span]) -> None:
    with pytest.raises(ValueError, match="overlaps, is out of order or exceeds"):
        step_ids(spans, 5)


def test_an_empty_step_has_no_end() -> None:
    with pytest.raises(ValueError, match="step 1 covers no token"):
        step_ends([Span(0, 1), Span(1, 1)])


@pytest.mark.parametrize("bounds", [(-1, 2), (3, 2)])
def test_a_span_is_forwards(bounds: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        Span(*bounds)


texts = st.lists(st.text(alphabet="ab \n", max_size=12), min_size=1, max_size=4)


@given(texts, st.sampled_from(["turns", "lines", "blank_lines"]))
def test_steps_partition_the_policy_tokens(parts: list[str], by: str) -> None:
    turns = [said(text, speaker="policy" if k % 2 == 0 else "environment") for k, text in enumerate(parts)]
    t = trajectory(*turns)
    spans = step_spans(t, Segmenter(by))  # type: ignore[arg-type]
    ids = step_ids(spans, len(t))
    assert [i >= 0 for i in ids] == [bool(m) for m in action_mask(t)]
    assert all(len(s) > 0 for s in spans)


# -- scores --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, 0.5, True])
def test_numbers_are_scores(value: float) -> None:
    assert validate_score(value, reward="r", task_id="t") == Score(float(value))


@pytest.mark.parametrize(
    "value", [None, "1.0", math.nan, math.inf, Score(math.nan), Score(1.0, (math.nan,), (Span(0, 1),)), [1.0]]
)
def test_what_is_no_finite_score_is_invalid_and_names_reward_and_task(value: object) -> None:
    score = validate_score(value, reward="length", task_id="t7")
    assert not score.valid and math.isnan(score.value)
    assert "'length'" in (score.reason or "") and "'t7'" in (score.reason or "")


def test_an_invalid_score_says_why_and_stays_as_it_is() -> None:
    with pytest.raises(ValueError, match="must say why"):
        Score(math.nan, valid=False)
    score = Score.invalid("the judge was silent", format=1.0)
    assert validate_score(score, reward="judge", task_id="t") is score and score.parts == {"format": 1.0}


def test_step_values_and_spans_come_together() -> None:
    with pytest.raises(ValueError, match="come together"):
        Score(1.0, steps=(1.0,))
    with pytest.raises(ValueError, match="1 step values for 2"):
        Score(1.0, (1.0,), (Span(0, 1), Span(1, 2)))


def test_the_nouns_are_light() -> None:
    code = (
        "import sys, guerdon, guerdon.types; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
