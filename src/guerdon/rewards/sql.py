"""Text-to-SQL: execution match and the partial rewards beside it.

Queries run in :mod:`guerdon.sandbox`, on read-only connections with limits on time, memory and rows. A task's reference
holds ``{"sql": gold, "db": path, "schema": ..., "question": ...}``; the candidate is read from the response's last answer
block. Each reward is also callable on plain lists, as the method's description writes it.

Source: Pourreza et al. 2025, "Reasoning-SQL" (arXiv 2503.23157). What it leaves open is chosen here: bigrams for the
n-gram reward, the tags ``reasoning`` and ``answer``, no bonus of partial rewards where execution is right.
"""

from __future__ import annotations

import hashlib
import math
import os
import sqlite3
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from guerdon.errors import ConfigError, DataError
from guerdon.rewards.base import OnError, Reward
from guerdon.rewards.grammar import blocks, fenced, last_block, tag_counts
from guerdon.rewards.plain import RewardBatch, TextReward
from guerdon.rewards.sql_items import first_statement, has_order, jaccard, schema_items, token_ngrams
from guerdon.sandbox import Limits, Status, run_sql
from guerdon.types import Score, StopReason, Task, Trajectory, Turn, policy_text

__all__ = [
    "ExecutionMatch",
    "NgramOverlap",
    "OnlyIf",
    "SQLExecutor",
    "SQLFormat",
    "SQLSyntax",
    "SchemaOverlap",
    "SqlResult",
    "WeightedSum",
    "extract_sql",
    "reasoning_sql",
    "same_rows",
]

_RECENT = 256

Database = str | os.PathLike[str] | sqlite3.Connection


def extract_sql(text: str, tag: str = "answer") -> str:
    """The SQL of a response: its last ``<answer>`` block, without a fence; empty where there is none."""
    block = last_block(text, tag)
    if block is None:
        return ""
    if "```" in block:
        found = fenced(block, "sql") or fenced(block, "sqlite") or fenced(block)
        return found[-1].strip() if found else ""
    return block.strip()


@dataclass(frozen=True, slots=True)
class SqlResult:
    """Rows of a query, or one line that says why there are none; ``timeout`` where a limit ended it."""

    rows: tuple[tuple[Any, ...], ...] = ()
    columns: tuple[str, ...] = ()
    error: str | None = None
    timeout: bool = False

    @property
    def ok(self) -> bool:
        """Whether it ran."""
        return self.error is None


class SQLExecutor:
    """Runs single read-only statements against SQLite databases.

    Args:
        timeout: seconds of one query.
        max_rows: a query with more rows is an error.
        memory_mb: of one query.
        cache: how many results of gold queries are kept.

    A database is a file's path, or an ``sqlite3`` connection (of an in-memory database, say), of which a copy is made
    on first use. Of several statements only the first is run; writing statements are errors.
    """

    def __init__(
        self, timeout: float = 30.0, max_rows: int = 100_000, *, memory_mb: int = 512, cache: int = 10_000
    ) -> None:
        if not 0 < timeout < math.inf:
            raise ConfigError(f"timeout must be a positive number of seconds, got {timeout}")
        if max_rows < 1:
            raise ConfigError(f"max_rows must be at least 1, got {max_rows}")
        self.timeout, self.max_rows = float(timeout), max_rows
        self._limits = Limits(cpu_s=math.ceil(timeout), wall_s=timeout, memory_mb=memory_mb, output_bytes=1 << 26)
        self._cache: OrderedDict[tuple[str, str], SqlResult] = OrderedDict()
        self._recent: OrderedDict[tuple[str, str], SqlResult] = OrderedDict()
        self._keep = cache
        self._lock = threading.Lock()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, db: Database, sql: str) -> SqlResult:
        """Run the first statement of ``sql``.

        Raises:
            ConfigError: the database does not exist.
        """
        statement = first_statement(sql)
        if not statement:
            return SqlResult(error="the query is empty")
        path = self._path(db)
        key = (self._version(path), statement)
        with self._lock:
            # Several rewards ask about one candidate, one right after the other.
            if key in self._recent:
                return self._recent[key]
        done = run_sql(statement, path, max_rows=self.max_rows, limits=self._limits)
        if not done.ok or not done.values:
            stopped = done.status in (Status.TIMEOUT, Status.CPU)
            found = SqlResult(error=done.error or "the query gave no rows", timeout=stopped)
        else:
            columns, rows = done.values[0][1]
            found = SqlResult(tuple(tuple(r) for r in rows), tuple(columns))
        with self._lock:
            self._recent[key] = found
            while len(self._recent) > _RECENT:
                self._recent.popitem(last=False)
        return found

    def gold(self, db: Database, sql: str) -> SqlResult:
        """:meth:`run`, remembered per database (its path and time of change) and query.

        Raises:
            DataError: the query does not run: a gold query that fails is a mistake in the data.
        """
        path = self._path(db)
        key = (self._version(path), sql)
        with self._lock:
            found = self._cache.get(key)
        if found is None:
            found = self.run(path, sql)
            if not found.ok:
                raise DataError(f"the gold query {sql[:80]!r} does not run on {Path(path).name}: {found.error}")
            with self._lock:
                self._cache[key] = found
                while len(self._cache) > self._keep:
                    self._cache.popitem(last=False)
        return found

    @staticmethod
    def _version(path: str) -> str:
        try:
            return f"{path}:{os.stat(path).st_mtime_ns}"
        except OSError:
            return path

    def _path(self, db: Database) -> str:
        if not isinstance(db, sqlite3.Connection):
            return os.fspath(db)
        with self._lock:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="guerdon-sql-")
            data = db.serialize()
            name = f"{hashlib.sha256(data).hexdigest()[:24]}.sqlite"
            path = Path(self._folder.name) / name
            if not path.exists():
                path.write_bytes(data)
            return str(path)


