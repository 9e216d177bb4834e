"""Reading chat requests: every mistake is a 400 that names the field; nothing is dropped in silence."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.serve import wire
from guerdon.serve.problems import Problem
from guerdon.serve.request import parse_chat, question_of
from guerdon.serve.stops import StopCutter, cut_at

GOOD = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def problem(body, headers=None) -> Problem:
    with pytest.raises(Problem) as caught:
        parse_chat(body, headers or {}, 0.0)
    assert caught.value.status == 400
    return caught.value


def test_defaults():
    request = parse_chat(GOOD, {}, 0.0)
    assert (request.model, request.stream, request.max_tokens, request.temperature) == ("m", False, None, None)
    assert request.messages == [{"role": "user", "content": "Hi"}]
    assert request.deadline is None and request.max_cost_usd is None


def test_text_parts_are_joined_and_developer_means_system():
    body = {
        "model": "m",
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c"},
        ],
    }
    request = parse_chat(body, {}, 0.0)
    assert [m["role"] for m in request.messages] == ["system", "user", "assistant"]
    assert question_of(request.messages) == "a\nb"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": "a"}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"max_cost_usd": -0.1}, "max_cost_usd"),
        ({"max_cost_usd": 10**400}, "max_cost_usd"),
        ({"max_calls": 1.5}, "max_calls"),
        ({"timeout": "soon"}, "timeout"),
    ],
)
def test_a_mistake_names_its_field(change, param):
    got = problem({**GOOD, **change})
    assert got.param == param and param.split("[")[0].split(".")[0] in got.message


def test_values_that_change_nothing_are_accepted():
    body = {
        **GOOD, "n": 1, "tools": [], "logprobs": False, "frequency_penalty": 0.0, "response_format": {"type": "text"},
        "user": "u", "metadata": {"a": "b"}, "store": False, "logit_bias": None,
    }  # fmt: skip
    parse_chat(body, {}, 0.0)


def test_caps_take_the_tighter_of_body_and_header():
    headers = {b"x-guerdon-max-cost-usd": b"0.2", b"x-guerdon-max-calls": b"3", b"x-guerdon-deadline-ms": b"1500"}
    request = parse_chat({**GOOD, "max_cost_usd": 0.1, "max_calls": 5, "timeout": 9}, headers, 100.0)
    assert (request.max_cost_usd, request.max_calls, request.deadline) == (0.1, 3, 101.5)
    assert parse_chat({**GOOD, "max_tokens": 9, "max_completion_tokens": 4}, {}, 0.0).max_tokens == 4


@pytest.mark.parametrize("value", [b"", b"x", b"-1", b"nan", b"inf"])
def test_a_bad_cap_header_is_named(value):
    assert problem(GOOD, {b"x-guerdon-max-cost-usd": value}).param == "x-guerdon-max-cost-usd"


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b'{"a": NaN}', b'{"a": "\\ud800"}', b"[" * 5000, b"[" * 100_000])
@pytest.mark.parametrize("fast", [True, False])
def test_what_is_not_json_is_a_value_error(text, fast, monkeypatch):
    if not fast:
        monkeypatch.setattr(wire, "orjson", None)
    with pytest.raises(ValueError):
        wire.loads(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "seed", "stop", "n", "tools", "response_format", "max_cost_usd", "max_calls", "timeout", "logit_bias", "user",
]  # fmt: skip
MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"role": st.sampled_from(["user", "system", "x"]) | JSON, "content": JSON}),
    max_size=3,
)


@pytest.mark.property
@given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.sampled_from([{}, GOOD]), st.none() | MESSAGES)
def test_any_json_is_read_or_refused(body, base, messages):
    body = {**base, **body}
    if messages is not None:
        body["messages"] = messages
    try:
        request = parse_chat(body, {}, 0.0)
    except Problem as refused:
        assert refused.status == 400
        json.dumps(refused.message).encode()
    else:
        assert request.messages and request.model


def test_the_stop_that_is_complete_first_counts():
    assert cut_at("xabcy", ["abc", "b"]) == "xa"
    assert cut_at("xabcy", ["bc", "c"]) == "xa"
    assert cut_at("xabcy", ["q"]) == "xabcy"


@pytest.mark.property
@settings(max_examples=400)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_cutting_a_stream_equals_cutting_the_whole(text, stops, data):
    cutter, shown, at = StopCutter(stops), "", 0
    while at < len(text):
        step = data.draw(st.integers(1, 5))
        shown += cutter.feed(text[at : at + step])
        at += step
        # Nothing of a stop string may ever have been shown.
        assert cut_at(text, stops).startswith(shown)
    assert shown + cutter.rest() == cut_at(text, stops)
    assert cutter.done == (cut_at(text, stops) != text)
