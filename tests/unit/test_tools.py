"""ToolRL's reward: hand-computed scores, the form by the reference, every ablation switch, and real data."""

from __future__ import annotations

import itertools
import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import ConfigError, DataError, RewardError
from guerdon.rewards import Progress
from guerdon.rewards.tools import (
    LengthReward,
    ScaleSchedule,
    ToolCallMatch,
    ToolFormat,
    ToolParseError,
    ToolRLReward,
    parse_tool_calls,
    reference_calls,
    toolrl,
)
from guerdon.types import StopReason, Task, Trajectory, Turn

G = [{"name": "f", "parameters": {"a": 1, "b": "x"}}, {"name": "g", "parameters": {}}]


def output(calls: list[dict], think: str = "t", response: str | None = None) -> str:
    text = f"<think>{think}</think>\n<tool_call>\n" + "\n".join(map(json.dumps, calls)) + "\n</tool_call>"
    return text if response is None else f"{text}\n<response>{response}</response>"


def test_the_published_formula_by_hand() -> None:
    match = ToolCallMatch()
    # S_max = 1 + (1 + 2) + (1 + 0) = 5
    assert match.score(G, G) == 3.0
    # names {f, g} against {f}: 1/2; keys {a, b} against {a}: 1/2; one value: S = 0.5 + 0.5 + 1 = 2
    assert match.score([{"name": "f", "parameters": {"a": 1}}], G) == pytest.approx(6 * 2 / 5 - 3)
    # the order of calls matters for equality only: every term is full, S = 1 + (1 + 2) + 1, but J of the name lists is 1
    swapped = [G[1], G[0]]
    # g has no parameters: its key lists are equal, so it scores 1
    assert match.explain(swapped, G) == {"name": 1.0, "keys": 2.0, "values": 2.0, "s": 5.0, "s_max": 5.0, "equal": 0.0}
    # extra parameters and extra calls cost through the Jaccard indices only
    extra = [{"name": "f", "parameters": {"a": 1, "b": "x", "c": 2}}, G[1], {"name": "h", "parameters": {}}]
    made = match.explain(extra, G)
    assert made["name"] == pytest.approx(2 / 3) and made["keys"] == pytest.approx(2 / 3 + 1) and made["values"] == 2
    assert match.score([], G) == -3.0 and match.score(None, G) == -3.0
    assert match.score([{"name": "h", "parameters": {"a": 1}}], G) == -3.0


def test_values_are_compared_as_json() -> None:
    one = [{"name": "f", "parameters": {"a": 3}}]
    for value, same in ((3, 1.0), (3.0, 1.0), ("3", 0.0), ([3], 0.0)):
        assert ToolCallMatch().explain([{"name": "f", "parameters": {"a": value}}], one)["values"] == same
    true = [{"name": "f", "parameters": {"a": True}}]
    assert ToolCallMatch().score([{"name": "f", "parameters": {"a": 1}}], true) == 3.0
    assert ToolCallMatch(strict=True).explain([{"name": "f", "parameters": {"a": 1}}], true)["values"] == 0.0


def test_greedy_takes_the_first_reference_first_and_optimal_the_best() -> None:
    want = [{"name": "f", "parameters": {"a": 1}}, {"name": "f", "parameters": {"a": 1, "b": 2}}]
    got = [{"name": "f", "parameters": {"a": 1, "b": 2}}]
    # greedy: the first reference takes it with 1/2 + 1; optimal gives it to the second with 1 + 2
    assert ToolCallMatch().explain(got, want)["s"] == pytest.approx(0.5 + 1.5)
    assert ToolCallMatch(matching="optimal").explain(got, want)["s"] == pytest.approx(0.5 + 3)
    duplicate = [G[1], G[1]]
    assert ToolCallMatch().explain([G[1]], duplicate)["s"] == pytest.approx(0.5 + 1)


@pytest.mark.parametrize(
    ("granularity", "value"),
    [("fine", 6 * (1 + 2 / 3 + 2 + 1) / 5 - 3), ("strict_keys", 6 * (1 + 0 + 2 + 1) / 5 - 3), ("intermediate", 6 * (1 + 1) / 3 - 3), ("coarse", -3.0)],
)  # fmt: skip
def test_granularities(granularity: str, value: float) -> None:
    got = [{"name": "f", "parameters": {"a": 1, "b": "x", "c": 0}}, G[1]]
    assert ToolCallMatch(granularity=granularity).score(got, G) == pytest.approx(value)  # type: ignore[arg-type]
    assert ToolCallMatch(granularity=granularity).score(G, G) == 3.0  # type: ignore[arg-type]