def same_rows(
    got: Sequence[Sequence[Any]], expected: Sequence[Sequence[Any]], *, ordered: bool = False, tolerance: float = 0.0
) -> bool:
    """Whether two results agree: as sets of rows, or as lists where ``ordered``.

    The order of columns counts, their names do not; 1 equals 1.0 and never ``"1"``. With a ``tolerance`` numbers may
    differ by so much, relatively or absolutely.
    """
    a, b = [tuple(r) for r in got], [tuple(r) for r in expected]
    if not ordered:
        a, b = list(dict.fromkeys(a)), list(dict.fromkeys(b))
        if not tolerance:
            return set(a) == set(b)
        a, b = sorted(a, key=_rank), sorted(b, key=_rank)
    return len(a) == len(b) and all(
        len(x) == len(y) and all(_same(u, v, tolerance) for u, v in zip(x, y, strict=True))
        for x, y in zip(a, b, strict=True)
    )


def _rank(row: tuple[Any, ...]) -> list[tuple[int, Any]]:
    def one(v: Any) -> tuple[int, Any]:
        if v is None:
            return 0, 0
        if isinstance(v, int | float):
            return 1, v
        return (2, v) if isinstance(v, str) else (3, bytes(v))

    return [one(v) for v in row]


def _same(a: Any, b: Any, tolerance: float) -> bool:
    if a == b:
        return type(a) is type(b) or isinstance(a, int | float)
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return bool(tolerance) and numbers and math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)


class _SqlReward(Reward):
    """A reward of a candidate query. A subclass overrides :meth:`score_sql`."""

    range = (0.0, 1.0)
    tag = "answer"

    def score_sql(self, sql: str, item: Mapping[str, Any]) -> Score | float:
        """Score one candidate; ``item`` is the task's reference (``sql``, ``db``, ``schema``)."""
        raise TypeError(f"{type(self).__name__} must override score_sql")

    def score_one(self, trajectory: Trajectory) -> Any:
        return self.score_sql(extract_sql(policy_text(trajectory), self.tag), read_item(trajectory.task))

    def _plain(self, sqls: Sequence[str], items: Sequence[Mapping[str, Any]]) -> np.ndarray:
        tasks = [Task(f"sql-{k}", "", item) for k, item in enumerate(items)]
        trajectories = [
            Trajectory(task, (Turn("policy", f"<{self.tag}>{sql}</{self.tag}>"),), StopReason.DONE, info={"sql": sql})
            for task, sql in zip(tasks, sqls, strict=True)
        ]
        return np.array([s.value for s in Reward.__call__(_Bare(self), trajectories)], dtype=np.float64)


class _Bare(Reward):
    """Hands plain SQL to a reward as it is, and counts failures where the reward counts them."""

    def __init__(self, inner: _SqlReward) -> None:
        super().__init__(name=inner.name, on_error=inner.on_error)
        self.failures = inner.failures
        self._inner = inner

    def score_one(self, trajectory: Trajectory) -> Any:
        return self._inner.score_sql(str(trajectory.info["sql"]), read_item(trajectory.task))


