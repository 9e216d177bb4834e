"""What SQL rewards have in common: the candidate in a response, the reference of a task, the call on plain lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from guerdon.errors import ConfigError, DataError
from guerdon.rewards.base import Progress, Reward
from guerdon.rewards.grammar import fenced, last_block
from guerdon.rewards.sql_execution import Database
from guerdon.types import Score, StopReason, Task, Trajectory, Turn, policy_text

__all__ = ["SqlReward", "candidate_of", "columns", "database_of", "extract_sql", "read_item"]

_GIVEN = "guerdon/sql"


def extract_sql(text: str, tag: str = "answer") -> str:
    """The SQL of a response: its last ``<answer>`` block, without a fence; empty where there is none.

    Of several fences in the block the last one marked ``sql`` (or ``sqlite``) counts, else the last.
    """
    block = last_block(text, tag)
    if block is None:
        return ""
    if "```" in block:
        for language in ("sql", "sqlite", None):
            found = [content.strip() for content in fenced(block, language) if content.strip()]
            if found:
                return found[-1]
        return _inline(block)
    return block.strip()


def _inline(block: str) -> str:
    """What stands between the marks of a fence on one line."""
    inside = block.split("```")[1].strip()
    word, _, rest = inside.partition(" ")
    return rest.strip() if word.lower() in ("sql", "sqlite") else inside


def candidate_of(trajectory: Trajectory, tag: str = "answer") -> str:
    """The SQL that a trajectory proposes, or that it was made of."""
    given = trajectory.info.get(_GIVEN)
    return extract_sql(policy_text(trajectory), tag) if given is None else str(given)


def read_item(task: Task) -> Mapping[str, Any]:
    """The reference of a text-to-SQL task.

    Raises:
        DataError: it is no mapping, or has no gold query.
    """
    item = task.reference
    if not isinstance(item, Mapping) or not isinstance(item.get("sql"), str) or not item["sql"].strip():
        raise DataError(f"task {task.id!r}: the reference of a SQL reward is a mapping with the gold query under 'sql'")
    return item


def database_of(item: Mapping[str, Any]) -> Database:
    """The database of a task's reference.

    Raises:
        DataError: there is none.
    """
    if item.get("db") is None:
        raise DataError("the reference has no database; give its path under 'db'")
    db: Database = item["db"]
    return db


def columns(**given: Sequence[Any] | None) -> list[dict[str, Any]]:
    """Rows of parallel lists; a list that is None has no part in them.

    Raises:
        ConfigError: lists of different lengths, or one text in place of a list.
    """
    lists = {}
    for key, value in given.items():
        if isinstance(value, str | bytes):
            raise ConfigError(f"{key} must be a list with one entry per candidate, got one {type(value).__name__}")
        if value is not None:
            lists[key] = list(value)
    lengths = {k: len(v) for k, v in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError("lists of different lengths: " + ", ".join(f"{k} {n}" for k, n in lengths.items()))
    n = next(iter(lengths.values()), 0)
    return [{k: v[i] for k, v in lists.items()} for i in range(n)]


class SqlReward(Reward):
    """A reward of a candidate query. A subclass overrides :meth:`score_sql`."""

    range = (0.0, 1.0)
    tag = "answer"

    def score_sql(self, sql: str, item: Mapping[str, Any]) -> Score | float:
        """Score one candidate; ``item`` is the task's reference (``sql``, ``db``, ``schema``)."""
        raise TypeError(f"{type(self).__name__} must override score_sql")

    def score_one(self, trajectory: Trajectory) -> Any:
        return self.score_sql(candidate_of(trajectory, self.tag), read_item(trajectory.task))

    def assess(
        self, trajectories: Sequence[Trajectory], *, progress: Progress | None = None
    ) -> tuple[list[Score], list[bool]]:
        self.prepare(trajectories)
        return super().assess(trajectories, progress=progress)

    def prepare(self, trajectories: Sequence[Trajectory]) -> None:
        """Called with the whole batch before its trajectories are scored one by one."""

    def plain(self, sqls: Sequence[str], items: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """``[B]`` float64 scores of bare queries; NaN where ``on_error="drop"`` found no honest value."""
        given = columns(sqls=sqls, items=items)
        made = [
            Trajectory(
                Task(f"sql-{k}", "", row["items"]),
                (Turn("policy", row["sqls"]),),
                StopReason.DONE,
                info={_GIVEN: row["sqls"]},
            )
            for k, row in enumerate(given)
        ]
        return np.array([s.value for s in Reward.__call__(self, made)], dtype=np.float64)
