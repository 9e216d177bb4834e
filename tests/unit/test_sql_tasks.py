"""The text-to-SQL testbed: databases, questions, splits, scripts, and that its scripts earn the full reward."""

from __future__ import annotations

import sqlite3
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.environments.sql_questions import SHAPES, draw_question, in_own_words, slipped, with_one_slip
from guerdon.environments.sql_schemas import HELD_OUT, SCHEMAS, SqlDatabase, identifiers, practice_schema
from guerdon.environments.sql_tasks import SqlTestbed, scripted
from guerdon.errors import ConfigError
from guerdon.rewards import SQLExecutor, check_sql_tasks, reasoning_sql

sqlglot = pytest.importorskip("sqlglot", reason="SQL rewards need sqlglot")


@pytest.fixture(scope="module")
def bed() -> SqlTestbed:
    return SqlTestbed(databases=3)


@pytest.fixture(scope="module")
def policy(bed: SqlTestbed):
    from guerdon.policies import tiny_policy

    return tiny_policy(bed.tokenizer(), hidden=96, layers=2, heads=2, init="recall", max_context=128)


def test_identifiers_are_arbitrary_words() -> None:
    words = identifiers()
    concepts = {c for s in (*SCHEMAS, *HELD_OUT) for c in s.concepts}
    assert len(set(words)) == 60 and not set(words) & concepts
    for word in words:
        assert sqlglot.tokenize(word, dialect="sqlite")[0].token_type.name == "VAR", word


@pytest.mark.parametrize("schema", [*SCHEMAS, *HELD_OUT], ids=lambda s: s.name)
def test_a_database_is_real_and_two_fills_differ_in_rows_alone(schema) -> None:
    database = SqlDatabase.draw(schema, np.random.default_rng(0))
    tables = []
    for fill in (0, 1):
        connection = sqlite3.connect(":memory:")
        connection.deserialize(database.image(fill))
        named = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        assert {n for (n,) in named} == set(database.columns)
        rows = {}
        for table, columns in database.columns.items():
            info = connection.execute(f"PRAGMA table_info({table})").fetchall()
            assert [c[1] for c in info] == columns
            rows[table] = connection.execute(f"SELECT * FROM {table}").fetchall()
            assert 10 <= len(rows[table]) <= 40
        for table, link, other, key in schema.links():
            t, c, u, k = (database.names[x.concept] for x in (table, link, other, key))
            joined = connection.execute(f"SELECT count(*) FROM {t} JOIN {u} ON {c} = {k}").fetchone()[0]
            assert joined == len(rows[t])  # every link points somewhere
        tables.append(rows)
    assert tables[0] != tables[1] and 2 <= len(schema.tables) <= 4
    assert database.image(0) == SqlDatabase.draw(schema, np.random.default_rng(0)).image(0)


@given(st.integers(0, 10_000), st.sampled_from(SHAPES))
@settings(max_examples=80, deadline=None)
def test_every_gold_query_runs_and_its_draft_shows_where_names_come_from(seed: int, shape: str) -> None:
    rng = np.random.default_rng(seed)
    schema = practice_schema(rng) if seed % 2 else SCHEMAS[seed % len(SCHEMAS)]
    database = SqlDatabase.draw(schema, rng)
    question = draw_question(schema, rng, shape)
    connection = sqlite3.connect(":memory:")
    connection.deserialize(database.image())
    connection.execute(question.sql(database)).fetchall()
    back = {v: k for k, v in database.names.items()}
    draft = question.draft(database).split()
    for k, word in enumerate(draft):
        if word in back:
            assert draft[k - 1] == back[word]
    assert " ".join(w for w in draft if w not in schema.concepts) == question.sql(database)
    said = question.text.split()
    keys = {c.concept for t in schema.tables for c in t.of("key", "link")}
    assert {p.word for p in question.query if not isinstance(p, str)} - keys <= set(said)


@given(st.integers(0, 10_000), st.sampled_from(SHAPES))
@settings(max_examples=60, deadline=None)
def test_own_words_return_the_same_rows_and_one_slip_is_one(seed: int, shape: str) -> None:
    rng = np.random.default_rng(seed)
    schema = SCHEMAS[seed % len(SCHEMAS)]
    database = SqlDatabase.draw(schema, rng)
    question = draw_question(schema, rng, shape)
    own, wrong = in_own_words(question), with_one_slip(question, schema, rng)
    for fill in (0, 1):
        connection = sqlite3.connect(":memory:")
        connection.deserialize(database.image(fill))
        rows = [set(connection.execute(q.sql(database))) for q in (question, own)]
        assert rows[0] == rows[1]
    assert own.sql(database) != question.sql(database) and own.text == wrong.text == question.text
    assert sum(a != b for a, b in zip(question.query, wrong.query, strict=True)) == 1
    assert slipped(question, schema, rng, 0.0) == question
    words = {*schema.concepts}
    assert {p.word for p in slipped(question, schema, rng, 1.0).query if not isinstance(p, str)} <= words