CALLS, WORDS = output(G), "<think>t</think>\n<response>hi</response>"


@pytest.mark.parametrize(
    ("text", "reference", "good"),
    [
        (CALLS, CALLS, True),
        (f"  {CALLS}\n", CALLS, True),
        (CALLS, WORDS, False),
        (WORDS, WORDS, True),
        (output(G, response="ok"), output(G, response="r"), True),
        (CALLS, output(G, response="r"), False),
        ("<think>t</think>", "<think>r</think>", True),
        (CALLS.replace("</think>\n", "</think>\n\n"), CALLS, False),
        (CALLS.replace("\n</tool_call>", "</tool_call>"), CALLS, False),
        (CALLS + "\nmore", CALLS, False),
        (WORDS + "<response>", WORDS, False),
        ("", CALLS, False),
    ],
)
def test_the_form_is_that_of_the_reference(text: str, reference: str, good: bool) -> None:
    assert ToolFormat()([text], [reference])[0] == float(good)


def test_totals() -> None:
    reward = ToolRLReward()
    batch = reward([CALLS, output(G)[:-3], "", WORDS], [CALLS] * 4)
    assert batch.total.tolist() == [4.0, -3.0, -3.0, -3.0]
    # right calls in a wrong form keep their 3
    assert reward([CALLS + "!"], [CALLS]).total[0] == 3.0
    # no call is wanted: correctness is 0 for every response
    assert reward([WORDS, CALLS], [WORDS, WORDS]).total.tolist() == [1.0, 0.0]
    assert reward.range == (-3.0, 4.0)
    text = reward.text(completion=CALLS, reference=G)
    assert text.value == 4.0 and text.parts == {"format": 1.0, "correctness": 3.0}


def test_the_prompts_example_is_never_read() -> None:
    task = Task("t", f"Use this form: {CALLS}", CALLS)
    assert ToolRLReward()([Trajectory(task, (Turn("policy", "no"),), StopReason.EOS)])[0].value == -3.0
    tool = (Turn("policy", "no"), Turn("environment", CALLS))
    assert ToolRLReward()([Trajectory(task, tool, StopReason.EOS)])[0].value == -3.0


@pytest.mark.parametrize(
    "bad",
    ["", "<tool_call>", "<tool_call>\nx\n</tool_call>", "<tool_call>\n[1]\n</tool_call>", '<tool_call>\n{"name": 1, "parameters": {}}\n</tool_call>', '<tool_call>\n{"name": "f"}\n</tool_call>', '<tool_call>\n{"name": "f", "parameters": []}\n</tool_call>', "</tool_call><tool_call>", "<tool_call>\n" + "[" * 100_000 + "\n</tool_call>"],
)  # fmt: skip
def test_calls_that_cannot_be_read_are_the_lowest_value_and_references_an_error(bad: str) -> None:
    with pytest.raises(ToolParseError):
        parse_tool_calls(bad)
    assert ToolRLReward()([bad], [CALLS]).parts["correctness"][0] == -3.0
    if "<tool_call>" in bad:
        with pytest.raises(DataError, match="the reference's"):
            reference_calls(bad)
        with pytest.raises(RewardError, match="text"):
            ToolRLReward().text(completion=CALLS, reference=bad)


def test_length_reward() -> None:
    assert LengthReward()("<think>" + "w " * 256 + "</think>") == 0.5
    assert LengthReward()("<think>" + "w " * 900 + "</think>") == 1.0
    assert LengthReward()("<think>" + "w " * 100 + "</think>") == 0.2  # 0.1953 rounded to two places
    assert LengthReward()("w " * 100) == 0.0 and LengthReward()("<think>a") == 0.0
    assert LengthReward()("<think>a</think><think>" + "w " * 512 + "</think>") == 1.0
    dynamic = LengthReward.dynamic()
    words = "<think>" + "w " * 192 + "</think>"
    assert dynamic(words, 0) == 0.5 and dynamic(words, 105) == 0.3
    assert ToolRLReward(length=LengthReward()).range == (-3.0, 5.0)


