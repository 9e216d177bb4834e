"""The tool-calling testbed: what a prompt shows, what is held out, and that its references earn everything."""

from __future__ import annotations

import json
import random

import pytest

from guerdon.environments.tool_tasks import HELD_OUT, TOOLS, ExactCalls, drill_tasks, tool_tasks, tool_tokenizer
from guerdon.errors import ConfigError
from guerdon.rewards import ToolRLReward, parse_tool_calls
from guerdon.types import StopReason, Task, Trajectory, Turn


def said(task: Task, text: str) -> Trajectory:
    return Trajectory(task, (Turn("policy", text),), StopReason.EOS)


def splits(register: str = "compact") -> list[list[Task]]:
    return [
        tool_tasks(80, register=register),  # type: ignore[arg-type]
        tool_tasks(80, "test", register=register),  # type: ignore[arg-type]
        tool_tasks(80, "test", unseen=True, register=register),  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("register", ["compact", "natural"])
def test_references_earn_everything_and_everything_they_need_stands_in_the_prompt(register: str) -> None:
    for tasks in splits(register):
        texts = [t.reference for t in tasks]
        assert set(ToolRLReward()(texts, texts).total.tolist()) == {4.0}
        assert all(s.value == 1.0 for s in ExactCalls()([said(t, t.reference) for t in tasks]))
        for task in tasks:
            prompt = "".join(m["content"] for m in task.prompt)
            calls = parse_tool_calls(task.reference)
            assert len(calls) == task.meta["calls"] == len(task.meta["topics"])
            for call in calls:
                assert call["name"] in prompt
                for key, value in call["parameters"].items():
                    assert f'"{key}":' in prompt and json.dumps(value) in prompt


def test_training_never_shows_the_held_out_tools() -> None:
    train, test, unseen = splits()
    held = {t.name for t in TOOLS if t.topic in HELD_OUT} | {f" list {t} " for t in HELD_OUT}
    assert len(HELD_OUT) == 4 and len(TOOLS) == 16
    for task in [*train, *test]:
        assert not any(word in task.prompt[0]["content"] for word in held)
    assert all(set(task.meta["topics"]) <= set(HELD_OUT) for task in unseen)
    assert not {t.prompt[0]["content"] for t in train} & {t.prompt[0]["content"] for t in test}


def test_names_and_order_cannot_be_remembered() -> None:
    names, keys = set(), set()
    for task in tool_tasks(200, calls=(1,)):
        if task.meta["topics"] == ("hotel",):
            (call,) = parse_tool_calls(task.reference)
            names.add(call["name"])
            keys.add(tuple(call["parameters"]))
    assert "book_room" in names and len(names) > 3 and len(keys) > 5
    plain = tool_tasks(50, masked=0.0)
    known = {t.name for t in TOOLS}
    assert all(c["name"] in known for t in plain for c in parse_tool_calls(t.reference))
    assert not any(c["name"] in known for t in tool_tasks(50, masked=1.0) for c in parse_tool_calls(t.reference))


def test_the_same_arguments_give_the_same_tasks() -> None:
    assert tool_tasks(20, seed=3) == tool_tasks(20, seed=3) != tool_tasks(20, seed=4)
    assert tool_tasks(20) == tool_tasks(30)[:20]
    assert drill_tasks(20) == drill_tasks(20)
    ids = [t.id for tasks in (*splits(), drill_tasks(80)) for t in tasks]
    assert len(set(ids)) == len(ids)


def test_a_word_is_a_token() -> None:
    tokenizer = tool_tokenizer()
    comma = tokenizer.convert_tokens_to_ids(",")
    for task in [*tool_tasks(20), *tool_tasks(20, "test", unseen=True), *drill_tasks(20)]:
        for text in (task.prompt[0]["content"], task.reference):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text
            assert {i for i in ids if i < 258} <= {comma}, "a byte stands where a word should"
    assert tokenizer.decode(tokenizer("<think> quite other words\n")["input_ids"]) == "<think> quite other words\n"


def test_exact_calls() -> None:
    task = Task(
        "t", "q", '<tool_call>\n{"name": "f", "parameters": {"a": 1}}\n{"name": "g", "parameters": {}}\n</tool_call>'
    )
    right = task.reference
    lines = right.split("\n")
    swapped = "\n".join([lines[0], lines[2], lines[1], lines[3]])
    fewer = "\n".join([lines[0], lines[1], lines[3]])
    for text, value, calls in ((right, 1.0, 2), (f"no form {right}", 1.0, 2), (swapped, 0.0, 2), (fewer, 0.0, 1), ("", 0.0, 0), (right.replace("1", '"1"'), 0.0, 2)):  # fmt: skip
        (score,) = ExactCalls()([said(task, text)])
        assert (score.value, score.parts["calls"]) == (value, calls)


def test_a_policy_that_does_not_read_the_list_fails() -> None:
    """The names of tools and keys as they were in another prompt earn little."""
    tasks = tool_tasks(300, calls=(1,), seed=5)
    by_topic: dict[str, list[Task]] = {}
    for task in tasks:
        by_topic.setdefault(task.meta["topics"][0], []).append(task)
    rng = random.Random(0)
    guesses = [said(t, rng.choice(by_topic[t.meta["topics"][0]]).reference) for t in tasks]
    assert sum(s.value for s in ExactCalls()(guesses)) / len(tasks) < 0.25


@pytest.mark.parametrize(
    "bad",
    [{"unseen": True}, {"calls": ()}, {"calls": (0,)}, {"calls": (5,), "listed": 4}, {"listed": 13}, {"masked": 1.5}, {"register": "loud"}],
)  # fmt: skip
def test_senseless_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError):
        tool_tasks(1, **bad)
