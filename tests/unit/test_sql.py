"""Rewards of SQL queries: hand-computed values, the published weights, and what cannot be read or run."""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import ConfigError, DataError, RewardError
from guerdon.rewards import Reward
from guerdon.rewards.sql import ExecutionMatch, NgramOverlap, SchemaOverlap, SQLFormat, SQLSyntax
from guerdon.rewards.sql_base import extract_sql
from guerdon.rewards.sql_execution import SQLExecutor
from guerdon.rewards.sql_items import first_statement, has_order, jaccard, read_schema, schema_items, token_ngrams
from guerdon.rewards.sql_rows import same_rows
from guerdon.rewards.sql_total import OnlyIf, WeightedSum, reasoning_sql

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what the kernel enforces is Linux's")
pytest.importorskip("sqlglot", reason="SQL rewards need sqlglot")

SCHEMA = {"Emp": ["id", "name", "dept_id"], "dept": ["id", "title"]}


@pytest.fixture(scope="module")
def db() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    connection.executescript(
        "CREATE TABLE emp (id INTEGER, name TEXT, dept_id INTEGER); CREATE TABLE dept (id INTEGER, title TEXT);"
        "INSERT INTO emp VALUES (1, 'ann', 1), (2, 'bo', 1), (3, 'cy', 2), (3, 'cy', 2); INSERT INTO dept VALUES (1, 'x'), (2, 'y');"
    )
    return connection


@pytest.fixture(scope="module")
def executor() -> SQLExecutor:
    return SQLExecutor(timeout=5)