def test_slips_come_at_the_stated_rates() -> None:
    rng = np.random.default_rng(0)
    n = 4000
    counts: Counter[str] = Counter()
    for _ in range(n):
        question = draw_question(SCHEMAS[0], rng, "number")
        query = slipped(question, SCHEMAS[0], rng, 0.4).query
        if "WHERE" not in query:
            counts["no filter"] += 1
            continue
        for k, name in ((1, "select"), (3, "table"), (5, "filter"), (6, "sign"), (7, "value")):
            counts[name] += query[k] != question.query[k]
    assert counts["no filter"] / n == pytest.approx(0.2, abs=0.02)
    for name, rate in (("select", 0.4), ("table", 0.4 / 3), ("filter", 0.4), ("sign", 0.4), ("value", 0.4 / 3)):
        assert counts[name] / (n - counts["no filter"]) == pytest.approx(rate, abs=0.03), name


def test_splits_share_no_database_and_unseen_no_schema(bed: SqlTestbed) -> None:
    splits = {name: bed.tasks(name, 60) for name in ("train", "test", "unseen")}
    images = {name: {t.reference["db"] for t in tasks} for name, tasks in splits.items()}
    assert not images["train"] & images["test"] and not images["train"] & images["unseen"]
    schemas = {name: {t.meta["schema"] for t in tasks} for name, tasks in splits.items()}
    assert schemas["train"] == schemas["test"] == {s.name for s in SCHEMAS}
    assert schemas["unseen"] == {s.name for s in HELD_OUT}
    assert [t.prompt for t in bed.tasks("train", 60)] == [t.prompt for t in splits["train"]]
    assert [t.prompt for t in bed.tasks("train", 60, seed=1)] != [t.prompt for t in splits["train"]]
    assert len({t.meta["shape"] for t in splits["train"]}) > 8
    # one name means another thing in another database: nothing but the schema tells
    meant = Counter()
    for task in bed.tasks("train", 60):
        text = task.prompt[0]["content"].split()
        for table, columns in task.reference["schema"].items():
            meant.update({(name, text[text.index(name) - 1]) for name in (table, *columns)})
    assert max(Counter(name for name, _ in meant).values()) >= 3


def test_gold_results_are_never_empty_and_filters_matter(bed: SqlTestbed) -> None:
    tasks = bed.tasks("train", 40)
    executor = SQLExecutor(timeout=5)
    assert not any(t.meta["empty_gold"] for t in check_sql_tasks(tasks, executor))
    for task in tasks:
        sql = task.reference["sql"]
        for fill in ("db", "fresh"):
            found = executor.gold(task.reference[fill], sql)
            assert found.rows
            if " WHERE " in sql:
                broad = executor.gold(task.reference[fill], sql.split(" WHERE ")[0])
                assert set(broad.rows) != set(found.rows)


@pytest.mark.skipif(sys.platform != "linux", reason="what the kernel enforces is Linux's")
def test_scripts_earn_the_full_reward_and_are_one_token_a_word(bed: SqlTestbed, policy) -> None:
    tasks = bed.tasks("unseen", 20)
    done = [scripted(policy, task) for task in tasks]
    scores = reasoning_sql(SQLExecutor(timeout=5))(done)
    assert [s.value for s in scores] == [7.0] * 20
    for one in done:
        assert policy.tokenizer.decode(one.turns[0].token_ids[:-1]) == one.turns[0].text
        words = one.turns[0].text.replace("><", "> <").replace("</", " </").split()
        assert len(one.turns[0].token_ids) == len(words) + 1
        assert len(one.prompt_ids) + len(one) <= 128
    bare = scripted(policy, tasks[0], "bare")
    assert "reasoning" not in bare.turns[0].text and len(bare) < len(done[0])
    assert len(bed.scripts(policy, 5, practice=1.0)) == 5
    guesses = bed.scripts(policy, 200, {"guess": 0.5, "right": 0.5})
    assert sum("<reasoning>" not in s.turns[0].text for s in guesses) == pytest.approx(100, abs=25)
    assert all(
        "DISTINCT" in s.turns[0].text or "LIMIT" in s.turns[0].text for s in bed.scripts(policy, 20, {"own words": 1})
    )
    broken = bed.scripts(policy, 100, {"broken": 1.0})
    assert sum("</answer>" not in s.turns[0].text for s in broken) == pytest.approx(50, abs=20)
    assert [s.turns[0].text for s in bed.scripts(policy, 5)] == [s.turns[0].text for s in bed.scripts(policy, 5)]


def test_the_natural_prompt_describes_the_schema() -> None:
    task = SqlTestbed("natural", databases=1).tasks("train", 1)[0]
    text = task.prompt[0]["content"]
    for table, columns in task.reference["schema"].items():
        assert f"CREATE TABLE {table} (" in text and all(f"  {c} " in text for c in columns)
    assert "for example" in text and "<answer>" in text and task.reference["question"] in text


def test_bad_settings_are_named() -> None:
    for bad, word in (({"register": "x"}, "register"), ({"databases": 0}, "databases"), ({"shapes": ("x",)}, "shapes"),
                      ({"shapes": ()}, "shapes")):  # fmt: skip
        with pytest.raises(ConfigError, match=word):
            SqlTestbed(**bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="split must be"):
        SqlTestbed().tasks("dev", 1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="shape must be"):
        draw_question(SCHEMAS[0], np.random.default_rng(0), "x")
    with pytest.raises(ConfigError, match="at least one script"):
        SqlTestbed().scripts(None, 0)
    for mix in ({"right": 0.5}, {"wrong": 1.0}, {"right": 1.5, "copy": -0.5}, {}):
        with pytest.raises(ConfigError, match="mix must give shares"):
            SqlTestbed().scripts(None, 1, mix)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="practice"):
        SqlTestbed().scripts(None, 1, practice=1.5)
