"""How many clauses of a query are those of the gold query: a deterministic stand-in for a judge of SQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from guerdon.errors import DataError
from guerdon.rewards.base import OnError
from guerdon.rewards.sql_base import SqlReward, columns
from guerdon.rewards.sql_items import Schema, canonical_tree

__all__ = ["ClauseMatch", "clauses"]


def clauses(sql: str, schema: Schema | str | None = None, *, dialect: str = "sqlite") -> dict[str, Any] | None:
    """The clauses of a query in canonical words; None where it is no SELECT that can be parsed.

    Columns are written with their base tables, aliases and letter case are gone. ``select`` is a tuple (with its
    DISTINCT), ``from`` the set of tables and join conditions, ``where`` and ``having`` sets of conditions between ANDs,
    ``group`` a set, ``order`` a tuple (with its LIMIT). Clauses that a query has not are left out.

    Args:
        sql: its first statement is read.
        schema: tells which table an unqualified column belongs to.
        dialect: of the query.
    """
    tree = canonical_tree(sql, schema, dialect=dialect)
    if tree is None or tree.key != "select":
        return None
    args = tree.args
    source = args.get("from_") or args.get("from")
    joins = args.get("joins") or ()
    found: dict[str, Any] = {
        "select": (*("distinct" for _ in (args.get("distinct"),) if _), *map(_words, tree.expressions)),
        "from": frozenset(
            [_words(n.this) for n in (source, *joins) if n is not None]
            + [atom for join in joins for atom in _atoms(join.args.get("on"))]
        ),
        "where": frozenset(_atoms(args.get("where"))),
        "having": frozenset(_atoms(args.get("having"))),
        "group": frozenset(map(_words, getattr(args.get("group"), "expressions", ()))),
        "order": tuple(_words(args[k]) for k in ("order", "limit", "offset") if args.get(k) is not None),
    }
    return {key: value for key, value in found.items() if value}


def _words(node: Any) -> str:
    return str(node.sql(dialect="sqlite", comments=False))


def _atoms(node: Any) -> list[str]:
    """Conditions between ANDs; the sides of an equation are in order."""
    if node is None:
        return []
    if node.key in ("where", "having", "paren"):
        return _atoms(node.this)
    if node.key == "and":
        return _atoms(node.left) + _atoms(node.right)
    if node.key == "eq":
        return [" = ".join(sorted((_words(node.left), _words(node.right))))]
    return [_words(node)]


class ClauseMatch(SqlReward):
    """Share of clauses that agree, among those that the candidate or the gold query has; see :func:`clauses`.

    Args:
        dialect: of the queries.

    A candidate that is empty, no SELECT, or cannot be parsed gives 0. ``match(sqls, golds, schemas)`` on plain lists.

    Raises (as failures of a score):
        DataError: the gold query is no SELECT that can be parsed.
    """

    def __init__(self, dialect: str = "sqlite", *, name: str | None = None, on_error: OnError = "raise") -> None:
        super().__init__(name=name, on_error=on_error)
        self.dialect = dialect

    def score_sql(self, sql: str, item: Mapping[str, Any]) -> float:
        gold = clauses(item["sql"], item.get("schema"), dialect=self.dialect)
        if gold is None:
            raise DataError(f"the gold query {item['sql'][:80]!r} is no SELECT that can be parsed")
        mine = clauses(sql, item.get("schema"), dialect=self.dialect)
        if mine is None:
            return 0.0
        names = gold.keys() | mine.keys()
        return sum(gold.get(k) == mine.get(k) for k in names) / len(names)

    def __call__(self, trajectories: Any, golds: Any = None, schemas: Any = None, *, progress: Any = None) -> Any:
        """See the class."""
        if golds is None:
            return super().__call__(trajectories, progress=progress)
        sqls: Sequence[str] = trajectories
        return self.plain(sqls, columns(sql=golds, schema=schemas))