def read_item(task: Task) -> Mapping[str, Any]:
    """The reference of a text-to-SQL task.

    Raises:
        DataError: it is no mapping, or has no gold query.
    """
    item = task.reference
    if not isinstance(item, Mapping) or not isinstance(item.get("sql"), str) or not item["sql"].strip():
        raise DataError(f"task {task.id!r}: the reference of a SQL reward is a mapping with the gold query under 'sql'")
    return item


def _database(item: Mapping[str, Any]) -> Database:
    if item.get("db") is None:
        raise DataError("the reference has no database; give its path under 'db'")
    return item["db"]


def _rows_of(**columns: Sequence[Any] | None) -> list[dict[str, Any]]:
    given = {k: list(v) for k, v in columns.items() if v is not None}
    lengths = {k: len(v) for k, v in given.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError("lists of different lengths: " + ", ".join(f"{k} {n}" for k, n in lengths.items()))
    n = next(iter(lengths.values()), 0)
    return [{k: v[i] for k, v in given.items()} for i in range(n)]


class ExecutionMatch(_SqlReward):
    """1 where the candidate returns what the gold query returns, else 0; an error or a time-out is 0.

    Args:
        executor: runs both; gold results are remembered.
        ordered: ``"auto"`` (and ``True``) compares lists where the gold query has an ORDER BY of its own, else sets of
            rows; ``False`` always compares sets, as BIRD's evaluation does.
        tolerance: for numbers; 0 is exact.
        empty: what to do where the gold result is empty, which rewards trivial queries: ``"keep"`` (the part
            ``empty_gold`` marks it) or ``"exclude"`` (an invalid score, left out by trainers that drop).

    ``match(trajectories)``, or ``match(sqls, golds, dbs)`` for ``[B]`` float64.
    """

    def __init__(
        self,
        executor: SQLExecutor | None = None,
        ordered: Literal["auto"] | bool = "auto",
        *,
        tolerance: float = 0.0,
        empty: Literal["keep", "exclude"] = "keep",
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if ordered not in ("auto", True, False):
            raise ConfigError(f"ordered must be 'auto', True or False, got {ordered!r}")
        if empty not in ("keep", "exclude"):
            raise ConfigError(f"empty must be 'keep' or 'exclude', got {empty!r}")
        if not 0 <= tolerance < math.inf:
            raise ConfigError(f"tolerance must be finite and >= 0, got {tolerance!r}")
        self.executor = executor or SQLExecutor()
        self.ordered, self.tolerance, self.empty = ordered, float(tolerance), empty

    def score_sql(self, sql: str, item: Mapping[str, Any]) -> Score:
        db = _database(item)
        gold = self.executor.gold(db, item["sql"])
        if not gold.rows and self.empty == "exclude":
            return Score.invalid("the gold query returns no row (empty='exclude')")
        parts = {"empty_gold": float(not gold.rows), "error": 0.0, "timeout": 0.0}
        if not sql.strip():
            return Score(0.0, parts=parts | {"error": 1.0})
        got = self.executor.run(db, sql)
        if not got.ok:
            return Score(0.0, parts=parts | {"error": 1.0, "timeout": float(got.timeout)})
        ordered = bool(self.ordered) and has_order(item["sql"])
        return Score(float(same_rows(got.rows, gold.rows, ordered=ordered, tolerance=self.tolerance)), parts=parts)

    def __call__(self, trajectories: Any, golds: Any = None, dbs: Any = None, *, progress: Any = None) -> Any:
        """See the class."""
        if golds is None:
            return super().__call__(trajectories, progress=progress)
        return self._plain(trajectories, _rows_of(sql=golds, db=dbs))


class SQLSyntax(_SqlReward):
    """1 where the candidate runs without an error, whatever it returns; ``syntax(sqls, dbs)`` on plain lists."""

    def __init__(
        self, executor: SQLExecutor | None = None, *, name: str | None = None, on_error: OnError = "raise"
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        self.executor = executor or SQLExecutor()

    def score_sql(self, sql: str, item: Mapping[str, Any]) -> float:
        return float(bool(sql.strip()) and self.executor.run(_database(item), sql).ok)

    def __call__(self, trajectories: Any, dbs: Any = None, *, progress: Any = None) -> Any:
        """See the class."""
        if dbs is None:
            return super().__call__(trajectories, progress=progress)
        return self._plain(trajectories, [{"sql": "-", **row} for row in _rows_of(db=dbs)])


class SchemaOverlap(_SqlReward):
    """Jaccard index of the tables and columns that candidate and gold use; see :func:`~guerdon.rewards.sql_items.schema_items`.

    Args:
        dialect: of the queries.
        expand_star: read ``SELECT *`` as all columns of its tables.

    An empty candidate gives 0. ``overlap(sqls, golds, schemas)`` on plain lists, a schema being a mapping of tables to
    columns or CREATE TABLE text.
    """

    def __init__(
        self, dialect: str = "sqlite", *, expand_star: bool = True, name: str | None = None, on_error: OnError = "raise"
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        self.dialect, self.expand_star = dialect, expand_star

    def score_sql(self, sql: str, item: Mapping[str, Any]) -> float:
        options: dict[str, Any] = {"dialect": self.dialect, "expand_star": self.expand_star}
        gold = schema_items(item["sql"], item.get("schema"), strict=True, **options)
        if not sql.strip():
            return 0.0
        return jaccard(schema_items(sql, item.get("schema"), **options), gold)

    def __call__(self, trajectories: Any, golds: Any = None, schemas: Any = None, *, progress: Any = None) -> Any:
        """See the class."""
        if golds is None:
            return super().__call__(trajectories, progress=progress)
        return self._plain(trajectories, _rows_of(sql=golds, schema=schemas))


class NgramOverlap(_SqlReward):
    """Jaccard index of the sets of token n-grams of candidate and gold; an empty candidate gives 0.

    Args:
        n: tokens of an n-gram.
        tokenizer: ``"sqlglot"`` or ``"words"``.

    ``overlap(sqls, golds)`` on plain lists.
    """

    def __init__(
        self,
        n: int = 2,
        tokenizer: str = "sqlglot",
        *,
        dialect: str = "sqlite",
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if n < 1:
            raise ConfigError(f"n must be at least 1, got {n}")
        if tokenizer not in ("sqlglot", "words"):
            raise ConfigError(f"tokenizer must be 'sqlglot' or 'words', got {tokenizer!r}")
        self.n, self.tokenizer, self.dialect = n, tokenizer, dialect

    def score_sql(self, sql: str, item: Mapping[str, Any]) -> float:
        if not sql.strip():
            return 0.0
        options: dict[str, Any] = {"tokenizer": self.tokenizer, "dialect": self.dialect}
        return jaccard(token_ngrams(sql, self.n, **options), token_ngrams(item["sql"], self.n, **options))

    def __call__(self, trajectories: Any, golds: Any = None, *, progress: Any = None) -> Any:
        """See the class."""
        if golds is None:
            return super().__call__(trajectories, progress=progress)
        return self._plain(trajectories, _rows_of(sql=golds))


class SQLFormat(TextReward):
    """1 where the response is exactly one reasoning block and then one answer block, neither blank, else 0.

    Args:
        reasoning, answer: the tags.
    """

    range = (0.0, 1.0)

    def __init__(
        self,
        reasoning: str = "reasoning",
        answer: str = "answer",
        *,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        self.tags = (reasoning, answer)

    def score_text(self, text: str) -> float:
        found = blocks(text, self.tags)
        if [b.tag for b in found] != list(self.tags) or not all(b.content.strip() for b in found):
            return 0.0
        if any(counts != (1, 1) for counts in tag_counts(text, self.tags).values()):
            return 0.0
        first, second = found
        around = text[: first.start], text[first.stop : second.start], text[second.stop :]
        return float(not any(piece.strip() for piece in around))


class OnlyIf(Reward):
    """A reward that is asked for only where another one is 0, and is 0 elsewhere.

    Args:
        reward: for example a judge; it is called with those trajectories alone. Give it ``on_error=0.0`` where a
            failed judgement should count as 0 (its ``failures`` count it).
        when_zero: the condition.
    """

    def __init__(
        self, reward: Reward, when_zero: Reward, *, name: str | None = None, on_error: OnError = "raise"
    ) -> None:
        super().__init__(name=name or reward.name, on_error=on_error)
        self.reward, self.when_zero = reward, when_zero
        self.range = (min(0.0, reward.range[0]), max(0.0, reward.range[1]))

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Ask for the condition first."""
        conditions = self.when_zero(trajectories)
        wanted = [k for k, c in enumerate(conditions) if c.valid and c.value == 0]
        asked = iter(self.reward([trajectories[k] for k in wanted]) if wanted else [])
        chosen = set(wanted)
        return [
            next(asked)
            if k in chosen
            else Score(0.0)
            if c.valid
            else Score.invalid(c.reason or "the condition is invalid")
            for k, c in enumerate(conditions)
        ]


class WeightedSum(Reward):
    """A weighted sum of named rewards.

    Args:
        terms: name to ``(reward, weight)``.

    Every term's value is a part. ``total(trajectories)``, or ``total(texts, golds, dbs, schemas)`` on plain lists of whole
    responses for a :class:`~guerdon.rewards.RewardBatch`.
    """

    def __init__(
        self, terms: Mapping[str, tuple[Reward, float]], *, name: str | None = None, on_error: OnError = "raise"
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if not terms:
            raise ConfigError("a weighted sum needs at least one term")
        for key, (_, weight) in terms.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ConfigError(f"the weight of {key!r} must be a finite number, got {weight!r}")
        self.terms = dict(terms)
        low = sum(min(w * b for b in r.range) for r, w in self.terms.values())
        high = sum(max(w * b for b in r.range) for r, w in self.terms.values())
        self.range = (low, high)

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Sum the terms; one invalid term makes the sum invalid."""
        columns = {key: reward(trajectories) for key, (reward, _) in self.terms.items()}
        out = []
        for k in range(len(trajectories)):
            row = {key: scores[k] for key, scores in columns.items()}
            parts = {key: s.value for key, s in row.items()}
            bad = next((s for s in row.values() if not s.valid), None)
            if bad is not None:
                out.append(Score.invalid(bad.reason or "a term is invalid", **parts))
            else:
                out.append(Score(sum(self.terms[key][1] * s.value for key, s in row.items()), parts=parts))
        return out

    def __call__(
        self, trajectories: Any, golds: Any = None, dbs: Any = None, schemas: Any = None, *, progress: Any = None
    ) -> Any:
        """See the class."""
        if golds is None:
            return super().__call__(trajectories, progress=progress)
        items = _rows_of(sql=golds, db=dbs, schema=schemas)
        if len(items) != len(trajectories):
            raise ConfigError(f"{len(trajectories)} texts for {len(items)} gold queries")
        made = [
            Trajectory(Task(f"sql-{k}", "", item), (Turn("policy", text),), StopReason.DONE)
            for k, (text, item) in enumerate(zip(trajectories, items, strict=True))
        ]
        scores = super().__call__(made)
        parts = {key: np.array([s.parts[key] for s in scores], dtype=np.float64) for key in self.terms}
        return RewardBatch(np.array([s.value for s in scores], dtype=np.float64), parts)


def reasoning_sql(
    executor: SQLExecutor | None = None,
    judge: Reward | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    ordered: Literal["auto"] | bool = False,
    on_error: OnError = "raise",
) -> WeightedSum:
    """The paper's total: ``3 execution + 2 judge + syntax + schema + ngram + format``; the judge only where execution is 0.

    Args:
        executor: shared by execution and syntax.
        judge: scores in [0, 1]; without one its term is left out.
        weights: replaces some of the weights; 0 leaves a term out.
        ordered: see :class:`ExecutionMatch`; the paper compares sets.

    Raises:
        ConfigError: an unknown term.
    """
    executor = executor or SQLExecutor()
    execution = ExecutionMatch(executor, ordered)
    known: dict[str, tuple[Reward, float]] = {
        "execution": (execution, 3.0),
        "syntax": (SQLSyntax(executor), 1.0),
        "schema": (SchemaOverlap(), 1.0),
        "ngram": (NgramOverlap(), 1.0),
        "format": (SQLFormat(), 1.0),
    }
    if judge is not None:
        known["judge"] = (OnlyIf(judge, when_zero=execution), 2.0)
    for key, weight in (weights or {}).items():
        if key not in known:
            hint = " (give judge=)" if key == "judge" else ""
            raise ConfigError(f"unknown term {key!r}{hint}; choose from {', '.join(known)}")
        known[key] = (known[key][0], float(weight))
    return WeightedSum({k: v for k, v in known.items() if v[1] != 0}, name="reasoning_sql", on_error=on_error)
