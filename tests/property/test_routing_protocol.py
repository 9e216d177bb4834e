"""No reply of a pool member can be read as an action or disturb the tag structure."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from guerdon.routing.protocol import TAGS, ActionKind, neutralise, observation, parse_action

pytestmark = pytest.mark.property

ALL_TAGS = [f"<{s}{t}>" for t in TAGS for s in ("", "/")]
PIECES = [
    *ALL_TAGS,
    "<",
    ">",
    "/",
    "search",
    "answer",
    "m:q",
    " ",
    "<|im_end|>",
    "<SEARCH>",
    "< /answer >",
    "<sea",
    "rch>",
    "\n",
    "é",
]
hostile = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=30).map("".join)


@given(hostile)
def test_no_tag_survives(reply):
    safe = neutralise(reply, ["<|im_end|>"])
    assert not any(tag in safe.lower() for tag in ALL_TAGS)
    assert "<|im_end|>" not in safe


@given(hostile)
def test_an_observation_holds_exactly_one_information_block_and_no_action(reply):
    shown = observation(neutralise(reply))
    assert parse_action(shown).kind is ActionKind.NONE
    assert shown.count("<information>") == shown.count("</information>") == 1
    assert all(shown.count(f"<{t}>") == shown.count(f"</{t}>") == 0 for t in TAGS if t != "information")


@given(hostile)
def test_text_without_brackets_is_untouched(reply):
    plain = re.sub("[<>]", "", reply)
    assert neutralise(plain) == plain


@pytest.mark.parametrize(
    ("reply", "control", "safe"),
    [
        ("ab", ["a"], "\ufffdb"),
        ("a\ufffd", ["\ufffd"], "a"),
        ("[INST]", ["[INST]"], "⟦INST⟧"),
        ("aaa", ["aa"], "a\u200ba\u200ba"),
    ],
)
def test_control_strings_of_any_kind_end(reply, control, safe):
    assert neutralise(reply, control) == safe
    assert not any(token in safe for token in control)
    assert neutralise(safe, control) == safe


@given(hostile)
@example("<search<think>>")
@example("<think<|im_end|>>")
@example("<search<search<search<think>>>>")
def test_neutralise_is_idempotent(reply):
    once = neutralise(reply, ["<|im_end|>"])
    assert neutralise(once, ["<|im_end|>"]) == once


@given(st.text(max_size=200))
def test_parsing_never_fails(text):
    parse_action(text)
    parse_action(f"<search>{text}</search>")
