"""How SQL is run: many queries to a process, what is remembered, and databases that cannot be queried."""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import ConfigError, DataError, RewardError
from guerdon.rewards import ExecutionMatch, SQLExecutor, SQLSyntax, check_sql_tasks, reasoning_sql
from guerdon.rewards import sql_execution as module
from guerdon.rewards.sql_rows import same_rows
from guerdon.types import Task

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what the kernel enforces is Linux's")
pytest.importorskip("sqlglot", reason="SQL rewards need sqlglot")

ROWS = "CREATE TABLE t (a, b); INSERT INTO t VALUES (1, 'x'), (2.5, NULL), (3, x'00ff');"


def image(script: str = ROWS) -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.executescript(script)
    return connection.serialize()


@pytest.fixture(scope="module")
def executor() -> SQLExecutor:
    return SQLExecutor(timeout=2, max_rows=50)


ENDLESS = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT count(*) FROM r"
QUERIES = (
    "SELECT a, b FROM t",
    "SELECT nope FROM t",
    "",
    "DELETE FROM t",
    "INSERT INTO t VALUES (9, 9)",
    "ATTACH 'other.sqlite' AS o",
    "PRAGMA query_only = OFF",
    "SELECT load_extension('x')",
    "SELECT 1 FROM t a, t b, t c, t d",
    "SELECT zeroblob(900000000)",
    "SELECT 1; DROP TABLE t",
    "SELECT a FROM t WHERE b = '\ud800'",
    "SELECT 'it''s; fine' -- ; no\n",
    "WITH c AS (SELECT 1) DELETE FROM t",
)


