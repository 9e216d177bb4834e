"""The judge: prompts, parsing, batching, caching, retries, and what a failure is."""

import asyncio
import time

import numpy as np
import pytest

from guerdon.errors import ConfigError, RewardError
from guerdon.policies import tiny_policy
from guerdon.reward_models import (
    THINKING_RUBRIC,
    Judge,
    JudgeRewardModel,
    engine_generate,
    parse_unit_score,
    reasoning_of,
)
from guerdon.reward_models.judge import fill
from guerdon.rollout import TransformersEngine
from guerdon.types import StopReason, Task, Trajectory, Turn


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("<answer>0.7</answer>", 0.7),
        ("<answer> 1 </answer>", 1.0),
        ("<ANSWER>.3</ANSWER>", 0.3),
        ("<answer>1.5</answer>", 1.0),
        ("<answer>-2</answer>", 0.0),
        ("\\boxed{0.4} <answer>0.7</answer>", 0.4),
        ("\\boxed{7} <answer>0.7</answer>", 0.7),
        ("0.8", 0.8),
        ("I give it 0.8, not 1.0.", 0.8),
        ("The score is 1.", 1.0),
        ("0", 0.0),
        ("maybe .6", 0.6),
        ("10", None),
        ("8/10", None),
        ("0.5/1", None),
        ("80%", None),
        ("-1", None),
        ("a1", None),
        ("1,000", None),
        ("great", None),
        ("", None),
        ("nan", None),
        ("<answer>high</answer>", None),
    ],
)
def test_scores_are_read_in_the_published_order(reply, score):
    assert parse_unit_score(reply) == score


def test_the_strict_parser_wants_a_form():
    assert parse_unit_score("0.8", strict=True) is None
    assert parse_unit_score("<answer>0.8</answer>", strict=True) == 0.8


def test_parsing_is_fast_and_stays_in_the_unit_interval():
    start = time.perf_counter()
    for text in ("<answer>" * 100_000, "1." * 400_000, "\\boxed{" * 100_000, "0.1 " * 200_000, "9" * 1_000_000, " " * 1_000_000,
                 "<answer>" + "9" * 500_000 + "</answer>", "0." + "1" * 500_000):  # fmt: skip
        score = parse_unit_score(text)
        assert score is None or 0 <= score <= 1
    assert time.perf_counter() - start < 5


def test_the_judge_reads_the_reasoning():
    assert reasoning_of("<think>a</think><answer>b</answer>") == "a"
    assert reasoning_of("so a <answer>b</answer>, a") == "so a , a"
    assert reasoning_of("<think>a <answer>b</answer>") == "<think>a"
    assert reasoning_of("<answer>b</answer>") == ""


def test_fields_are_filled_in_one_pass():
    assert (
        fill('{question} {"a": 1} {response}', {"question": "{response}", "response": "x"}) == '{response} {"a": 1} x'
    )
    assert "{question}" in THINKING_RUBRIC and "{response}" in THINKING_RUBRIC


class Echo:
    """Replies with the number that stands behind 'rate' in the prompt."""

    def __init__(self):
        self.batches = []

    def __call__(self, prompts):
        self.batches.append(list(prompts))
        return [f"<answer>{p.split('rate ')[1].split()[0]}</answer>" for p in prompts]


PLAIN = "{question} | {response}"


def test_batches_cache_and_order():
    generate = Echo()
    model = JudgeRewardModel(generate, PLAIN, batch_size=2)
    out = model(["q"] * 5, ["rate 0.1", "rate 0.2", "rate 0.1", "rate 0.3", "rate 0.2"])
    np.testing.assert_allclose(out, [0.1, 0.2, 0.1, 0.3, 0.2])
    assert out.dtype == np.float64 and [len(b) for b in generate.batches] == [2, 1]
    np.testing.assert_allclose(model(["q", "other"], ["rate 0.3", "rate 0.3"]), [0.3, 0.3])
    assert sum(map(len, generate.batches)) == 4 and model.judge.counts["cached"] == 1
    assert model([], []).shape == (0,)
    uncached = JudgeRewardModel(Echo(), PLAIN, cache=0)
    for _ in range(2):
        uncached(["q"], ["rate 0.1"])
    assert uncached.judge.counts["calls"] == 2


