"""Query types: the classifier that comes along, the parser of a judge's label, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import ConfigError, DataError
from guerdon.reward_models import QueryTypeClassifier, parse_query_type, query_type
from guerdon.reward_models.query_types import CLOSED_QUERIES, OPEN_QUERIES, QUERY_TYPE_PROMPT

pytest.importorskip("sklearn")
GSM8K = Path("../shared/data/gsm8k/test.jsonl")


def test_obvious_queries() -> None:
    kind = query_type()
    assert kind is query_type()
    assert kind("Tell me about the history of Zorvane.") == "open"
    assert kind("Write a poem about my cat.") == "open"
    assert kind("What is the river of Zorvane?") == "closed"
    assert kind("How many apples are left if I eat 3 of 7?") == "closed"


def test_held_out_queries_of_the_set() -> None:
    queries = [*OPEN_QUERIES, *CLOSED_QUERIES]
    types = ["open"] * len(OPEN_QUERIES) + ["closed"] * len(CLOSED_QUERIES)
    held = slice(0, None, 5)
    seen = [k for k in range(len(queries)) if k % 5]
    model = QueryTypeClassifier().fit([queries[k] for k in seen], [types[k] for k in seen])
    assert model.score(queries[held], types[held]) > 0.8
    assert len(set(queries)) == len(queries)


def test_grade_school_problems_are_closed() -> None:
    if not GSM8K.is_file():
        pytest.skip("no shared data: GSM8K's test problems are absent")
    asked = [json.loads(line)["question"] for line in GSM8K.read_text(encoding="utf-8").splitlines()[:200]]
    assert query_type().predict(asked).count("closed") >= 190


def test_a_judges_label() -> None:
    assert parse_query_type("<answer>open</answer>") == "open"
    assert parse_query_type("I read closed things: <answer> Closed </answer>") == "closed"
    assert parse_query_type("This is open-ended.") == "open"
    for bad in ("", "maybe", "open or closed"):
        with pytest.raises(DataError, match="open or closed"):
            parse_query_type(bad)
    assert "{query}" in QUERY_TYPE_PROMPT


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="not fitted"):
        QueryTypeClassifier()("what?")
    with pytest.raises(ConfigError, match="list"):
        query_type().predict("what?")
    for queries, types in ((["a"], ["open"]), (["a", "b"], ["open"]), (["a", "b"], ["open", "shut"])):
        with pytest.raises(DataError):
            QueryTypeClassifier().fit(queries, types)
    for bad in ({"l2": 0}, {"words": 0}):
        with pytest.raises(ConfigError):
            QueryTypeClassifier(**bad)
    assert query_type().predict([]) == []


@given(st.text(max_size=80))
@settings(max_examples=40, deadline=None)
def test_any_text_has_a_type(text: str) -> None:
    assert query_type()(text) in ("open", "closed")
    assert 0.0 <= query_type().probabilities([text])[0] <= 1.0
