"""Whatever the calls, ToolRL's reward keeps its range, its maximum and its order of severity."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.rewards.tools import ToolCallMatch, ToolParseError, ToolRLReward, parse_tool_calls, toolrl

pytestmark = pytest.mark.property

value = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from(["x", "3", "\ud800"])
    | st.lists(st.integers(0, 1), max_size=2)
)
call = st.builds(
    lambda n, p: {"name": n, "parameters": p},
    st.sampled_from("fgh"),
    st.dictionaries(st.sampled_from("abcd"), value, max_size=4),
)
calls = st.lists(call, min_size=1, max_size=4)
GRANULARITIES = ("fine", "intermediate", "coarse", "strict_keys")
PIECES = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>", "\n", '{"name": "f", "parameters": {}}',
          '{"name": 1}', "[", "]", "{", "}", "x", "\x00", "\ud800", "1e999", "NaN"]  # fmt: skip
texts = st.text(max_size=40) | st.lists(st.sampled_from(PIECES), max_size=15).map("".join)


def output(made: list, response: str | None = None) -> str:
    text = "<think>t</think>\n<tool_call>\n" + "\n".join(map(json.dumps, made)) + "\n</tool_call>"
    return text if response is None else f"{text}\n<response>{response}</response>"


@settings(max_examples=200, deadline=None)
@given(st.lists(call, max_size=4), calls, st.sampled_from(GRANULARITIES), st.sampled_from(["greedy", "optimal"]))
def test_values_stay_in_range_and_the_reference_has_the_highest(got, want, granularity, matching) -> None:
    match = ToolCallMatch(granularity=granularity, matching=matching)
    assert -3.0 <= match.score(got, want) <= 3.0 == match.score(copy.deepcopy(want), want)
    made = match.explain(got, want)
    assert 0.0 <= made["s"] <= made["s_max"] + 1e-9
    if granularity != "coarse":
        assert made["s"] == pytest.approx(made["name"] + made["keys"] + made["values"])


@settings(max_examples=200, deadline=None)
@given(calls, st.data())
def test_a_wrong_value_costs_one_and_a_missing_call_more(want, data) -> None:
    match = ToolCallMatch(matching="optimal")
    k = data.draw(st.integers(0, len(want) - 1))
    if want[k]["parameters"] and [c["name"] for c in want].count(want[k]["name"]) == 1:
        key = data.draw(st.sampled_from(sorted(want[k]["parameters"])))
        wrong = copy.deepcopy(want)
        wrong[k]["parameters"][key] = "no such value"
        s_max = match.explain(want, want)["s_max"]
        assert match.score(wrong, want) == pytest.approx(3.0 - 6.0 / s_max)
        assert match.score(wrong[:k] + wrong[k + 1 :], want) <= match.score(wrong, want) + 1e-9
    spoiled = [*want, {"name": "no such tool", "parameters": {}}]
    assert match.score(spoiled, want) < 3.0


@settings(max_examples=200, deadline=None)
@given(calls, st.randoms())
def test_the_order_of_reference_keys_does_not_matter(want, rng) -> None:
    got = []
    for c in want:
        items = list(c["parameters"].items())
        rng.shuffle(items)
        got.append({"name": c["name"], "parameters": dict(items)})
    assert ToolCallMatch().score(got, want) == 3.0


@settings(max_examples=300, deadline=None)
@given(
    texts,
    calls,
    st.sampled_from(["constant", "two_stage", "smooth"]),
    st.integers(0, 300),
    st.sampled_from(GRANULARITIES),
)
def test_no_completion_breaks_any_switch(text, want, schedule, step, granularity) -> None:
    reward = toolrl(granularity, length="dynamic", schedule=schedule)
    batch = reward([text, output(want)], [output(want)] * 2, step)
    low, high = reward.range
    assert low - 1e-9 <= batch.total[0] <= high + 1e-9
    assert batch.total[0] <= batch.total[1] + 1  # a longer thought is all that can be better than the reference
    assert batch.total[0] == pytest.approx(sum(v[0] for v in batch.parts.values()))


@settings(max_examples=200, deadline=None)
@given(calls)
def test_calls_survive_writing_and_reading(want) -> None:
    assert parse_tool_calls(output(want)) == want
    assert ToolRLReward()([output(want, "hi")], [output(want, "ho")]).total[0] == 4.0
    try:
        parse_tool_calls(output(want)[:-1])
    except ToolParseError:
        return
    raise AssertionError("half a tag was read as a tag")