@pytest.mark.parametrize(
    ("query", "items"),
    [
        ("SELECT e.name FROM emp AS e JOIN dept d ON e.dept_id = d.id WHERE d.title = 'x'", "dept dept.id dept.title emp emp.dept_id emp.name"),
        ("select NAME from EMP", "emp emp.name"),
        ("SELECT * FROM dept", "dept dept.id dept.title"),
        ("SELECT d.* FROM emp e, dept d", "dept dept.id dept.title emp"),
        ("SELECT count(*) FROM emp", "emp"),
        ("WITH c AS (SELECT id FROM dept) SELECT c.id FROM c", "dept dept.id"),
        ("SELECT x.id FROM (SELECT id FROM emp) x", "emp emp.id"),
        ("SELECT name FROM emp WHERE dept_id IN (SELECT id FROM dept WHERE title = emp.name)", "dept dept.id dept.title emp emp.dept_id emp.name"),
        ("SELECT `name`, [id] FROM emp", "emp emp.id emp.name"),
        ('SELECT "name" FROM emp WHERE name = "ann"', "emp emp.name"),
        ("SELECT name AS n FROM emp ORDER BY n", "emp emp.name"),
        ("SELECT nope FROM emp", "?.nope emp"),
        ("SELECT id FROM emp UNION SELECT id FROM dept", "dept dept.id emp emp.id"),
        ("name emp ((", "emp emp.name"),
        ("SELECT title FROM emp JOIN dept USING (id)", "dept dept.id dept.title emp emp.id"),
        ("SELECT a.name FROM (emp a JOIN dept b ON a.dept_id = b.id)", "dept dept.id emp emp.dept_id emp.name"),
        ("SELECT x FROM (SELECT name AS x FROM emp)", "emp emp.name"),
        ("SELECT name FROM emp UNION SELECT title FROM dept ORDER BY name", "dept dept.title emp emp.name"),
        ("SELECT a.id FROM emp a, emp b WHERE a.id = b.id", "emp emp.id"),
        ("SELECT emp.name FROM main.emp WHERE name = 'dept'", "emp emp.name"),
        ("SELECT 1; SELECT name FROM emp", ""),
        ("SELECT 1", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_aliases_are_resolved_to_tables_and_columns(query: str, items: str) -> None:
    assert schema_items(query, SCHEMA) == frozenset(items.split())


def test_a_star_need_not_be_expanded_and_a_schema_may_be_ddl() -> None:
    assert schema_items("SELECT * FROM dept", SCHEMA, expand_star=False) == {"dept"}
    ddl = "CREATE TABLE dept (id INTEGER PRIMARY KEY, title TEXT); CREATE TABLE emp (id INT)"
    assert read_schema(ddl) == {"dept": ("id", "title"), "emp": ("id",)}
    with pytest.raises(DataError, match="no CREATE TABLE"):
        read_schema("SELECT 1")
    with pytest.raises(DataError, match="cannot parse"):
        schema_items("SELECT FROM WHERE (", SCHEMA, strict=True)


def test_a_scan_knows_quoted_names_of_many_words() -> None:
    schema = {"schools": ["Free Meal Count (K-12)", "città"]}
    for text in ("SELECT `Free Meal Count (K-12)` FROM schools WHERE ((", 'SELECT "free meal count (k-12)" FROM schools ((',
                 "SELECT [Free Meal Count (K-12)] FROM schools (("):  # fmt: skip
        assert schema_items(text, schema) == {"schools", "schools.free meal count (k-12)"}
    assert schema_items("città ((, schools", schema) == {"schools", "schools.città"}


def test_ngrams_are_sets_of_lower_case_tokens() -> None:
    assert token_ngrams("SELECT a FROM t") == {("select", "a"), ("a", "from"), ("from", "t")}
    assert token_ngrams("SELECT a, a, a", 2) == {("select", "a"), ("a", ","), (",", "a")}
    assert token_ngrams("SELECT") == frozenset()
    assert token_ngrams("select 'x", 2) == {("select", "'"), ("'", "x")}
    assert NgramOverlap()(["SELECT a FROM t", "", "SELECT b FROM t"], ["select a from t"] * 3).tolist() == [
        1.0,
        0.0,
        0.2,
    ]
    assert NgramOverlap(1)(["a b"], ["b c"])[0] == pytest.approx(1 / 3)
    # the end of a statement and what follows it are not part of it; white space in a keyword is not either
    assert NgramOverlap()(["SELECT a FROM t ;", "SELECT a FROM t; SELECT b"], ["SELECT a FROM t"] * 2).tolist() == [
        1,
        1,
    ]
    assert token_ngrams("a ORDER   BY b") == token_ngrams("A order by B")
    # one token has no bigram: like another such query, unlike any other
    assert NgramOverlap()(["x", "x", "x y"], ["y", "y z", "y"]).tolist() == [1.0, 0.0, 0.0]


def test_empty_sets_agree_and_one_empty_set_does_not() -> None:
    assert jaccard(frozenset(), frozenset()) == 1.0 and jaccard(frozenset("a"), frozenset()) == 0.0
    assert SchemaOverlap()(["SELECT 1"], ["SELECT 2"], [SCHEMA])[0] == 1.0
    assert SchemaOverlap()([""], ["SELECT 2"], [SCHEMA])[0] == 0.0
    assert SchemaOverlap()(["SELECT name FROM emp"], ["SELECT id FROM emp"], [SCHEMA])[0] == pytest.approx(1 / 3)


def test_only_the_first_statement_counts() -> None:
    assert first_statement("SELECT ';' ; DROP TABLE t") == "SELECT ';'"
    assert first_statement(" ; SELECT 1;") == "; SELECT 1" or first_statement(" ; SELECT 1;").endswith("SELECT 1")
    assert first_statement("SELECT 1 -- ; comment\n;").startswith("SELECT 1")
    assert has_order("SELECT a FROM t ORDER BY a") and not has_order("SELECT * FROM (SELECT a FROM t ORDER BY a)")


def test_rows_are_compared_as_sets_unless_order_counts() -> None:
    assert same_rows([(1, "a"), (2, "b"), (2, "b")], [(2, "b"), (1, "a")])
    assert not same_rows([(1, 2)], [(2, 1)])
    assert not same_rows([("1",)], [(1,)]) and same_rows([(1,)], [(1.0,)])
    assert not same_rows([(1,), (2,)], [(2,), (1,)], ordered=True)
    assert not same_rows([(0.1 + 0.2,)], [(0.3,)]) and same_rows([(0.1 + 0.2,)], [(0.3,)], tolerance=1e-9)
    assert same_rows([], []) and not same_rows([], [(None,)])
    # near numbers in another order, duplicates but for the tolerance, infinities, texts beside numbers
    near = [(0.1 + 1e-12, "b"), (0.1, "a"), (5, "c")]
    assert same_rows(near, [(0.1, "b"), (0.1 + 1e-12, "a"), (5.0, "c"), (5.0 + 1e-12, "c")], tolerance=1e-9)
    assert not same_rows(near, [(0.1, "a"), (5, "c")], tolerance=1e-9)
    assert same_rows([(float("inf"),)], [(float("inf"),)], tolerance=0.1)
    assert not same_rows([("1",)], [(1,)], tolerance=0.5) and not same_rows([(None,)], [(0,)], tolerance=0.5)
    assert same_rows([(1000.0, 1)], [(1009.0, 1)], tolerance=0.01) and not same_rows(
        [(1000,)], [(1011,)], tolerance=0.01
    )
    assert same_rows([(1,), (2,)], [(1,), (2.0,)], ordered=True) and not same_rows([(1,), (1,)], [(1,)], ordered=True)
    assert not same_rows([(1, 2)], [(1,)]) and same_rows([(b"x",)], [(b"x",)]) and not same_rows([(b"x",)], [("x",)])


def test_execution_match(db: sqlite3.Connection, executor: SQLExecutor) -> None:
    gold = "SELECT name FROM emp"
    candidates = [
        "SELECT DISTINCT name AS n FROM emp ORDER BY id DESC",
        "SELECT id FROM emp",
        "",
        "DELETE FROM emp",
        "SELECT name FROM emp; DROP TABLE emp",
    ]
    match = ExecutionMatch(executor)
    assert match(candidates, [gold] * 5, [db] * 5).tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert db.execute("SELECT count(*) FROM emp").fetchone() == (4,)
    ordered = "SELECT DISTINCT name FROM emp ORDER BY name"
    assert match(["SELECT DISTINCT name FROM emp ORDER BY name DESC"], [ordered], [db])[0] == 0.0
    assert (
        ExecutionMatch(executor, False)(["SELECT DISTINCT name FROM emp ORDER BY name DESC"], [ordered], [db])[0] == 1.0
    )


def test_an_empty_gold_result_is_marked_or_excluded(db: sqlite3.Connection, executor: SQLExecutor) -> None:
    gold = {"sql": "SELECT name FROM emp WHERE id > 99", "db": db}
    trivial = "<reasoning>r</reasoning><answer>SELECT 1 WHERE 0</answer>"
    kept = ExecutionMatch(executor).text(completion=trivial, reference=gold)
    assert kept.value == 1.0 and kept.parts["empty_gold"] == 1.0
    excluded = ExecutionMatch(executor, empty="exclude", on_error="drop").text(completion=trivial, reference=gold)
    assert not excluded.valid and "no row" in (excluded.reason or "")


def test_a_time_out_is_no_success(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (a)")
    connection.execute("INSERT INTO t VALUES (1)")
    connection.commit()
    connection.close()
    endless = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT count(*) FROM r"
    quick = SQLExecutor(timeout=1)
    score = ExecutionMatch(quick).text(
        completion=f"<answer>{endless}</answer>", reference={"sql": "SELECT a FROM t", "db": path}
    )
    assert score.value == 0.0 and score.parts["timeout"] == 1.0
    assert SQLSyntax(quick)([endless, "SELECT 1", "", "SELEC"], [path] * 4).tolist() == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<reasoning>r</reasoning><answer>SELECT 1</answer>", 1.0),
        ("  <reasoning>r</reasoning>\n\n<answer>SELECT 1</answer>\n", 1.0),
        ("<answer>SELECT 1</answer><reasoning>r</reasoning>", 0.0),
        ("<reasoning> </reasoning><answer>SELECT 1</answer>", 0.0),
        ("<reasoning>r</reasoning><answer></answer>", 0.0),
        ("<reasoning>r</reasoning> so <answer>SELECT 1</answer>", 0.0),
        ("<reasoning>r</reasoning><answer>SELECT 1</answer><answer>SELECT 2</answer>", 0.0),
        ("<reasoning>r<reasoning></reasoning><answer>SELECT 1</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_the_format_is_exactly_two_blocks(text: str, value: float) -> None:
    assert SQLFormat()([text])[0] == value


@pytest.mark.parametrize(
    "block",
    ["```sql\nSELECT 1\n```", "```sql SELECT 1```", "```\nSELECT 1\n```", "```SQL\nSELECT 1", "so: ```SELECT 1``` it is",
     "```python\nx\n```\n```sqlite\nSELECT 1\n```", "```sql\nSELECT 0\n```\n```sql\nSELECT 1\n```", "\n SELECT 1 \n"],
)  # fmt: skip
def test_a_fence_in_any_form_is_taken_off(block: str) -> None:
    assert extract_sql(f"<answer>SELECT 9</answer><answer>{block}</answer>") == "SELECT 1"


def test_the_candidate_is_the_last_answer_without_its_fence() -> None:
    assert extract_sql("<answer>``````</answer>") == "" and extract_sql("<answer>```</answer>") == ""
    assert extract_sql("<answer>a</answer><answer>\n```sql\nSELECT 1;\n```\n</answer>") == "SELECT 1;"
    assert extract_sql("SELECT 1") == "" and extract_sql("<answer> SELECT 1 </answer>") == "SELECT 1"


class Judge(Reward):
    range = (0.0, 1.0)

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def score_one(self, trajectory):
        self.asked.append(trajectory.task.id)
        return 0.5


def test_the_published_total(db: sqlite3.Connection, executor: SQLExecutor) -> None:
    judge = Judge()
    total = reasoning_sql(executor, judge)
    gold = "SELECT name FROM emp"
    texts = [
        f"<reasoning>r</reasoning><answer>{gold}</answer>",
        "<reasoning>r</reasoning><answer>SELECT id FROM emp</answer>",
        "SELECT name FROM emp",
    ]
    batch = total(texts, [gold] * 3, [db] * 3, [SCHEMA] * 3)
    # identical: 3 + 0 + 1 + 1 + 1 + 1; wrong: 2 * 0.5 + 1 + 1/3 + 1/5 + 1; without tags there is no query, and nobody is asked
    assert np.allclose(batch.total, [7.0, 1 + 1 + 1 / 3 + 1 / 5 + 1, 0.0])
    assert batch.parts["judge"].tolist() == [0.0, 0.5, 0.0]
    assert judge.asked == ["sql-1"]
    assert total.range == (0.0, 9.0)
    with pytest.raises(ConfigError, match=r"unknown term 'judge'.*give judge="):
        reasoning_sql(executor, weights={"judge": 1})


def test_mistakes_in_the_data_are_errors_and_never_zeros(db: sqlite3.Connection, executor: SQLExecutor) -> None:
    with pytest.raises(RewardError, match=r"gold query .* does not run"):
        ExecutionMatch(executor)(["SELECT 1"], ["SELECT nope FROM emp"], [db])
    with pytest.raises(RewardError, match="cannot parse"):
        SchemaOverlap()(["SELECT 1"], ["SELECT FROM WHERE ("], [SCHEMA])
    with pytest.raises(RewardError, match="under 'sql'"):
        NgramOverlap().text(completion="<answer>SELECT 1</answer>", reference="SELECT 1")
    with pytest.raises((RewardError, ConfigError), match="does not exist"):
        ExecutionMatch(executor)(["SELECT 1"], ["SELECT 1"], ["none.sqlite"])
    with pytest.raises(ConfigError, match="different lengths"):
        ExecutionMatch(executor)(["SELECT 1"], ["SELECT 1"], [db, db])
    for bad in (
        lambda: SQLExecutor(timeout=0),
        lambda: NgramOverlap(0),
        lambda: ExecutionMatch(executor, "no"),
        lambda: WeightedSum({}),
    ):  # type: ignore[arg-type]
        with pytest.raises(ConfigError):
            bad()


def test_a_condition_that_is_invalid_makes_the_term_invalid() -> None:
    class Never(Reward):
        def score_one(self, trajectory):
            return None

    only = OnlyIf(Judge(), when_zero=Never(on_error="drop"), on_error="drop")
    assert not only.text(completion="x").valid


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_no_candidate_raises(text: str) -> None:
    assert 0.0 <= SchemaOverlap()([text], ["SELECT name FROM emp"], [SCHEMA])[0] <= 1.0
    assert 0.0 <= NgramOverlap()([text], ["SELECT name FROM emp"])[0] <= 1.0


@pytest.mark.parametrize(
    "text", ["(" * 5000, "SELECT " + "a," * 20000 + "a", "'" * 1001, "\0", "SELECT '\udc80'", "/*" * 3000]
)
def test_hostile_candidates_are_read_in_time(text: str) -> None:
    assert 0.0 <= SchemaOverlap()([text], ["SELECT name FROM emp"], [SCHEMA])[0] <= 1.0
    assert 0.0 <= NgramOverlap()([text], ["SELECT name FROM emp"])[0] <= 1.0
