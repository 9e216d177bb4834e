"""Text-to-SQL: execution match and the partial rewards beside it.

Queries run in :mod:`guerdon.sandbox`, on read-only connections with limits on time, memory and rows. A task's reference
holds ``{"sql": gold, "db": path, "schema": ..., "question": ...}``; the candidate is read from the response's last answer
block. Each reward is also callable on plain lists, as the method's description writes it. The weighted total is in
:mod:`guerdon.rewards.sql_total`.

Source: Pourreza et al. 2025, "Reasoning-SQL" (arXiv 2503.23157). What it leaves open is chosen here: bigrams for the
n-gram reward, the tags ``reasoning`` and ``answer``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from guerdon.errors import ConfigError
from guerdon.rewards.base import OnError
from guerdon.rewards.grammar import blocks, tag_counts
from guerdon.rewards.plain import TextReward
from guerdon.rewards.sql_base import SqlReward, candidate_of, columns, database_of
from guerdon.rewards.sql_execution import Database, SQLExecutor
from guerdon.rewards.sql_items import first_statement, has_order, jaccard, schema_items, token_ngrams
from guerdon.rewards.sql_rows import same_rows
from guerdon.types import Score, Trajectory

__all__ = ["ExecutionMatch", "NgramOverlap", "SQLFormat", "SQLSyntax", "SchemaOverlap"]


class ExecutedReward(SqlReward):
    """A reward that runs the candidate; those of a batch are run together."""

    executor: SQLExecutor
    runs_gold = False

    def prepare(self, trajectories: Sequence[Trajectory]) -> None:
        queries: list[tuple[Database, str]] = []
        for trajectory in trajectories:
            item = trajectory.task.reference
            if isinstance(item, Mapping) and item.get("db") is not None:
                queries.append((item["db"], candidate_of(trajectory, self.tag)))
                if self.runs_gold and isinstance(item.get("sql"), str):
                    queries.append((item["db"], item["sql"]))
        self.executor.prefetch(queries)


class ExecutionMatch(ExecutedReward):
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

    runs_gold = True

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
        db = database_of(item)
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
        return self.plain(trajectories, columns(sql=golds, db=dbs))


class SQLSyntax(ExecutedReward):
    """1 where the candidate runs without an error, whatever it returns; ``syntax(sqls, dbs)`` on plain lists."""

    def __init__(
        self, executor: SQLExecutor | None = None, *, name: str | None = None, on_error: OnError = "raise"
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        self.executor = executor or SQLExecutor()

    def score_sql(self, sql: str, item: Mapping[str, Any]) -> float:
        return float(bool(sql.strip()) and self.executor.run(database_of(item), sql).ok)

    def __call__(self, trajectories: Any, dbs: Any = None, *, progress: Any = None) -> Any:
        """See the class."""
        if dbs is None:
            return super().__call__(trajectories, progress=progress)
        return self.plain(trajectories, [{"sql": "-", **row} for row in columns(db=dbs)])


class SchemaOverlap(SqlReward):
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
        return self.plain(trajectories, columns(sql=golds, schema=schemas))


class NgramOverlap(SqlReward):
    """Jaccard index of the sets of token n-grams of candidate and gold; an empty candidate gives 0.

    Of several statements the first is read, as it is the one that would be run.

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
        mine, gold = (token_ngrams(first_statement(s, self.dialect), self.n, **options) for s in (sql, item["sql"]))
        return jaccard(mine, gold)

    def __call__(self, trajectories: Any, golds: Any = None, *, progress: Any = None) -> Any:
        """See the class."""
        if golds is None:
            return super().__call__(trajectories, progress=progress)
        return self.plain(trajectories, columns(sql=golds))


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
