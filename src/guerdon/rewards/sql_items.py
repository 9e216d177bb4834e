"""What a SQL query is made of: its first statement, the tables and columns that it uses, its token n-grams.

sqlglot parses; where it cannot, a scan for known identifiers answers, so that no candidate raises.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from guerdon.errors import DataError, MissingDependency

__all__ = [
    "Schema",
    "canonical_tree",
    "first_statement",
    "has_order",
    "jaccard",
    "read_schema",
    "schema_items",
    "token_ngrams",
]

_LONGEST = 20_000
"""Longer texts are not parsed but scanned: parsing them takes seconds, and no query is that long."""

Schema = Mapping[str, Sequence[str]]
"""Table to its columns."""


def _sqlglot() -> Any:
    try:
        import sqlglot
    except ImportError as error:
        raise MissingDependency("SQL rewards need sqlglot: pip install 'guerdon[sql]'") from error
    import logging

    logging.getLogger("sqlglot").setLevel(logging.ERROR)
    return sqlglot


@lru_cache(maxsize=4096)
def first_statement(sql: str, dialect: str = "sqlite") -> str:
    """The text before the first ``;`` that is not inside quotes or a comment, stripped."""
    sqlglot = _sqlglot()
    try:
        tokens = sqlglot.tokenize(sql, dialect=dialect)
    except (sqlglot.errors.SqlglotError, RecursionError, ValueError):
        return sql.strip().rstrip(";").strip()
    for token in tokens:
        if token.token_type.name == "SEMICOLON":
            head = sql[: token.start].strip()
            if head:
                return head
    return sql.strip()


def _parse(sql: str, dialect: str) -> Any:
    sqlglot = _sqlglot()
    if len(sql) > _LONGEST:
        return None
    try:
        found = sqlglot.parse(sql, dialect=dialect)
    except (sqlglot.errors.SqlglotError, RecursionError, ValueError, AttributeError, TypeError, IndexError):
        return None
    tree = next((t for t in found if t is not None), None)
    return tree if isinstance(tree, sqlglot.exp.Query | sqlglot.exp.DML | sqlglot.exp.DDL) else None


def has_order(sql: str, dialect: str = "sqlite") -> bool:
    """Whether the query itself, and not only a part of it, has an ORDER BY."""
    tree = _parse(first_statement(sql, dialect), dialect)
    return tree is not None and tree.args.get("order") is not None


@lru_cache(maxsize=512)
def _from_ddl(ddl: str, dialect: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    sqlglot = _sqlglot()
    exp = sqlglot.exp
    try:
        trees = sqlglot.parse(ddl, dialect=dialect)
    except (sqlglot.errors.SqlglotError, RecursionError) as error:
        raise DataError(f"the schema is no CREATE TABLE statements that can be read: {str(error)[:120]}") from error
    out = []
    for tree in trees:
        if isinstance(tree, exp.Create) and isinstance(tree.this, exp.Schema):
            columns = [c.name.lower() for c in tree.this.expressions if isinstance(c, exp.ColumnDef)]
            out.append((tree.this.this.name.lower(), tuple(columns)))
    if not out:
        raise DataError("the schema holds no CREATE TABLE statement")
    return tuple(out)


def read_schema(schema: Schema | str | None, dialect: str = "sqlite") -> dict[str, tuple[str, ...]]:
    """Tables and columns, lower-cased, of a mapping or of CREATE TABLE statements; empty for ``None``.

    Raises:
        DataError: a text without a readable CREATE TABLE, or something else.
    """
    if schema is None:
        return {}
    if isinstance(schema, str):
        return dict(_from_ddl(schema, dialect))
    if not isinstance(schema, Mapping):
        raise DataError(f"a schema is a mapping of tables to columns or CREATE TABLE text, got {type(schema).__name__}")
    return {str(t).lower(): tuple(str(c).lower() for c in columns) for t, columns in schema.items()}


def schema_items(
    sql: str,
    schema: Schema | str | None = None,
    *,
    dialect: str = "sqlite",
    expand_star: bool = True,
    strict: bool = False,
) -> frozenset[str]:
    """Tables (``"t"``) and columns (``"t.c"``) that a query uses, aliases resolved, lower-cased, quotes removed.

    Args:
        sql: its first statement is read.
        schema: tells which table an unqualified column belongs to, what ``*`` stands for, and whether a double-quoted
            word is a column or, as SQLite reads it otherwise, a string.
        dialect: of the query.
        expand_star: count ``SELECT *`` as all columns of its tables (known ones).
        strict: raise for a query that cannot be parsed instead of scanning it for known identifiers.

    Returns:
        The items. A column that no table of the query is known to have is ``"?.c"``: an invented column counts.

    Raises:
        DataError: with ``strict``, a query that cannot be parsed.
    """
    tables = tuple(read_schema(schema, dialect).items())
    found = _schema_items(first_statement(sql, dialect), tables, dialect, expand_star)
    if found is None and strict:
        raise DataError(f"cannot parse the query {sql[:80]!r}")
    return frozenset(_scan(first_statement(sql, dialect), dict(tables))) if found is None else found


@lru_cache(maxsize=4096)
def _schema_items(
    statement: str, tables: tuple[tuple[str, tuple[str, ...]], ...], dialect: str, expand_star: bool
) -> frozenset[str] | None:
    """The items, remembered: a gold query is compared with many candidates. None where nothing can be parsed."""
    if not statement:
        return frozenset()
    tree = _parse(statement, dialect)
    if tree is None:
        return None
    try:
        return frozenset(_Items(tree, dict(tables), expand_star).collect())
    except RecursionError:
        return None


def canonical_tree(sql: str, schema: Schema | str | None = None, *, dialect: str = "sqlite") -> Any:
    """The parsed first statement with base tables in front of its columns and without aliases; None if unparseable.

    Columns of subqueries and of common table expressions keep the words that the query gives them.
    """
    tree = _parse(first_statement(sql, dialect), dialect)
    if tree is None:
        return None
    exp = _sqlglot().exp
    items = _Items(tree, read_schema(schema, dialect), expand_star=False)
    named = [(c, items._column(c)) for c in tree.find_all(exp.Column) if not isinstance(c.this, exp.Star)]
    for column, item in named:
        if item is not None:
            base, _, name = item.partition(".")
            column.set("table", None if base == "?" else exp.to_identifier(base))
            column.set("this", exp.to_identifier(name))
    for table in tree.find_all(exp.Table):
        table.set("alias", None)
    for select in tree.find_all(exp.Select):
        select.set("expressions", [e.this if isinstance(e, exp.Alias) else e for e in select.expressions])
    for identifier in tree.find_all(exp.Identifier):
        identifier.set("this", identifier.name.lower())
        identifier.set("quoted", False)
    return tree


class _Items:
    """Resolves the columns of one parsed query."""

    def __init__(self, tree: Any, tables: Mapping[str, Sequence[str]], expand_star: bool) -> None:
        self.exp = _sqlglot().exp
        self.tree, self.tables, self.expand_star = tree, tables, expand_star
        self.views = {cte.alias.lower() for cte in tree.find_all(self.exp.CTE)}
        self._known: dict[int, dict[str, str | None]] = {}
        self._aliases: dict[int, set[str]] = {}

    def collect(self) -> Iterator[str]:
        exp = self.exp
        for table in self.tree.find_all(exp.Table):
            if table.name and table.name.lower() not in self.views:
                yield table.name.lower()
        for column in self.tree.find_all(exp.Column):
            if isinstance(column.this, exp.Star):
                yield from self._star(column.parent_select, column.table.lower())
            else:
                item = self._column(column)
                if item is not None:
                    yield item
        for star in self.tree.find_all(exp.Star):
            if isinstance(star.parent, exp.Select):
                yield from self._star(star.parent, "")
        for join in self.tree.find_all(exp.Join):
            yield from self._using(join)

    def _sources(self, select: Any) -> dict[str, str | None]:
        """Alias to base table, or to None for a subquery or a common table expression."""
        if select is None:
            return {}
        if id(select) not in self._known:
            self._known[id(select)] = self._find_sources(select)
        return self._known[id(select)]

    def _find_sources(self, select: Any) -> dict[str, str | None]:
        out: dict[str, str | None] = {}
        clauses = [select.args.get("from_") or select.args.get("from"), *(select.args.get("joins") or ())]
        waiting = [c.this for c in clauses if getattr(c, "this", None) is not None]
        while waiting:
            item = waiting.pop(0)
            waiting += [join.this for join in item.args.get("joins") or ()]
            if isinstance(item, self.exp.Table):
                name = item.name.lower()
                out[(item.alias or item.name).lower()] = None if name in self.views else name
            elif isinstance(item, self.exp.Paren | self.exp.Subquery) and isinstance(item.this, self.exp.Table):
                waiting.append(item.this)  # a join in parentheses
            else:
                out[(item.alias or f"?{len(out)}").lower()] = None
        return out

    def _outward(self, select: Any) -> Iterator[Any]:
        while select is not None:
            yield select
            select = select.parent_select

    def _column(self, column: Any) -> str | None:
        name, qualifier = column.name.lower(), column.table.lower()
        if not name:
            return None
        anything_hidden = self._orders_a_union(column)
        candidates: list[str] = []
        for select in self._outward(column.parent_select):
            sources = self._sources(select)
            if qualifier:
                if qualifier in sources:
                    base = sources[qualifier]
                    return None if base is None else f"{base}.{name}"
                continue
            for base in sources.values():
                if base is None:
                    anything_hidden = True
                elif name in self.tables.get(base, ()):
                    return f"{base}.{name}"
                elif base not in self.tables:
                    candidates.append(base)
        if qualifier:
            return f"{qualifier}.{name}" if qualifier in self.tables else f"?.{name}"
        if self._is_alias(column, name) or anything_hidden:
            return None
        if column.this.args.get("quoted") and not candidates:
            return None
        if len(set(candidates)) == 1:
            return f"{candidates[0]}.{name}"
        return f"?.{name}"

    def _orders_a_union(self, column: Any) -> bool:
        """Whether it names an output column of a set operation, in the ORDER BY behind it."""
        order = column.find_ancestor(self.exp.Order)
        return order is not None and isinstance(order.parent, self.exp.SetOperation)

    def _using(self, join: Any) -> Iterator[str]:
        """Columns of ``JOIN ... USING (c)``: those of all its tables that have one."""
        bases = {base for base in self._sources(join.find_ancestor(self.exp.Select)).values() if base is not None}
        for name in (item.name.lower() for item in join.args.get("using") or ()):
            known = [base for base in bases if name in self.tables.get(base, ())]
            yield from (f"{base}.{name}" for base in known or [b for b in bases if b not in self.tables] or ["?"])

    def _is_alias(self, column: Any, name: str) -> bool:
        select = column.parent_select
        if select is None:
            return False
        if id(select) not in self._aliases:
            named = (e for e in select.expressions if isinstance(e, self.exp.Alias))
            self._aliases[id(select)] = {e.alias.lower() for e in named}
        return name in self._aliases[id(select)]

    def _star(self, select: Any, qualifier: str) -> Iterator[str]:
        if not self.expand_star:
            return
        for alias, base in self._sources(select).items():
            if base is not None and qualifier in ("", alias):
                yield from (f"{base}.{c}" for c in self.tables.get(base, ()))


_WORD = re.compile(r"[^\W\d]\w*")
_QUOTED = re.compile(r'"([^"]+)"|`([^`]+)`|\[([^\]]+)\]')


def _scan(sql: str, tables: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Known identifiers in a text that no parser reads; columns only of tables that it names."""
    words = {w.lower() for w in _WORD.findall(sql)}
    words |= {(a or b or c).lower() for a, b, c in _QUOTED.findall(sql)}
    for table, columns in tables.items():
        if table in words:
            yield table
            yield from (f"{table}.{c}" for c in columns if c in words)


