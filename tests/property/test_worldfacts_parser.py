"""Every question in every phrasing is read back as the fact that it asks for, however it is written."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.environments.worldfacts import FRAMES, RELATIONS, load_world, parse, sub_question
from guerdon.environments.worldfacts.facts import normal_name

pytestmark = pytest.mark.property

WORLD = load_world()
FACTS = st.sampled_from(WORLD.facts)
REGISTERS = st.sampled_from(["compact", "natural"])


@pytest.mark.parametrize("relation", list(RELATIONS))
def test_every_template_of_a_relation_is_understood(relation: str) -> None:
    for fact in (f for f in WORLD.facts if f.relation == relation):
        assert parse(sub_question(relation, fact.subject, "compact"), WORLD) is fact
        for frame in range(FRAMES):
            text = sub_question(relation, fact.subject, "natural", frame)
            assert parse(text, WORLD) is fact, text


@settings(max_examples=300, deadline=None)
@given(
    fact=FACTS,
    register=REGISTERS,
    frame=st.integers(0, FRAMES - 1),
    case=st.sampled_from([str.lower, str.upper, str.title, str.swapcase, str]),
    before=st.sampled_from(["", "  ", "Please ", "Can you tell me "]),
    after=st.sampled_from(["", "?", " ?", ".", "!!", "  "]),
    article=st.sampled_from(["", "the "]),
)
def test_case_articles_blanks_and_punctuation_do_not_matter(
    fact, register, frame, case, before, after, article
) -> None:  # type: ignore[no-untyped-def]
    text = sub_question(fact.relation, article + fact.subject, register, frame)
    text = text.removesuffix("?").removesuffix(".").replace(" ", "  ")
    assert parse(before + case(text) + after, WORLD) is fact


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_read_without_an_error(text: str) -> None:
    fact = parse(text, WORLD)
    assert fact is None or fact in WORLD.facts


@settings(max_examples=200, deadline=None)
@given(first=FACTS, relation=st.sampled_from(list(RELATIONS)), register=REGISTERS, frame=st.integers(0, FRAMES - 1))
def test_a_composed_question_is_not_understood(first, relation, register, frame) -> None:  # type: ignore[no-untyped-def]
    inner = sub_question(first.relation, first.subject, "compact")
    assert parse(sub_question(relation, inner, register, frame), WORLD) is None


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_normal_names_are_stable(text: str) -> None:
    once = normal_name(text)
    assert not once.startswith(" ") and "  " not in once
    assert normal_name(once) == once
    # Straße: upper case has more letters, folding brings them together.
    assert normal_name(text.upper()) == normal_name(text.upper().lower())