def test_the_cache_is_bounded():
    generate = Echo()
    model = JudgeRewardModel(generate, PLAIN, cache=2)
    for text in ("rate 0.1", "rate 0.2", "rate 0.1", "rate 0.3", "rate 0.1", "rate 0.2"):
        model(["q"], [text])
    assert [b[0].split("rate ")[1] for b in generate.batches] == ["0.1", "0.2", "0.3", "0.2"]


def test_the_answer_is_not_shown_and_nobody_is_asked_about_nothing():
    generate = Echo()
    model = JudgeRewardModel(generate, PLAIN)
    out = model(["q", "q"], ["<think>rate 0.6</think><answer>secret</answer>", "<answer>only</answer>"])
    np.testing.assert_allclose(out, [0.6, 0.0])
    assert "secret" not in generate.batches[0][0] and len(generate.batches[0]) == 1
    assert not model.judge.failures


@pytest.mark.parametrize("kind", ["batched", "single", "async batched", "async single", "object"])
def test_any_kind_of_function(kind):
    async def batched(prompts):
        await asyncio.sleep(0)
        return Echo()(prompts)

    async def single(prompt):
        await asyncio.sleep(0)
        return Echo()([prompt])[0]

    class Object:
        async def __call__(self, prompts):
            return Echo()(prompts)

    generate, options = {
        "batched": (Echo(), {}),
        "single": (lambda prompt: Echo()([prompt])[0], {"batched": False}),
        "async batched": (batched, {}),
        "async single": (single, {"batched": False}),
        "object": (Object(), {}),
    }[kind]
    model = JudgeRewardModel(generate, PLAIN, **options)
    np.testing.assert_allclose(model(["q"] * 3, ["rate 0.1", "rate 0.2", "rate 0.3"]), [0.1, 0.2, 0.3])


def test_a_function_that_answers_a_list_with_one_text_is_taken_as_one_for_single_prompts():
    model = JudgeRewardModel(lambda prompt: "<answer>0.5</answer>", PLAIN)
    np.testing.assert_allclose(model(["q", "q"], ["a", "b"]), [0.5, 0.5])


def test_coroutines_run_at_once_up_to_a_limit():
    running, most = 0, 0

    async def generate(prompt):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return "0.5"

    model = JudgeRewardModel(generate, PLAIN, batched=False, concurrency=3)
    model(["q"] * 9, [str(k) for k in range(9)])
    assert most == 3


def test_failed_calls_are_tried_again():
    calls = []

    def generate(prompts):
        calls.append(len(prompts))
        if len(calls) < 3:
            raise ConnectionError("down")
        return ["0.4"] * len(prompts)

    model = JudgeRewardModel(generate, PLAIN, wait=0.0)
    np.testing.assert_allclose(model(["q"], ["a"]), [0.4])
    assert calls == [1, 1, 1] and model.judge.counts["retries"] == 2 and not model.judge.failures


async def hang(prompts):
    await asyncio.sleep(30)


def fail(prompts):
    raise ConnectionError("down")