def test_a_batch_gives_what_single_jobs_give(executor: SQLExecutor, tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    path.write_bytes(image())
    together = executor.run_many([(image(), q) for q in QUERIES])
    alone = [SQLExecutor(timeout=2, max_rows=50).run(path, q) for q in QUERIES]
    for query, a, b in zip(QUERIES, together, alone, strict=True):
        assert (a.ok, a.rows, a.columns) == (b.ok, b.rows, b.columns), query
    assert together[0].rows == ((1, "x"), (2.5, None), (3, b"\x00\xff")) and together[0].columns == ("a", "b")
    assert [r.ok for r in together].count(True) == 4


def test_one_query_that_never_ends_costs_the_others_nothing(executor: SQLExecutor) -> None:
    began = time.monotonic()
    found = executor.run_many([(image(), q) for q in ("SELECT 1", ENDLESS, "SELECT 2", ENDLESS, "SELECT 3")])
    assert [r.ok for r in found] == [True, False, True, False, True] and found[1].timeout
    assert time.monotonic() - began < 15
    # every reward sees the same result, and nobody waits for it again
    began = time.monotonic()
    assert SQLSyntax(executor)([ENDLESS], [image()]).tolist() == [0.0] and time.monotonic() - began < 1


def test_each_query_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = []

    class Counting:
        def run(self, job):
            jobs.append(job)
            return real.run(job)

        def map(self, some):
            return [self.run(job) for job in some]

    real = module.default_sandbox()
    monkeypatch.setattr(module, "default_sandbox", Counting)
    total = reasoning_sql(SQLExecutor(timeout=5))
    texts = [f"<reasoning>r</reasoning><answer>SELECT a + {k % 3} FROM t</answer>" for k in range(30)]
    golds = ["SELECT 1 + a FROM t", "SELECT a + 3 FROM t"] * 15
    batch = total(texts, golds, [image()] * 30, [{"t": ["a", "b"]}] * 30)
    assert batch.parts["execution"].sum() == 5
    assert len(jobs) == 1
    total(texts, golds, [image()] * 30, [{"t": ["a", "b"]}] * 30)
    assert len(jobs) == 1


def test_changed_content_is_another_database(executor: SQLExecutor, tmp_path: Path) -> None:
    connection = sqlite3.connect(":memory:")
    connection.executescript(ROWS)
    assert executor.run(connection, "SELECT count(*) FROM t").rows == ((3,),)
    connection.execute("DELETE FROM t WHERE a = 1")
    connection.commit()
    assert executor.run(connection, "SELECT count(*) FROM t").rows == ((2,),)
    path = tmp_path / "t.sqlite"
    path.write_bytes(image())
    assert executor.run(path, "SELECT count(*) FROM t").rows == ((3,),)
    path.write_bytes(image("CREATE TABLE t (a);"))
    os.utime(path, (1, 1))
    assert executor.run(path, "SELECT count(*) FROM t").rows == ((0,),)


def test_large_images_are_written_to_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IMAGE", 100)
    assert SQLExecutor(timeout=5).run(image(), "SELECT a FROM t").rows == ((1,), (2.5,), (3,))


def test_a_locked_or_broken_database_is_no_silent_zero(executor: SQLExecutor, tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    path.write_bytes(image())
    holder = sqlite3.connect(path)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(RewardError, match="locked"):
        SQLSyntax(executor)(["SELECT a FROM t"], [path])
    holder.close()
    assert SQLSyntax(executor)(["SELECT a FROM t"], [path]).tolist() == [1.0]
    path.write_bytes(b"this is no database " * 100)
    for broken in (path, b"this is no database " * 100):
        with pytest.raises(RewardError, match="not a database"):
            SQLSyntax(executor)(["SELECT a FROM t"], [broken])
    assert SQLSyntax(executor, on_error="drop").text(
        completion="<answer>SELECT 1</answer>", reference={"sql": "x", "db": path}
    ).valid is False  # fmt: skip
    with pytest.raises(ConfigError, match="does not exist"):
        executor.run(tmp_path / "none.sqlite", "SELECT 1")
    with pytest.raises(DataError, match="got int"):
        executor.run(3, "SELECT 1")  # type: ignore[arg-type]
    # a column with such a name does not pass for a fault of the database
    assert SQLSyntax(executor)(["SELECT database is locked FROM t"], [image()]).tolist() == [0.0]


def test_one_bad_item_does_not_spoil_its_batch(executor: SQLExecutor) -> None:
    total = reasoning_sql(executor, on_error="drop")
    texts = ["<reasoning>r</reasoning><answer>SELECT a FROM t</answer>"] * 3
    batch = total(
        texts, ["SELECT a FROM t", "SELECT nope FROM t", "SELECT a FROM t"], [image()] * 3, [{"t": ["a"]}] * 3
    )
    assert batch.total[[0, 2]].tolist() == [7.0, 7.0] and batch.total[1] != batch.total[1]
    assert total.failure_counts()["ExecutionMatch", "exception"] == 1


def test_tasks_are_checked_before_training(executor: SQLExecutor) -> None:
    def task(name: str, sql: str) -> Task:
        return Task(name, "q", {"sql": sql, "db": image(), "schema": {"t": ["a", "b"]}})

    good, none = task("good", "SELECT a FROM t"), task("none", "SELECT a FROM t WHERE a > 9")
    assert [t.meta["empty_gold"] for t in check_sql_tasks([good, none], executor)] == [False, True]
    assert [t.id for t in check_sql_tasks([good, none], executor, empty="exclude")] == ["good"]
    bad = [task("b1", "SELECT FROM WHERE ("), task("b2", "SELECT nope FROM t"), Task("b3", "q", "SELECT 1"), none]
    with pytest.raises(DataError, match=r"4 of 5 tasks cannot be used: b1: cannot parse .* b2: .* b3: .*and 1 more"):
        check_sql_tasks([good, *bad], executor, empty="raise")
    with pytest.raises(ConfigError, match="empty must be"):
        check_sql_tasks([good], executor, empty="drop")  # type: ignore[arg-type]


def test_an_executor_is_set_up_rightly() -> None:
    for wrong in ({"timeout": 0}, {"timeout": float("nan")}, {"timeout": "1"}, {"max_rows": 0}, {"cache": 0}):
        with pytest.raises(ConfigError):
            SQLExecutor(**wrong)  # type: ignore[arg-type]
    small = SQLExecutor(timeout=5, cache=1)
    assert [r.rows for r in small.run_many([(image(), "SELECT 1"), (image(), "SELECT 2")])] == [((1,),), ((2,),)]


CELL = st.one_of(st.none(), st.integers(-3, 3), st.floats(-3, 3, width=16), st.sampled_from(["", "1", "a"]))


@given(st.lists(st.tuples(CELL, CELL), max_size=6), st.lists(st.tuples(CELL, CELL), max_size=6), st.randoms())
@settings(deadline=None)
def test_order_and_duplicates_never_matter_to_sets(a: list, b: list, rng) -> None:
    shuffled = rng.sample(a + a, 2 * len(a))
    assert same_rows(a, shuffled) and same_rows(shuffled, a, tolerance=1e-6)
    assert same_rows(a, b) == same_rows(b, a) == (set(a) == set(b))
    assert same_rows(a, b, tolerance=1e-6) == same_rows(b, a, tolerance=1e-6)
    if same_rows(a, b):
        assert same_rows(a, b, tolerance=1e-6)
    if same_rows(a, b, ordered=True):
        assert same_rows(a, b)


@given(st.sampled_from(QUERIES), st.sampled_from(QUERIES))
@settings(max_examples=20, deadline=None)
def test_execution_match_is_symmetric_where_both_run(one: str, two: str) -> None:
    shared = _shared()
    if shared.run(image(), one).ok and shared.run(image(), two).ok:
        match = ExecutionMatch(shared, False)
        assert match([one], [two], [image()])[0] == match([two], [one], [image()])[0]
        assert match([one], [one], [image()])[0] == 1.0


def _shared(kept: list[SQLExecutor] = []) -> SQLExecutor:  # noqa: B006  one executor for all examples
    if not kept:
        kept.append(SQLExecutor(timeout=2, max_rows=50))
    return kept[0]
