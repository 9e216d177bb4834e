"""The world of invented places, and the benchmark of triplets: counts and gold by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.environments.topics import (
    COPY,
    FACTS,
    MOST,
    OTHER,
    REPEAT,
    STOP,
    Question,
    gold,
    make_questions,
    make_topics,
)
from guerdon.errors import ConfigError, DataError
from guerdon.evaluation import Triplet, relevance_benchmark

TOPICS = make_topics(6, seed=1)
OPEN = Question("tell me", 0, None, "all", 1)
CLOSED = Question("what is it?", 0, 4, "a stag", 1)


def test_topics_and_questions() -> None:
    assert len({t.name for t in TOPICS}) == 6
    assert all(len(t.facts) == len(set(t.facts)) == len(t.answers) == MOST for t in TOPICS)
    assert all(t.name in f for t in TOPICS for f in (*t.facts, *t.answers))
    assert make_topics(6, seed=1) == TOPICS and make_topics(6, seed=2) != TOPICS
    asked = make_questions(TOPICS, [1, 3, 5])
    assert [q.type for q in asked] == ["open", "closed"] * 3
    for q in asked:
        assert q.other in (1, 3, 5) and q.other != q.topic
        said = q.sentences(TOPICS)
        assert len(said) == STOP + 1 and said[COPY] == q.text and said[REPEAT] == said[STOP] == ""
        assert tuple(said[FACTS]) == TOPICS[q.topic].facts and tuple(said[OTHER]) == TOPICS[q.other].facts
        if q.asked is not None:
            assert TOPICS[q.topic].attributes[q.asked] in q.text and q.reference == TOPICS[q.topic].answers[q.asked]
    for bad in (lambda: make_topics(1), lambda: make_topics(10_000), lambda: make_questions(TOPICS, [1])):
        with pytest.raises(ConfigError):
            bad()


def test_gold_by_hand() -> None:
    assert gold(OPEN, [1, 2, 3])["gold"] == pytest.approx(3 / 12)
    assert gold(OPEN, [1, 1, 2, COPY, 14])["gold"] == 0.0  # two facts, one copy, one off-topic
    assert gold(OPEN, range(1, 13))["gold"] == 1.0
    assert gold(OPEN, [COPY, REPEAT]) == {"gold": 0.0, "copy": 1.0, "repeat": 0.5, "sentences": 2.0}
    assert gold(OPEN, [COPY, 1, 2])["copy"] == 0.0 and gold(OPEN, [COPY, 1])["copy"] == 1.0
    assert gold(OPEN, [1, REPEAT, REPEAT, 2, STOP, 3])["repeat"] == pytest.approx(2 / 4)
    assert gold(CLOSED, [5])["gold"] == 1.0 and gold(CLOSED, [5, 6])["gold"] == pytest.approx(0.9)
    assert gold(CLOSED, [6])["gold"] == pytest.approx(-0.1)
    assert gold(CLOSED, [STOP]) == {"gold": 0.0, "copy": 0.0, "repeat": 0.0, "sentences": 0.0}


@given(st.lists(st.integers(0, STOP), max_size=MOST))
@settings(max_examples=100, deadline=None)
def test_gold_stays_in_its_range(actions: list[int]) -> None:
    for question in (OPEN, CLOSED):
        found = gold(question, actions)
        assert (0 if question is OPEN else -1.2001) <= found["gold"] <= 1 and 0 <= found["repeat"] < 1
        assert found["copy"] in (0.0, 1.0) and found["sentences"] <= len(actions)


def test_the_benchmark() -> None:
    items = [Triplet("q", "on", "off off off"), ("q", "on on", "off"), Triplet("q", "same", "same")]
    on_topic = lambda qs, rs: np.array([r.count("on") for r in rs])  # noqa: E731
    found = relevance_benchmark(on_topic, items, bins=2)
    assert found["accuracy"] == pytest.approx(2.5 / 3) and found["n"] == 3 and found["wins"] == [1.0, 1.0, 0.5]
    assert [(g["low"], g["high"], g["n"]) for g in found["by_length_gap"]] == [(-1, 0, 2), (2, 2, 1)]
    longest = relevance_benchmark(lambda qs, rs: [len(r) for r in rs], items)
    assert longest["wins"] == [0.0, 1.0, 0.5]
    assert len(relevance_benchmark(on_topic, items, bins=10)["by_length_gap"]) == 3
    with pytest.raises(DataError, match="at least one"):
        relevance_benchmark(on_topic, [])
    for bad in (lambda qs, rs: [1.0], lambda qs, rs: [float("nan")] * len(rs)):
        with pytest.raises(DataError, match="one finite number"):
            relevance_benchmark(bad, items)
