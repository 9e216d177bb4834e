"""Rewards that users expect beside the methods: each by hand, at its limits, and against the package that it stands on."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import guerdon as gd
from guerdon.errors import ConfigError, DataError, GuerdonError, RewardError
from guerdon.rewards import to_trajectory
from guerdon.rewards.citations import Citations, read_statements
from guerdon.rewards.grammar import blocks, boxed, fenced, fences, json_lines, last_block
from guerdon.rewards.killable import Failed, KillablePool, Killed
from guerdon.rewards.pass_at_k import PassAtK, pass_at_k
from guerdon.rewards.pattern import RegexMatch
from guerdon.rewards.structured import JSONSchema, read_json


def said(text: str, reference: Any = None, *, prompt: str = "q", task: str = "t", **meta: Any) -> gd.Trajectory:
    return to_trajectory(prompt, text, reference, task_id=task, meta=meta)


def value(reward: Any, text: str, reference: Any = None, **more: Any) -> float:
    return reward([said(text, reference, **more)])[0].value


# Processes that can be killed ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sleeper() -> Any:
    pool = KillablePool("time:sleep", workers=2)
    yield pool
    pool.close()


def test_a_call_is_killed_and_the_next_one_works(sleeper: KillablePool) -> None:
    assert sleeper.call([0], 5.0) is None
    began = time.perf_counter()
    with pytest.raises(Killed, match=r"within 0\.2 s"):
        sleeper.call([60], 0.2)
    assert time.perf_counter() - began < 5 and sleeper.kills == 1
    assert sleeper.call([0], 5.0) is None
    with pytest.raises(Failed, match="ValueError"):
        sleeper.call([-1], 5.0)


def test_calls_come_from_any_thread_in_order(sleeper: KillablePool) -> None:
    found: list[Any] = []

    def work() -> None:
        found.append(sleeper.map([[0], [60], [-1], [0]], 0.5))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert len(found) == 3
    for row in found:
        assert [type(x) for x in row] == [type(None), Killed, Failed, type(None)]


def test_a_worker_or_its_mother_that_was_killed_from_outside_is_replaced() -> None:
    pool = KillablePool("os:getpid", workers=1)
    try:
        first = pool.call([], 5.0)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(Killed, match="died"):
            pool.call([], 5.0)
        assert pool.call([], 5.0) != first
        assert pool._mother is not None
        os.killpg(pool._mother._process.pid, signal.SIGKILL)
        with pytest.raises(Killed):
            pool.call([], 5.0)
        assert isinstance(pool.call([], 5.0), int)
    finally:
        pool.close()
    with pytest.raises(RewardError, match="cannot be used"):
        KillablePool("os:nothing_of_this_name", workers=1).call([], 5.0)
    with pytest.raises(ConfigError):
        KillablePool("os:getpid", workers=0)


# Mathematics ---------------------------------------------------------------------------------------------------------


def maths(**more: Any) -> Any:
    pytest.importorskip("math_verify", reason="mathematical equality needs math-verify")
    from guerdon.rewards.mathematics import MathEquality

    return MathEquality(**more)


def test_mathematics_agrees_with_math_verify() -> None:
    reward = maths()
    cases = [
        (r"\boxed{\frac{1}{2}}", "0.5", 1), (r"\boxed{x+1}", "1+x", 1), (r"\boxed{2x}", "3x", 0), (r"<answer>(x+1)^2</answer>", "x^2+2x+1", 1),
        (r"\boxed{\{2,1\}}", r"\{1,2\}", 1), (r"\boxed{7}", 7, 1), (r"\boxed{8}", ["7", "8"], 1), (r"\boxed{007}", "7", 1),
        (r"\boxed{10000000000000001}", "10000000000000002", 0), ("7", "7", 0), ("", "7", 0),
    ]  # fmt: skip
    scores = reward([said(text, gold) for text, gold, _ in cases])
    assert [s.value for s in scores] == [want for _, _, want in cases]
    assert scores[-1].parts["extracted"] == 0.0


def test_endless_mathematics_is_killed_counted_and_harmless_in_threads() -> None:
    reward = maths(seconds=0.5)
    out: list[Any] = []
    thread = threading.Thread(
        target=lambda: out.extend(reward([said(r"\boxed{9^{9^{9^{9}}}}", "x+1"), said(r"\boxed{1+x}", "x+1")]))
    )
    began = time.perf_counter()
    thread.start()
    thread.join(60)
    assert time.perf_counter() - began < 30
    assert [s.value for s in out] == [0.0, 1.0] and out[0].parts["timed_out"] == 1.0
    assert reward.failures["comparison timed out"] == 1
    with pytest.raises(RewardError, match="cannot be read as mathematics"):
        reward([said(r"\boxed{x}", "$")])


# Amounts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("1.5 km", "1500 m", 1), ("36 km/h", "10 m/s", 1), ("68 °F", "20 degC", 1), ("50%", "0.5", 1), ("50%", "50", 1), ("7 apples", "7", 1),
        ("7 apple", "7 apples", 1), ("7 pears", "7 apples", 0), ("7", "7 apples", 0), ("$12", "12 dollars", 1), ("€12", "$12", 0), ("5 kg", "5 m", 0),
        ("1,234.5 g", "1.2345 kg", 1), ("1.234,5 g", "1.2345 kg", 1), ("3,5", "3.5", 1), ("3 x 10^8 m/s", "3e8 m/s", 1), ("3/4 cup", "0.75 cup", 1),
        ("1e999", "5", 0), ("NaN", "5", 0), ("2024-01-02", "2024", 0), ("12 of 20", "12", 0), ("5 m^2", "50000 cm^2", 1), ("−4", -4, 1),
        (r"$12\text{ m}$", "12 m", 1), ("7", ["6", "7"], 1),
    ],
)  # fmt: skip
def test_amounts_convert(answer: str, gold: Any, right: float) -> None:
    pytest.importorskip("pint", reason="units need pint")
    from guerdon.rewards.quantity import Quantity

    assert Quantity()([answer], [gold])[0] == right


def test_tolerances_of_amounts() -> None:
    pytest.importorskip("pint", reason="units need pint")
    from guerdon.rewards.quantity import Quantity

    assert Quantity(rel_tol=0.05)(["1.04 km", "1.06 km"], ["1000 m"] * 2).tolist() == [1, 0]
    assert Quantity(abs_tol=1.0)(["0.5", "1.5"], [0, 0]).tolist() == [1, 0]
    assert Quantity(bare=True)(["7"], ["7 apples"])[0] == 1
    for bad in (None, "", "many", "1e999", float("nan"), True, [], {"a": 1}):
        with pytest.raises(RewardError, match="gold"):
            Quantity()(["1"], [[bad] if bad != [] else []])
    with pytest.raises(ConfigError, match="rel_tol"):
        Quantity(rel_tol=-1)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789.,-+eE/ kmgs^{}$%°()x*'", max_size=30))
def test_reading_an_amount_never_fails(text: str) -> None:
    from guerdon.rewards.quantity import read_amount

    found = read_amount(text)
    assert found is None or np.isfinite(found.value)


# Shape and form ------------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object", "required": ["name", "tags"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "pattern": "^[a-z]+$"}, "tags": {"type": "array", "uniqueItems": True}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "score", "json"),
    [
        ('{"name": "a", "tags": [1, true, "1"]}', 1, 1), ('{"name": "a", "tags": [1, 1.0]}', 0, 1), ('{"name": "A", "tags": []}', 0, 1), ('{"name": "a"}', 0, 1),
        ('{"name": "a", "name": "b", "tags": []}', 0, 0), ('{"name": "a", "tags": [NaN]}', 0, 0), ('{"name": "a", "tags": [1e999]}', 0, 0), ("", 0, 0),
        ("[" * 100_000, 0, 0), ('{"name": "a", "tags": ' + "[" * 80 + "]" * 80 + "}", 0, 0), ("9" * 10_000, 0, 0), ('{"name": "a\u2028", "tags": []}', 0, 1),
    ],
)  # fmt: skip
def test_json_schema(answer: str, score: float, json: float) -> None:
    pytest.importorskip("jsonschema", reason="JSON schemas need jsonschema")
    made = JSONSchema(SCHEMA)([said(f"<answer>{answer}</answer>")])[0]
    assert (made.value, made.parts["json"]) == (score, json)


def test_where_json_is_read() -> None:
    pytest.importorskip("jsonschema", reason="JSON schemas need jsonschema")
    fence = 'here:\n```json\n{"a": 1}\n```\nbye'
    assert value(JSONSchema({"required": ["a"]}), fence) == 1.0
    assert value(JSONSchema({"required": ["a"]}, where="answer"), fence) == 0.0
    assert value(JSONSchema({"required": ["a"]}, where="response"), '{"a": 1}') == 1.0
    assert value(JSONSchema(), "<answer>3</answer>", '{"type": "integer"}') == 1.0
    with pytest.raises(ConfigError, match="no JSON Schema"):
        JSONSchema({"type": "nothing"})
    with pytest.raises(RewardError, match="refers to"):
        value(JSONSchema({"$ref": "http://example.com/x.json"}), "1")
    with pytest.raises(RewardError, match="without end"):
        value(JSONSchema({"$ref": "#"}), "1")
    slow = JSONSchema({"type": "string", "pattern": r"^(\w+\s?)*\1x$"})
    began = time.perf_counter()
    assert value(slow, '"' + "word " * 500 + '!"') == 0.0 and time.perf_counter() - began < 5
    assert read_json("{}") == ({}, None) and read_json("{")[1] is not None


def test_patterns_end_in_time() -> None:
    assert value(RegexMatch(r"\d+", tag="answer"), "1 <answer>x</answer>") == 0.0
    assert value(RegexMatch(r"lima", ignore_case=True, mode="fullmatch"), "LIMA") == 1.0
    assert value(RegexMatch("b", mode="match"), "ab") == 0.0 and value(RegexMatch("a.b"), "a\nb") == 1.0
    slow = RegexMatch(r"^(a|a|aa)*\1\1$", seconds=0.2)
    made = slow([said("a" * 3000 + "b")])[0]
    assert made.value == 0.0 and made.parts["timed_out"] == 1.0 and slow.failures["pattern timed out"] == 1
    with pytest.raises(ConfigError, match="regular expression"):
        RegexMatch("(")
    with pytest.raises(ConfigError, match="mode"):
        RegexMatch("a", mode="find")  # type: ignore[arg-type]


# Language and tone ---------------------------------------------------------------------------------------------------


def test_language_and_script() -> None:
    pytest.importorskip("py3langid", reason="languages are told by py3langid")
    from guerdon.rewards.language import LanguageMatch, ScriptShare

    english = "The weather was cold this morning, so everybody stayed at home and read a book."
    german = "Das Wetter war heute Morgen kalt, deshalb blieben alle zu Hause und lasen ein Buch."
    assert value(LanguageMatch("en"), english) == 1.0 and value(LanguageMatch("de"), english) == 0.0
    assert value(LanguageMatch("prompt"), german, prompt=german) == 1.0
    assert value(LanguageMatch(), german, language="de") == 1.0
    assert 0.9 < value(LanguageMatch("de", among=["de", "en"], probability=True), german) <= 1.0
    assert LanguageMatch("en")([said("123 !")])[0].parts["letters"] == 0.0
    for bad in ({"language": "xx"}, {"language": "en", "among": ["de", "fr"]}):
        with pytest.raises(ConfigError):
            LanguageMatch(**bad)
    with pytest.raises(RewardError, match="ISO"):
        value(LanguageMatch(), english)
    assert value(ScriptShare("Latin"), "abc 123 ДЖ") == pytest.approx(3 / 5)
    assert value(ScriptShare(["Han", "Hiragana"]), "漢字かなx") == pytest.approx(4 / 5)
    assert value(ScriptShare(None), "абв", script="Cyrillic") == 1.0 and value(ScriptShare(), "123") == 0.0
    for bad_script in ("Elvish", "Latin}|.", "", []):
        with pytest.raises(ConfigError):
            ScriptShare(bad_script)  # type: ignore[arg-type]


def test_sentiment_and_toxicity() -> None:
    vader = pytest.importorskip("vaderSentiment.vaderSentiment", reason="sentiment needs vaderSentiment")
    pytest.importorskip("better_profanity", reason="the list of words is better-profanity's")
    from guerdon.rewards.tone import Sentiment, Toxicity, bad_words

    compound = vader.SentimentIntensityAnalyzer().polarity_scores
    expected = (compound("I love this!")["compound"] + compound("It is awful.")["compound"]) / 2
    assert value(Sentiment(), "I love this! It is awful.") == pytest.approx(expected)
    assert value(Sentiment(), " \n ") == 0.0
    began = time.perf_counter()
    value(Sentiment(), "good but bad " * 20_000)
    assert time.perf_counter() - began < 20
    assert value(Toxicity(), "a kind word") == 0.0 and value(Toxicity(), "what a dumb@$$") == -1.0
    assert value(Toxicity(most=4, words=["darn", "so what"]), "Darn, so what? 1234") == -0.5
    assert bad_words("b1tch, 5000 $ and class") == ["b1tch"]
    assert value(Toxicity(classify=lambda texts: [0.25] * len(texts)), "x") == -0.25
    with pytest.raises(RewardError, match="probabilities"):
        value(Toxicity(classify=lambda texts: [7.0]), "x")
    with pytest.raises(ConfigError):
        Toxicity(most=0)


# Text beside a reference ---------------------------------------------------------------------------------------------


def test_overlap_is_that_of_the_packages() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="BLEU and chrF need sacrebleu")
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="the values are rouge-score's")
    from guerdon.rewards.text_overlap import Bleu, ChrF, Rouge

    text, references = "the cat sat on the mat today", ["the cat sat down on a mat", "a dog ran"]
    assert value(Bleu(), text, references) == pytest.approx(sacrebleu.sentence_bleu(text, references).score / 100)
    assert value(ChrF(2), text, references) == pytest.approx(
        sacrebleu.sentence_chrf(text, references, word_order=2).score / 100
    )
    kinds = scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    best = max(np.mean([s.fmeasure for s in kinds.score(r, text).values()]) for r in references)
    assert value(Rouge(), text, references) == pytest.approx(best)
    assert value(Bleu(), " ", references) == 0.0 and value(Bleu(), references[0], references) == pytest.approx(1.0)
    for bad in (None, "", [], [""], 3, {"a": "b"}):
        with pytest.raises(RewardError, match="reference text"):
            value(Rouge(), text, bad)
    with pytest.raises(ConfigError):
        Rouge(["0"])


def test_citations_by_hand() -> None:
    sources = ["The river Nile flows north through Egypt.", "Paris is the capital of France and has bridges."]
    text = "The Nile flows through Egypt [1]. Paris is the capital of France. [2] [3] It has 37 bridges [1, 2]. Hm!"
    assert read_statements(text) == [
        ("The Nile flows through Egypt .", ("1",)), ("Paris is the capital of France.", ("2", "3")), ("It has 37 bridges .", ("1", "2")), ("Hm!", ()),
    ]  # fmt: skip
    made = Citations(threshold=0.6)([said(text, sources)])[0]
    # 37 is in no source, so half of the third statement's words are there; "Hm!" cites nothing.
    assert made.parts["recall"] == pytest.approx(2 / 4) and made.parts["precision"] == pytest.approx(2 / 5)
    assert made.parts["unknown"] == 1.0 and made.value == pytest.approx(2 * 0.5 * 0.4 / 0.9)
    assert value(Citations(), "", sources) == 0.0
    assert value(Citations(lambda statement, passage: "Nile" in passage), "So [1].", None, sources=sources) == 1.0
    assert value(Citations(), "The Nile flows [7].", {"7": sources[0]}) == 1.0
    for bad in (None, [], "text", [""], [3]):
        with pytest.raises(RewardError, match="needs sources"):
            value(Citations(), text, bad)


# pass@k --------------------------------------------------------------------------------------------------------------


def test_pass_at_k_by_counting() -> None:
    from itertools import combinations
    from math import comb

    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                hit = sum(any(i < c for i in chosen) for chosen in combinations(range(n), k))
                assert pass_at_k(n, c, k) == pytest.approx(hit / comb(n, k))
    assert pass_at_k([4, 100_000], [0, 99_999], 2).tolist() == [0.0, 1.0]
    for bad in ((1, 1, 2), (3, 4, 1), (3, -1, 1), (2.5, 1, 1)):
        with pytest.raises(DataError):
            pass_at_k(*bad)
    with pytest.raises(ConfigError):
        pass_at_k(3, 1, 0)


def test_pass_at_k_of_a_batch() -> None:
    reward = PassAtK(gd.rewards.ExactMatch(), 2)
    batch = [
        said(f"<answer>{a}</answer>", "x", task=t)
        for a, t in (("x", "a"), ("y", "b"), ("y", "a"), ("y", "b"), ("y", "a"))
    ]
    assert [s.value for s in reward(batch)] == pytest.approx([2 / 3, 0, 2 / 3, 0, 2 / 3])
    with pytest.raises(RewardError, match="at least 2 samples"):
        reward(batch[:1])
    dropped = PassAtK(gd.rewards.ExactMatch(on_error="drop"), 1, on_error="drop")
    scores = dropped(
        [said("<answer>x</answer>", "x", task="a"), said("<answer>x</answer>", [], task="a"), said("x", "x", task="b")]
    )
    assert [s.valid for s in scores] == [False, False, True]


# Rewards with a model, by plain settings -----------------------------------------------------------------------------


def test_a_judge_from_settings() -> None:
    from guerdon.training.job import make_reward

    asked: list[str] = []

    def generate(prompt: str) -> str:
        asked.append(prompt)
        return "<answer>0.7</answer>"

    judge = make_reward({"name": "judge", "generate": generate})
    assert value(judge, "<think>secret</think>Lima", prompt="Capital?") == 0.7
    assert "Capital?" in asked[0] and "secret" in asked[0]
    broken = make_reward({"name": "judge", "generate": lambda prompt: "no idea", "on_error": "drop"})
    assert not broken([said("x")])[0].valid
    for bad in (
        {},
        {"model": "m"},
        {"model": "m", "base_url": "u", "generate": generate},
        {"generate": generate, "read": "all"},
    ):
        with pytest.raises(GuerdonError):
            make_reward({"name": "judge", **bad})


# What the fuzzing of the grammar found -------------------------------------------------------------------------------


def test_lines_end_at_newlines_only() -> None:
    code = 'x = "\u2028\x0c\x85"\n\ny = 1'
    assert fenced(f"```python\r\n{code}\r\n```\r\n") == [code]
    assert fences("a\n~~~ SQL x\nb\n```\n~~~\n```\nc\n") == [("sql", "b\n```"), ("", "c")]
    assert fences("```\n```") == [("", "")] and fences("```\n\n```") == [("", "")] and fences("```") == [("", "")]
    assert [v for _, v, _ in json_lines('["\u2028"]\r\n["\x85"]\n\n3')] == [["\u2028"], ["\x85"], 3]


def test_a_number_of_thousands_of_digits_is_no_json() -> None:
    ((_, found, error),) = json_lines("9" * 5000)
    assert found is None and error is not None and "ValueError" in error


def test_a_doubled_backslash_escapes_nothing() -> None:
    assert boxed(r"\boxed{a \\{b}}") == r"a \\{b}" and boxed(r"\boxed{\{1\}}") == r"\{1\}"
    assert boxed(r"\\boxed{5}") == "5" and boxed(r"\\\boxed{5}") == "5"


TAGGED = st.lists(st.sampled_from(["<a>", "</a>", "<b>", "</b>", "x", "<", "\n", "<ab>"]), max_size=30).map("".join)


@settings(max_examples=300, deadline=None)
@given(TAGGED)
def test_blocks_are_those_of_the_regular_expression(text: str) -> None:
    import re

    wanted = [(m[1], m[2]) for m in re.finditer(r"<(a|b|ab)>(.*?)</\1>", text, re.DOTALL)]
    assert [(b.tag, b.content) for b in blocks(text, ["a", "b", "ab"])] == wanted
    only = [c for t, c in ((m[1], m[2]) for m in re.finditer(r"<(a)>(.*?)</\1>", text, re.DOTALL))]
    assert last_block(text, "a") == (only[-1].strip() if only else None)
