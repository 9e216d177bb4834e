"""Every registered reward with every bad input: a defined score, an invalid one with a reason, or one clear error."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from guerdon.errors import GuerdonError, UnknownName
from guerdon.parts import REWARDS
from guerdon.report.reward_examples import Example, examples
from guerdon.report.reward_page import _BEGIN, _END, tables
from guerdon.rewards import Reward
from guerdon.training.job import make_reward

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="code and SQL run in a sandbox whose limits are Linux's"
)
for package in (
    "sqlglot",
    "math_verify",
    "pint",
    "sacrebleu",
    "py3langid",
    "jsonschema",
    "wordfreq",
    "better_profanity",
):
    pytest.importorskip(package, reason=f"the catalogue needs {package}")

ROOT = Path(__file__).parents[2]
NAMES = [name for name in REWARDS if REWARDS.path(name).startswith("guerdon.")]

TEXTS: dict[str, str] = {
    "blank": " \n\t ",
    "unbalanced": "<think>a</answer><answer>b<answer></think>c",
    "nested": "<answer><answer>Lima</answer></answer><think><think></think>",
    "unclosed": "<answer>" * 50 + "Lima",
    "replaced bytes": b"\xff\xfe<answer>\xc3\x28</answer>".decode("utf-8", "replace"),
    "escaped bytes": b"\xff\xfe<answer>\xc3\x28</answer>".decode("utf-8", "surrogateescape"),
    "lone surrogates": "<answer>\ud800 \udfff</answer> \ud83d",
    "NUL": "<answer>Li\0ma</answer>\0",
    "emoji": "<answer>👩‍👩‍👧‍👦🇵🇪</answer>",
    "right to left": "<answer>\u202e\u0644\u064a\u0645\u0627</answer> \u200f\u2067\u05e9\u05dc\u05d5\u05dd\u2069",
    "huge number": "<answer>1e999</answer>",
    "minus infinity": r"<answer>-Infinity</answer> \boxed{-\infty}",
    "not a number": r"<answer>NaN</answer> \boxed{nan}",
    "thousands": "<answer>1,234,567.89</answer>",
    "locale comma": "<answer>1.234.567,89</answer>",
    "date": "<answer>2024-02-30</answer>",
    "digits": "<answer>" + "9" * 5000 + "</answer>",
    "power tower": r"<answer>9^{9^{9^{9}}}</answer>",
    "repeated keys": '<answer>{"city": "Lima", "city": "Oslo"}</answer>',
    "deep JSON": "<answer>" + "[" * 3000 + "]" * 3000 + "</answer>",
    "deep braces": r"\boxed{" * 500 + "1" + "}" * 500,
    "other SQL": "<reasoning>x</reasoning><answer>SELECT TOP 1 [name] FROM city CROSS APPLY x.nodes(1); GO</answer>",
    "hostile SQL": "<answer>ATTACH 'x' AS y; PRAGMA writable_schema=1; WITH RECURSIVE c AS (SELECT 1 UNION ALL SELECT 1 FROM c) "
    "SELECT * FROM c</answer>",
    "template": "{response} {question} %s ${x} {{}} \\1 \\g<0>",
    "control": "".join(map(chr, range(32))) + "\x7f\x85\u2028\u2029",
}
LONG: dict[str, str] = {
    "1 MB of words": "the capital of Peru is Lima. " * 36_000,
    "1 MB of tags and braces": "<answer>x</answer><think>{[(" * 36_000,
}
REFERENCES: dict[str, Any] = {
    "none": None, "blank": "  ", "empty list": [], "empty object": {}, "list of none": [None], "list of blank": [""],
    "list of objects": [{"a": 1}], "true": True, "number": 3.5, "huge integer": 10**400, "infinity": math.inf,
    "not a number": math.nan, "bytes": b"Lima", "object": object(), "function": len, "set": {1, 2}, "nested": [[["Lima"]]],
    "huge number as text": "1e999", "not a number as text": "NaN", "surrogate": "\ud800", "repeated keys": '{"a": 1, "a": 2}',
    "missing database": {"sql": "SELECT 1", "db": "/nowhere/at/all.sqlite", "schema": {}},
    "database of a wrong type": {"sql": "SELECT 1", "db": 7}, "gold in another dialect": {"sql": "SELECT TOP 1 x", "db": 7},
    "boxes without area": [5, 5, 5, 5], "tests without answers": [{"input": "x"}], "schema of a wrong type": {"type": "nothing"},
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Example]:
    return examples(tmp_path_factory.mktemp("examples"))


_REWARDS: dict[str, Reward] = {}


def reward_of(name: str, example: Example) -> Reward:
    if name not in _REWARDS:
        settings = dict(example.settings)
        if name == "math_equality":
            settings["seconds"] = 0.3
        _REWARDS[name] = make_reward({"name": name, **settings})
    return _REWARDS[name]


def check(reward: Reward, example: Example, what: str, **changes: Any) -> None:
    try:
        scores, fatal = reward.assess([example.trajectory(**changes)])
    except GuerdonError as error:
        assert str(error).strip() and "\n" not in str(error).strip(), f"{what}: the error is one line: {error}"
        return
    assert len(scores) == 1
    score = scores[0]
    if score.valid:
        low, high = reward.range
        assert math.isfinite(score.value) and low - 1e-9 <= score.value <= high + 1e-9, (what, score, reward.range)
    else:
        assert score.reason and fatal == [True], (what, score)
        # What failed is said by an error made for it, not by whatever broke first.
        assert not any(f"raised {kind}" in score.reason for kind in _ACCIDENTS), f"{what}: {score.reason}"


_ACCIDENTS = (
    "TypeError", "AttributeError", "KeyError", "IndexError", "RecursionError", "UnicodeEncodeError", "UnicodeDecodeError",
    "AssertionError", "OverflowError", "ZeroDivisionError", "MemoryError", "ValueError", "RuntimeError", "error",
)  # fmt: skip


def test_every_reward_has_an_example_and_likes_it(made: dict[str, Example]) -> None:
    assert set(NAMES) == set(made)
    for name in NAMES:
        score = reward_of(name, made[name])([made[name].trajectory()])[0]
        low, high = reward_of(name, made[name]).range
        assert low <= score.value <= high, name


@pytest.mark.parametrize("name", NAMES)
def test_bad_completions(name: str, made: dict[str, Example]) -> None:
    for what, text in TEXTS.items():
        check(reward_of(name, made[name]), made[name], f"{name}, {what}", completion=text)


@pytest.mark.parametrize("name", NAMES)
def test_bad_references(name: str, made: dict[str, Example]) -> None:
    for what, reference in REFERENCES.items():
        check(reward_of(name, made[name]), made[name], f"{name}, {what}", reference=reference)


@pytest.mark.parametrize("name", NAMES)
def test_long_completions_take_no_time(name: str, made: dict[str, Example]) -> None:
    for what, text in LONG.items():
        began = time.perf_counter()
        check(reward_of(name, made[name]), made[name], f"{name}, {what}", completion=text)
        seconds = time.perf_counter() - began
        assert seconds < 20, f"{name}, {what}: {seconds:.1f} s"


def test_a_locked_database_is_a_failure_and_the_next_call_works(made: dict[str, Example]) -> None:
    import sqlite3

    example = made["sql_execution"]
    reward = reward_of("sql_execution", example)
    connection = sqlite3.connect(example.reference["db"], isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        check(reward, example, "locked")
    finally:
        connection.execute("ROLLBACK")
        connection.close()
    assert reward([example.trajectory()])[0].value == 1.0


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean exact_match"):
        make_reward("exact_mach")
    with pytest.raises(GuerdonError, match="did you mean rel_tol"):
        make_reward({"name": "quantity", "reltol": 0.1})


def test_the_page_shows_what_the_code_does() -> None:
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    shown = page.partition(_BEGIN)[2].partition(_END)[0].strip()
    assert shown == tables().strip(), "run: python -m guerdon.report.reward_page docs/rewards.md"


def test_scores_are_plain_json(made: dict[str, Example]) -> None:
    for name in NAMES:
        score = reward_of(name, made[name])([made[name].trajectory()])[0]
        json.dumps({"value": score.value, "parts": dict(score.parts)}, allow_nan=False)
