"""Questions about a database from about forty templates, each with its query in concepts; and queries with slips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from guerdon.environments.sql_schemas import Column, SqlDatabase, SqlSchema, TableSpec
from guerdon.errors import ConfigError

__all__ = [
    "SHAPES",
    "Concept",
    "SqlQuestion",
    "draw_question",
    "in_own_words",
    "pick",
    "render",
    "slipped",
    "spoken_words",
    "with_one_slip",
]

SHAPES = ("select", "pair", "number", "text", "both", "count", "count where", "aggregate", "aggregate where", "group",
          "order", "join text", "join number", "join count")  # fmt: skip
"""Kinds of questions; each is asked in two to four ways."""

_LIST = ("list the", "show the", "give the", "find the")
_OVER = {">": ("over", "above"), "<": ("under", "below")}
_AGGREGATES = {
    "AVG": ("average", "mean"),
    "MAX": ("highest", "maximum"),
    "MIN": ("lowest", "minimum"),
    "SUM": ("total", "summed"),
}


@dataclass(frozen=True, slots=True)
class Concept:
    """A place in a query where an identifier goes."""

    word: str


Piece = str | Concept


@dataclass(frozen=True, slots=True)
class SqlQuestion:
    """A question and its query, in concepts.

    Args:
        shape: one of :data:`SHAPES`.
        text: the question.
        query: words of the query, concepts where identifiers go.
        broad: the query without its filter, whose result must differ; empty where there is no filter.
    """

    shape: str
    text: str
    query: tuple[Piece, ...]
    broad: tuple[Piece, ...] = ()

    def sql(self, database: SqlDatabase) -> str:
        """The gold query."""
        return render(self.query, database)

    def draft(self, database: SqlDatabase) -> str:
        """The reasoning of a script: the query with each identifier behind its concept."""
        return " ".join(p if isinstance(p, str) else f"{p.word} {database.names[p.word]}" for p in self.query)


def render(query: Sequence[Piece], database: SqlDatabase) -> str:
    return " ".join(p if isinstance(p, str) else database.names[p.word] for p in query)


def pick(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    """One of the items, uniformly."""
    return items[int(rng.integers(len(items)))]


def draw_question(schema: SqlSchema, rng: np.random.Generator, shape: str | None = None) -> SqlQuestion:
    """A random question about a schema.

    Args:
        schema: in concepts.
        rng: where randomness comes from.
        shape: one of :data:`SHAPES`; random by default.
    """
    shape = shape or pick(rng, SHAPES)
    if shape not in SHAPES:
        raise ConfigError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    if shape.startswith("join"):
        return _joined(schema, rng, shape)
    table: TableSpec = pick(rng, schema.tables)
    query: tuple[Piece, ...]
    t, what = Concept(table.concept), Concept(pick(rng, table.of("name")).concept)
    ask, each = pick(rng, _LIST), pick(rng, ("each", "every"))
    number, text = pick(rng, table.of("number")), pick(rng, table.of("category"))
    start: tuple[Piece, ...] = ("SELECT", what, "FROM", t)
    said = f"{ask} {what.word} of {each} {t.word}"
    if shape == "select":
        free = Concept(pick(rng, table.of("name", "number", "category")).concept)
        return SqlQuestion(shape, f"{ask} {free.word} of {each} {t.word}", ("SELECT", free, "FROM", t))
    if shape == "pair":
        other = pick(rng, table.of("number", "category"))
        query = ("SELECT", what, ",", Concept(other.concept), "FROM", t)
        return SqlQuestion(shape, f"{ask} {what.word} and {other.concept} of {each} {t.word}", query)
    if shape in ("number", "text"):
        words, condition = _filter(number if shape == "number" else text, rng)
        return SqlQuestion(shape, f"{said} {words}", (*start, "WHERE", *condition), start)
    if shape == "both":
        (words, one), (more, two) = _filter(number, rng), _filter(text, rng)
        query = (*start, "WHERE", *one, "AND", *two)
        return SqlQuestion(shape, f"{said} {words} and {more}", query, (*start, "WHERE", *one))
    if shape in ("count", "count where"):
        counted: tuple[Piece, ...] = ("SELECT", "COUNT", "(", "*", ")", "FROM", t)
        said = f"{pick(rng, ('how many', 'what is the number of'))} {t.word}"
        if shape == "count":
            return SqlQuestion(shape, said, counted)
        words, condition = _filter(pick(rng, (number, text)), rng)
        return SqlQuestion(shape, f"{said} {words}", (*counted, "WHERE", *condition), counted)
    if shape in ("aggregate", "aggregate where"):
        function = pick(rng, tuple(_AGGREGATES))
        said = f"what is the {pick(rng, _AGGREGATES[function])} {number.concept} of {each} {t.word}"
        query = ("SELECT", function, "(", Concept(number.concept), ")", "FROM", t)
        if shape == "aggregate":
            return SqlQuestion(shape, said, query)
        words, condition = _filter(text, rng)
        return SqlQuestion(shape, f"{said} {words}", (*query, "WHERE", *condition), query)
    if shape == "group":
        by = Concept(text.concept)
        said = pick(rng, (f"for each {by.word} the number of {t.word}", f"how many {t.word} per {by.word}"))
        return SqlQuestion(shape, said, ("SELECT", by, ",", "COUNT", "(", "*", ")", "FROM", t, "GROUP", "BY", by))
    order, word = pick(rng, (("DESC", "most"), ("DESC", "largest"), ("ASC", "least"), ("ASC", "smallest")))
    by = Concept(number.concept)
    query = (*start, "ORDER", "BY", by, order, "LIMIT", "1")
    return SqlQuestion(shape, f"{ask} {what.word} of the {t.word} with the {word} {by.word}", query, start)


def _joined(schema: SqlSchema, rng: np.random.Generator, shape: str) -> SqlQuestion:
    table, link, other, key = pick(rng, schema.links())
    t, u = Concept(table.concept), Concept(other.concept)
    kind = "number" if shape == "join number" or (shape == "join count" and rng.random() < 0.5) else "category"
    words, condition = _filter(pick(rng, other.of(kind)), rng)
    join: tuple[Piece, ...] = ("FROM", t, "JOIN", u, "ON", Concept(link.concept), "=", Concept(key.concept))
    if shape == "join count":
        said, start = f"how many {t.word} whose {u.word} {words}", ("SELECT", "COUNT", "(", "*", ")", *join)
    else:
        what = Concept(pick(rng, table.of("name")).concept)
        said = f"{pick(rng, _LIST)} {what.word} of {pick(rng, ('each', 'every'))} {t.word} whose {u.word} {words}"
        start = ("SELECT", what, *join)
    return SqlQuestion(shape, said, (*start, "WHERE", *condition), start)


def _filter(column: Column, rng: np.random.Generator) -> tuple[str, tuple[Piece, ...]]:
    """Words of a condition, and the condition."""
    where = Concept(column.concept)
    if column.kind == "number":
        sign = pick(rng, tuple(_OVER))
        value = str(int(rng.integers(20, 81)))
        return f"with {column.concept} {pick(rng, _OVER[sign])} {value}", (where, sign, value)
    value = f"'{pick(rng, column.values)}'"
    return f"{pick(rng, ('with', 'in'))} {column.concept} {value}", (where, "=", value)


def _alternatives(query: Sequence[Piece], schema: SqlSchema, k: int) -> list[Piece]:
    """What could stand in place ``k`` by mistake: another column of the table, comparison, aggregate, value, table."""
    piece = query[k]
    word = piece if isinstance(piece, str) else piece.word
    found: list[Piece] = []
    if isinstance(piece, str):
        found = [*_SWAPS.get(word, ())]
        if word.isdigit() and query[k - 1] != "LIMIT":
            found = [str(n) for n in range(20, 81)]
    else:
        homes = {c.concept: t for t in schema.tables for c in t.of("name", "number", "category")}
        if word in homes:
            found = [Concept(c.concept) for c in homes[word].of("name", "number", "category")]
        elif word in {t.concept for t in schema.tables}:
            found = [Concept(t.concept) for t in schema.tables]
    return [other for other in found if other != piece]


def slipped(question: SqlQuestion, schema: SqlSchema, rng: np.random.Generator, rate: float) -> SqlQuestion:
    """The question with a query in which choices went wrong by chance, independently of each other.

    Args:
        question: with the right query.
        schema: that it is about.
        rng: where randomness comes from.
        rate: chance of each column, comparison, aggregate and direction to be another one. The chance that the filter
            is left out is half of it; that a table or a value is another, a third.
    """
    query = list(question.query)
    if "WHERE" in query and rng.random() < rate / 2:
        del query[query.index("WHERE") :]
    tables = {t.concept for t in schema.tables}
    for k, piece in enumerate(query):
        rare = piece.isdigit() if isinstance(piece, str) else piece.word in tables
        others = _alternatives(query, schema, k)
        if others and rng.random() < (rate / 3 if rare else rate):
            query[k] = pick(rng, others)
    return replace(question, query=tuple(query))


def with_one_slip(question: SqlQuestion, schema: SqlSchema, rng: np.random.Generator) -> SqlQuestion:
    """The question with a query that is wrong in one place: a detail of the filter, the aggregate or the direction where
    it has one, else a column or the table."""
    query = list(question.query)
    places = [k for k in range(len(query)) if _alternatives(query, schema, k)]
    begun = query.index("WHERE") if "WHERE" in query else len(query)
    details = [k for k in places if k > begun or isinstance(query[k], str)]
    columns = [k for k in places if k > 3 or k == 1]
    k = pick(rng, details or columns or places)
    query[k] = pick(rng, _alternatives(query, schema, k))
    return replace(question, query=tuple(query))


def in_own_words(question: SqlQuestion) -> SqlQuestion:
    """The question with a query that returns the same rows in other words: DISTINCT, and conditions in parentheses."""
    query = list(question.query)
    if "LIMIT" in query:
        k = query.index("BY") + 1
        query[k : k + 1] = ["(", query[k], ")"]
        return replace(question, query=tuple(query))
    if "WHERE" in query:
        k = query.index("WHERE") + 1
        query[k:] = ["(", *query[k:], ")"]
    if "ON" in query:
        k = query.index("ON") + 1
        query[k : k + 3] = ["(", *query[k : k + 3], ")"]
    return replace(question, query=("SELECT", "DISTINCT", *query[1:]))


_SWAPS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((">", "<", "="), (">", "<", "=")),
    **{name: tuple(_AGGREGATES) for name in _AGGREGATES},
    **dict.fromkeys(("ASC", "DESC"), ("ASC", "DESC")),
}

_SIGNS = (
    *("SELECT", "DISTINCT", "FROM", "WHERE", "AND", "JOIN", "ON", "GROUP", "BY", "ORDER", "DESC", "ASC", "LIMIT"),
    *("COUNT", *_AGGREGATES, "(", ")", "*", ",", "=", ">", "<", ":"),
)
_GLUE = (
    *("list", "show", "give", "find", "the", "of", "each", "every", "with", "is", "and", "how", "many", "what", "for"),
    *("in", "number", "per", "whose", "most", "least", "largest", "smallest", "question"),
)


def spoken_words() -> tuple[str, ...]:
    """Words of questions and queries, schema words and numbers left out."""
    return (*_SIGNS, *_GLUE, *(w for group in (*_OVER.values(), *_AGGREGATES.values()) for w in group))
