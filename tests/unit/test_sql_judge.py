"""The judge of SQL and its deterministic stand-in: scores, scales, when it is asked, and what a failure counts as."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import ConfigError, RewardError
from guerdon.reward_models import SqlJudge, parse_sql_score
from guerdon.rewards import ClauseMatch, SQLExecutor, reasoning_sql
from guerdon.rewards.sql_clauses import clauses
from guerdon.types import StopReason, Task, Trajectory, Turn

pytest.importorskip("sqlglot", reason="SQL rewards need sqlglot")

SCHEMA = {"emp": ["id", "name", "dept_id"], "dept": ["id", "title"]}
GOLD = (
    "SELECT e.name FROM emp AS e JOIN dept d ON e.dept_id = d.id WHERE d.title = 'X' AND e.id > 3 ORDER BY e.id LIMIT 2"
)


@pytest.mark.parametrize(
    ("reply", "score"),
    [("<answer>7</answer>", 0.7), ("<answer>10</answer>", 1.0), ("<answer>0.35</answer>", 0.35), ("4", 0.4),
     ("<answer>12</answer>", 1.0), ("<answer>-1</answer>", 0.0), ("<answer>1.5</answer>", 1.0), ("1", 0.1),
     ("<answer>2</answer> no: <answer>8</answer>", 0.8), ("about 7 of 10", None), ("", None), ("7/10", None)],
)  # fmt: skip
def test_whole_numbers_are_on_the_scale_and_decimals_on_the_unit(reply: str, score: float | None) -> None:
    assert parse_sql_score(reply) == score


def test_another_scale() -> None:
    assert parse_sql_score("<answer>3</answer>", scale=4) == 0.75


def response(sql: str | None, **item: object) -> Trajectory:
    text = "no query" if sql is None else f"<reasoning>r</reasoning><answer>{sql}</answer>"
    reference = {"sql": GOLD, "schema": SCHEMA, "question": "who?", "hint": "X is a title"} | item
    return Trajectory(Task("t", "prompt", reference), (Turn("policy", text),), StopReason.DONE)


def test_the_judge_sees_question_schema_hint_gold_and_candidate() -> None:
    seen: list[str] = []

    def generate(prompts: list[str]) -> list[str]:
        seen.extend(prompts)
        return ["<answer>6</answer>"] * len(prompts)

    judge = SqlJudge(generate)
    assert [s.value for s in judge([response("SELECT 1"), response(None)])] == [0.6, 0.0]
    assert len(seen) == 1
    for piece in ("who?", "emp(id, name, dept_id)", "X is a title", GOLD, "SELECT 1"):
        assert piece in seen[0]


def test_a_failed_judgement_is_zero_and_counted_unless_told_otherwise() -> None:
    judge = SqlJudge(lambda prompts: ["what?"] * len(prompts))
    assert judge([response("SELECT 1")])[0].value == 0.0
    assert judge.failures["invalid"] == 1 and judge.judge.failures["unreadable"] == 1
    assert SqlJudge(lambda p: ["?"] * len(p), on_error=0.2)([response("SELECT 1")])[0].value == 0.2
    with pytest.raises(RewardError, match="no verdict"):
        SqlJudge(lambda p: ["?"] * len(p), on_error="raise")([response("SELECT 1")])
    with pytest.raises(ConfigError, match="scale"):
        SqlJudge(lambda p: p, scale=0)
    with pytest.raises(ConfigError, match="candidate"):
        SqlJudge(lambda p: p, "grade this")


@pytest.mark.skipif(sys.platform != "linux", reason="what the kernel enforces is Linux's")
def test_it_is_asked_only_where_execution_does_not_match() -> None:
    asked: list[str] = []

    def generate(prompts: list[str]) -> list[str]:
        asked.extend(prompts)
        return ["<answer>5</answer>"] * len(prompts)

    import sqlite3

    connection = sqlite3.connect(":memory:")
    connection.executescript("CREATE TABLE emp (id, name, dept_id); INSERT INTO emp VALUES (1, 'a', 1);")
    total = reasoning_sql(SQLExecutor(timeout=5), SqlJudge(generate))
    texts = [f"<reasoning>r</reasoning><answer>{q}</answer>" for q in ("SELECT name FROM emp", "SELECT id FROM emp")]
    texts += ["<reasoning>r</reasoning>", "<reasoning>r</reasoning><answer>SELECT nope FROM emp</answer>"]
    batch = total(texts, ["SELECT name FROM emp"] * 4, [connection] * 4, [SCHEMA] * 4)
    assert batch.parts["judge"].tolist() == [0.0, 0.5, 0.0, 0.5] and len(asked) == 2
    assert batch.parts["syntax"].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert batch.total[2] == 0.0 and batch.total[0] == 7.0 and max(batch.total[1:]) < 6


def test_clauses_are_compared_without_aliases_case_and_order_of_conditions() -> None:
    same = "select NAME from EMP, x JOIN dept ON dept.id = dept_id".replace(", x", "") + (
        " WHERE emp.id > 3 AND 'X' = title ORDER BY emp.id LIMIT 2"
    )
    assert clauses(same, SCHEMA) == clauses(GOLD, SCHEMA)
    match = ClauseMatch()
    # gold has select, from, where, order
    cases = {GOLD: 1.0, same: 1.0, "SELECT name FROM emp": 0.25, "SELECT name AS n FROM emp GROUP BY name": 0.2,
             same.replace("'X'", "'x'"): 0.75, same.replace("LIMIT 2", ""): 0.75, "": 0.0, "((": 0.0,
             "DELETE FROM emp": 0.0, "SELECT DISTINCT name FROM emp": 0.0}  # fmt: skip
    assert match(list(cases), [GOLD] * len(cases), [SCHEMA] * len(cases)).tolist() == pytest.approx(
        list(cases.values())
    )
    with pytest.raises(RewardError, match="no SELECT"):
        match(["SELECT 1"], ["DELETE FROM emp"], [SCHEMA])


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_no_candidate_raises(text: str) -> None:
    assert 0.0 <= ClauseMatch()([text], [GOLD], [SCHEMA])[0] <= 1.0
    score = parse_sql_score(text)
    assert score is None or 0.0 <= score <= 1.0