def test_schedules() -> None:
    f, c = (0.0, 1.0), (-3.0, 3.0)
    assert ScaleSchedule().ranges(f, c, 99) == (f, c)
    two = ScaleSchedule("two_stage")
    assert two.ranges(f, c, 29) == (f, (-1.0, 1.0)) and two.ranges(f, c, 30) == ((0.0, 0.5), c)
    smooth = ScaleSchedule("smooth")
    assert smooth.ranges(f, c, 0) == ((-2.0, 2.0), (-2.0, 2.0))
    assert smooth.ranges(f, c, 75) == ((-1.0, 1.5), (-2.5, 2.5))
    assert smooth.ranges(f, c, 150) == ((-1.0, 1.0), (-3.0, 3.0)) == smooth.ranges(f, c, 999)
    reward = toolrl(schedule="two_stage")
    task = Trajectory(Task("t", "q", CALLS), (Turn("policy", CALLS),), StopReason.EOS)
    assert reward([task])[0].value == 2.0
    assert reward([task], progress=Progress(30, 100))[0].value == 3.5
    assert reward([CALLS], [CALLS], step=30).total[0] == 3.5


def test_senseless_settings_are_refused() -> None:
    for bad in (
        lambda: toolrl("medium"),
        lambda: toolrl(matching="x"),
        lambda: toolrl(c_range=(1, 1)),
        lambda: toolrl(length="x"),
        lambda: toolrl(schedule="x"),
        lambda: LengthReward(0),
        lambda: ToolFormat((0, float("inf"))),
    ):  # type: ignore[arg-type]
        with pytest.raises(ConfigError):
            bad()
    with pytest.raises(ConfigError, match="1 texts for 0 references"):
        ToolRLReward()(["x"], [])
    with pytest.raises(DataError, match="no reference calls"):
        ToolCallMatch().explain([], [])


value = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["x", "y", "3"])
call = st.builds(
    lambda n, p: {"name": n, "parameters": p},
    st.sampled_from("fgh"),
    st.dictionaries(st.sampled_from("abc"), value, max_size=3),
)