@pytest.mark.parametrize(
    ("generate", "reason"),
    [
        (fail, "exception"),
        (hang, "timeout"),
        (lambda prompts: ["0.5"], "replies"),
        (lambda prompts: ["hm"] * len(prompts), "unreadable"),
        (lambda prompts: [None] * len(prompts), "unreadable"),
    ],
)
def test_what_fails_is_counted_and_never_silent(generate, reason):
    options = {"wait": 0.0, "retries": 1, "timeout": 0.05 if reason == "timeout" else None}
    model = JudgeRewardModel(generate, PLAIN, **options)
    np.testing.assert_allclose(model(["q", "q"], ["a", "b"]), [0.0, 0.0])
    assert model.judge.failures == {reason: 2}
    assert np.isnan(JudgeRewardModel(generate, PLAIN, missing=np.nan, **options)(["q", "r"], ["a", "b"])).all()
    rows = [Trajectory(Task("t", "q"), (Turn("policy", x),), StopReason.EOS) for x in ("a", "b")]
    with pytest.raises(RewardError, match="no verdict on task 't'"):
        JudgeRewardModel(generate, PLAIN, **options)(rows)
    assert not any(s.valid for s in JudgeRewardModel(generate, PLAIN, on_error="drop", **options)(rows))


def test_failures_are_not_remembered():
    replies = iter(["hm", "0.5"])
    model = JudgeRewardModel(lambda prompts: [next(replies) for _ in prompts], PLAIN)
    assert model(["q"], ["a"])[0] == 0.0 and model(["q"], ["a"])[0] == 0.5


def test_mistakes_of_the_set_up_are_raised():
    def generate(prompts):
        raise ConfigError("no key")

    with pytest.raises(ConfigError, match="no key"):
        JudgeRewardModel(generate, PLAIN)(["q"], ["a"])
    with pytest.raises(ConfigError, match="response"):
        JudgeRewardModel(Echo(), "rate {question}")
    with pytest.raises(ConfigError, match="'gold'"):
        JudgeRewardModel(Echo(), "{response} {gold}")(["q"], ["a"])
    with pytest.raises(ValueError, match="1 responses to 2"):
        JudgeRewardModel(Echo(), PLAIN)(["q", "q"], ["a"])
    for bad in ({"batch_size": 0}, {"retries": -1}, {"timeout": 0}, {"cache": -1}, {"concurrency": 0}):
        with pytest.raises(ConfigError):
            JudgeRewardModel(Echo(), PLAIN, **bad)
    with pytest.raises(ConfigError, match="generate"):
        JudgeRewardModel(None)


def test_on_trajectories():
    rows = [Trajectory(Task("t", "what?"), (Turn("policy", f"rate {x}"),), StopReason.EOS) for x in (0.2, 0.9)]
    generate = Echo()
    assert [s.value for s in JudgeRewardModel(generate, PLAIN)(rows)] == [0.2, 0.9]
    assert generate.batches[0][0].startswith("what? | rate")


def test_verdicts_of_any_kind_for_other_templates():
    judge = Judge(lambda prompts: ["first" if "short" in p else "??" for p in prompts], "{a} or {b}",
                  lambda reply: reply if reply in ("first", "second") else None)  # fmt: skip
    one, two = judge([{"a": "short", "b": "long"}, {"a": "x", "b": "y"}])
    assert one.value == "first" and one.error is None and one.reply == "first"
    assert two.value is None and "unreadable" in two.error and judge.failures["unreadable"] == 1
    assert judge([{"a": "short", "b": "long"}])[0].cached


async def test_inside_a_running_loop():
    model = JudgeRewardModel(Echo(), PLAIN)
    assert model(["q"], ["rate 0.5"])[0] == 0.5
    assert (await model.judge.ask([{"question": "q", "response": "rate 0.5"}]))[0].cached


def test_an_engine_as_the_judge():
    policy = tiny_policy(hidden=16, layers=1, heads=2)
    generate = engine_generate(TransformersEngine(policy, max_slots=4), system="be strict", max_tokens=3)
    judge = Judge(generate, "{x}", lambda reply: len(reply), batched=False)
    first = [v.reply for v in judge([{"x": "a"}, {"x": "b"}])]
    assert all(isinstance(r, str) for r in first)
    judge._cache.clear()
    assert [v.reply for v in judge([{"x": "a"}, {"x": "b"}])] == first