@lru_cache(maxsize=4096)
def token_ngrams(
    sql: str, n: int = 2, *, tokenizer: str = "sqlglot", dialect: str = "sqlite"
) -> frozenset[tuple[str, ...]]:
    """Set of ``n`` consecutive tokens, lower-cased; comments are no tokens.

    Args:
        sql: a query.
        n: tokens of an n-gram; a query of fewer has none.
        tokenizer: ``"sqlglot"``, or ``"words"`` for words and single signs. Text that sqlglot cannot tokenise is cut
            into words too.
        dialect: of the tokenizer.
    """
    tokens: list[str] | None = None
    if tokenizer == "sqlglot":
        sqlglot = _sqlglot()
        try:
            tokens = [t.text.lower() for t in sqlglot.tokenize(sql, dialect=dialect)]
        except (sqlglot.errors.SqlglotError, RecursionError, ValueError):
            tokens = None
    if tokens is None:
        tokens = re.findall(r"\w+|[^\w\s]", sql.lower())
    return frozenset(tuple(tokens[k : k + n]) for k in range(len(tokens) - n + 1))


def jaccard(a: frozenset[Any], b: frozenset[Any]) -> float:
    """``|a & b| / |a | b|``; 1 where both are empty, 0 where only one is."""
    if not a and not b:
        return 1.0
    return len(a & b) / len(a | b)