@given(st.lists(call, max_size=3), st.lists(call, min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_optimal_is_the_best_of_all_matchings_and_at_least_greedy(got: list, want: list) -> None:
    greedy, optimal = ToolCallMatch().explain(got, want), ToolCallMatch(matching="optimal").explain(got, want)
    assert optimal["s"] >= greedy["s"] - 1e-12

    def pair(g: dict, p: dict) -> float:
        if g["name"] != p["name"]:
            return 0.0
        a, b = list(g["parameters"]), list(p["parameters"])
        common = len(set(a) & set(b))
        keys = 1.0 if a == b else (common / (len(a) + len(b) - common) if a and b else 0.0)
        return keys + sum(k in p["parameters"] and p["parameters"][k] == g["parameters"][k] for k in a)

    best = max(
        sum(pair(g, got[j]) for g, j in zip(want, order, strict=False) if j < len(got))
        for order in itertools.permutations(range(max(len(got), len(want))), len(want))
    )
    assert optimal["s"] - optimal["name"] == pytest.approx(best)
    assert -3.0 <= ToolCallMatch().score(got, want) <= 3.0
    assert ToolCallMatch().score(want, want) == 3.0


@given(st.text(max_size=80))
@settings(max_examples=100, deadline=None)
def test_no_completion_raises(text: str) -> None:
    assert -3.0 <= ToolRLReward()([text], [CALLS]).total[0] <= 4.0


def real_outputs() -> list[str]:
    path = Path(__file__).parents[3] / "shared" / "data" / "tools" / "rlla_sft.json"
    if not path.is_file():
        pytest.skip("the tool-calling dialogues of ../shared are not here")
    return [row["output"].strip() for row in json.loads(path.read_text(encoding="utf-8"))]


def test_every_reference_of_the_real_dialogues_earns_the_most_that_it_can() -> None:
    outputs = real_outputs()
    calling = ["<tool_call>" in o.rsplit("</think>", 1)[-1] for o in outputs]
    assert len(outputs) == 400 and all(
        reference_calls(o)[1] is not None for o, c in zip(outputs, calling, strict=True) if c
    )
    most = [4.0 if c else 1.0 for c in calling]
    # Without their thoughts, 17 of which name a tag themselves: only the form of a few can be wrong.
    bare = [re.sub(r"<think>.*</think>", "<think> t </think>", o, flags=re.DOTALL) for o in outputs]
    batch = ToolRLReward()(bare, outputs)
    assert batch.parts["correctness"].tolist() == [m - 1 for m in most]
    assert batch.total.tolist() == most
    # As they are: a thought that names the tag is where the calls are looked for, and the answer is lost.
    batch = ToolRLReward()(outputs, outputs)
    named = [bool(re.search("</?(tool_call|response)>", o.rsplit("</think>", 1)[0])) for o in outputs]
    assert batch.total[[not n for n in named]].tolist() == [m for m, n in zip(most, named, strict=True) if not n]
    assert sum(named) == 17 and max(batch.total[named]) < 4.0


def test_damaged_answers_of_the_real_dialogues_cost_what_the_formula_says() -> None:
    wanted = [calls for o in real_outputs() if (calls := reference_calls(o)[1]) is not None]
    match = ToolCallMatch()
    for calls in wanted:
        s_max = 1 + sum(1 + len(c["parameters"]) for c in calls)
        first, *rest = calls
        renamed = [{**first, "name": "no such tool"}, *rest]
        assert match.explain(renamed, calls)["s_max"] == s_max
        assert match.score(renamed, calls) < 3.0
        if not rest:
            assert match.score(renamed, calls) == -3.0
            extra = [{**first, "parameters": {**first["parameters"], "no such key": 0}}]
            n = len(first["parameters"])
            keys = n / (n + 1)
            assert match.score(extra, calls) == pytest.approx(6 * (1 + keys + n) / s_max - 3)


def test_a_reference_is_read_behind_its_thought() -> None:
    thinking = CALLS.replace("<think>t", "<think>I need <tool_call> and <response>")
    assert reference_calls(thinking)[1] == G
    assert ToolRLReward()([CALLS, WORDS], [thinking] * 2).total.tolist() == [4.0, -3.0]
    # In an answer the first tag counts, as in the paper's code: the policy's own thought must not name it.
    assert ToolRLReward()([thinking], [CALLS]).total[0] == -3.0


def test_the_smooth_schedule_moves_towards_the_ranges_that_are_given() -> None:
    smooth = ScaleSchedule("smooth")
    assert smooth.ranges((0.0, 1.0), (-1.0, 1.0), 75) == ((-1.0, 1.5), (-1.5, 1.5))
    assert (
        smooth.ranges((0.0, 1.0), (-1.0, 1.0), 150)
        == ((-1.0, 1.0), (-1.0, 1.0))
        == smooth.ranges((0.0, 1.0), (-1.0, 1.0), 10**6)
    )
    assert toolrl(schedule="smooth").range == (-4.0, 4.0)
    assert toolrl(schedule="two_stage").range == (-3.0, 3.5)
    # Step 0, right calls in the wrong form: 2 for the calls, -2 for the form.
    assert toolrl(schedule="smooth")([CALLS + "!"], [CALLS]).total[0] == 0.0


@pytest.mark.parametrize(
    "piece",
    [
        "<tool_call>",
        "</tool_call>\n",
        "</think>\n<tool_call>",
        "<think>",
        '{"name": "f"}\n',
        "\x00",
        "\u202e\U0001f600",
    ],
)
def test_a_megabyte_costs_no_more_than_its_length(piece: str) -> None:
    text = "<think>" + piece * (1_000_000 // len(piece))
    began = time.process_time()
    total = ToolRLReward()([text, text + CALLS], [CALLS] * 2).total
    assert total[0] == -3.0 <= total[1] <= 4.0  # 4 where the megabyte is a long thought
    assert time.process_time() - began < 2.0


def test_json_that_is_odd() -> None:
    def one(line: str) -> str:
        return f"<think>t</think>\n<tool_call>\n{line}\n</tool_call>"

    assert parse_tool_calls(one('{"name": "f", "parameters": {"a": 1, "a": 2}}')) == [
        {"name": "f", "parameters": {"a": 2}}
    ]
    huge = parse_tool_calls(one('{"name": "f", "parameters": {"a": 1e999}}'))
    assert ToolCallMatch().score(huge, huge) == 3.0
    assert ToolCallMatch().score(parse_tool_calls(one('{"name": "f", "parameters": {"a": NaN}}')), G) < 0
    with pytest.raises(ToolParseError):
        parse_tool_calls(one('{"name": "f", "parameters": {"a": ' + "9" * 5000 + "}}"))
    for blank in ("\n\n", "  "):
        with pytest.raises(ToolParseError):
            parse_tool_calls(f"<tool_call>{blank}</tool_call>")
    with pytest.raises(DataError, match="text or a list of calls, got int"):
        reference_calls(3)
    with pytest.raises(DataError, match="objects with name and parameters"):
        reference_calls([{"name": "f"}])
