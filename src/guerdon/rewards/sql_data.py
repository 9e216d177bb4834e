"""Checks text-to-SQL tasks before training: gold queries that cannot be parsed or run, and empty gold results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from guerdon.errors import ConfigError, DataError
from guerdon.rewards.sql_base import database_of, read_item
from guerdon.rewards.sql_execution import SQLExecutor
from guerdon.rewards.sql_items import schema_items
from guerdon.types import Task

__all__ = ["check_sql_tasks"]


def check_sql_tasks(
    tasks: Sequence[Task],
    executor: SQLExecutor | None = None,
    *,
    empty: Literal["keep", "exclude", "raise"] = "keep",
    dialect: str = "sqlite",
) -> list[Task]:
    """Tasks whose gold queries have been parsed and run; each has ``empty_gold`` in its meta.

    Args:
        tasks: with references as :func:`guerdon.rewards.reasoning_sql` reads them.
        executor: give that of the reward: it remembers the gold results.
        empty: what to do with a task whose gold result has no row (it rewards trivial queries): keep it, leave it out,
            or count it as a mistake.
        dialect: of the queries.

    Raises:
        DataError: mistakes in the data; the first few are named, and how many there are.
    """
    if empty not in ("keep", "exclude", "raise"):
        raise ConfigError(f"empty must be 'keep', 'exclude' or 'raise', got {empty!r}")
    executor = executor or SQLExecutor()
    out: list[Task] = []
    wrong: list[str] = []
    for task in tasks:
        try:
            item = read_item(task)
            schema_items(item["sql"], item.get("schema"), dialect=dialect, strict=True)
            none = not executor.gold(database_of(item), item["sql"]).rows
        except (DataError, ConfigError) as error:
            wrong.append(f"{task.id}: {error}")
            continue
        if none and empty == "raise":
            wrong.append(f"{task.id}: the gold query returns no row")
        elif not (none and empty == "exclude"):
            out.append(replace(task, meta={**task.meta, "empty_gold": none}))
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DataError(f"{len(wrong)} of {len(tasks)} tasks cannot be used: {'; '.join(wrong[:3])}{more}")
    return out
