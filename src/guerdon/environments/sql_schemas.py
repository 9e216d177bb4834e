"""Small SQLite databases made from a seed: six schemas whose tables and columns have other names in every database.

A schema is written in concepts ("singer", "age"); a database gives every concept an arbitrary identifier, so that only
the schema in the prompt tells what a query must say. Two fills of one database differ in their rows alone: a query that
is right by accident on the first seldom is on the second.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from guerdon.errors import ConfigError

__all__ = ["HELD_OUT", "SCHEMAS", "Column", "SqlDatabase", "SqlSchema", "TableSpec", "identifiers", "practice_schema"]

Kind = Literal["name", "number", "category", "key", "link"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column by its concept.

    Args:
        concept: one word, unique within the schema.
        kind: ``name`` (a text of many values), ``number`` (1 to 99), ``category`` (one of ``values``), ``key`` (of the
            table) or ``link`` (to the key of the table ``target``).
        values: of a category.
        target: concept of the table that a link points to.
    """

    concept: str
    kind: Kind
    values: tuple[str, ...] = ()
    target: str = ""


@dataclass(frozen=True, slots=True)
class TableSpec:
    """A table by its concept, with columns."""

    concept: str
    columns: tuple[Column, ...]

    def of(self, *kinds: Kind) -> list[Column]:
        """Columns of these kinds."""
        return [c for c in self.columns if c.kind in kinds]


@dataclass(frozen=True, slots=True)
class SqlSchema:
    """Two to four tables."""

    name: str
    tables: tuple[TableSpec, ...]

    @property
    def concepts(self) -> list[str]:
        """Concepts of tables and columns, in order."""
        return [c for table in self.tables for c in (table.concept, *(column.concept for column in table.columns))]

    def links(self) -> list[tuple[TableSpec, Column, TableSpec, Column]]:
        """Joins: a table, its link, the table that it points to, that table's key."""
        by_name = {t.concept: t for t in self.tables}
        return [
            (table, link, by_name[link.target], by_name[link.target].of("key")[0])
            for table in self.tables
            for link in table.of("link")
        ]


def _schema(text: str) -> SqlSchema:
    """Read ``table: column column ...; ...``; a column is ``name``, ``number#``, ``category=a|b|c`` or ``>target``."""
    tables = []
    lines = [line.split(":") for line in text.split(";")]
    targets = {word[1:] for _, columns in lines for word in columns.split() if word.startswith(">")}
    for head, columns in lines:
        concept = head.split()[-1]
        made = [Column(f"{concept}_key", "key")] if concept in targets else []
        for word in columns.split():
            if word.startswith(">"):
                made.append(Column(f"{word[1:]}_of", "link", target=word[1:]))
            elif word.endswith("#"):
                made.append(Column(word[:-1], "number"))
            elif "=" in word:
                name, _, values = word.partition("=")
                made.append(Column(name, "category", tuple(values.split("|"))))
            else:
                made.append(Column(word, "name"))
        tables.append(TableSpec(concept, tuple(made)))
    return SqlSchema(text.split()[0], tuple(tables))


SCHEMAS = (
    _schema("concerts singer: name age# country=peru|mali|iran|cuba >band; band: title fans# genre=jazz|rock|folk|soul"),
    _schema("school student: surname grade# town=bergen|lyon|bari|graz >course; course: subject credits# level=basic|middle|upper|expert"),
    _schema("shop product: label price# colour=red|blue|green|black >store; store: street rent# region=north|south|east|west; clerk: nickname wage# shift=early|late|night|noon >store"),
    _schema("library book: heading pages# language=latin|greek|hindi|thai >author; author: alias prizes# birthplace=oslo|rome|kyiv|lima"),
)  # fmt: skip
"""Schemas of training."""

HELD_OUT = (
    _schema("airline plane: model seats# maker=acme|bolt|cirro|delta >airport; airport: code gates# state=ohio|utah|iowa|maine"),
    _schema("clinic patient: initials weight# blood=a1|b1|ab1|o1 >doctor; doctor: signature years# field=heart|bone|skin|eye"),
)  # fmt: skip
"""Schemas of the transfer test."""

_NAMES = tuple(
    f"{a}{b}" for a in ("ab", "el", "ir", "ov", "um") for b in ("dan", "kes", "lio", "mar", "net", "ric", "sol", "ton")
)


def identifiers(n: int = 60) -> tuple[str, ...]:
    """``n`` arbitrary words that are no SQL keywords."""
    words = [a + b + c for b in "aeiou" for a in "bdfgklmnprtvz" for c in ("sk", "rn", "lp", "mb")]
    return tuple(words[(k * 37) % len(words)] for k in range(min(n, len(words))))


def practice_schema(rng: np.random.Generator) -> SqlSchema:
    """The form of a training schema with arbitrary concepts of all schemas, held-out ones included, in its places."""
    base = SCHEMAS[int(rng.integers(len(SCHEMAS)))]
    pools: dict[str, list[str]] = {}
    for schema in (*SCHEMAS, *HELD_OUT):
        for table in schema.tables:
            pools.setdefault("table", []).append(table.concept)
            for column in table.columns:
                pools.setdefault(column.kind, []).append(column.concept)
    drawn = {kind: [words[k] for k in rng.permutation(len(words))] for kind, words in pools.items()}
    renamed = {t.concept: drawn["table"].pop() for t in base.tables}
    tables = []
    for table in base.tables:
        columns = []
        for c in table.columns:
            # A key and the links to it belong to their table's word.
            target = renamed.get(c.target, "")
            own = {"key": f"{renamed[table.concept]}_key", "link": f"{target}_of"}.get(c.kind) or drawn[c.kind].pop()
            columns.append(Column(own, c.kind, c.values, target))
        tables.append(TableSpec(renamed[table.concept], tuple(columns)))
    return SqlSchema("practice", tuple(tables))


@dataclass(frozen=True)
class SqlDatabase:
    """A schema with identifiers, and two fills.

    Args:
        schema: in concepts.
        names: concept to identifier.
        seed: of the rows.
    """

    schema: SqlSchema
    names: Mapping[str, str]
    seed: int

    @classmethod
    def draw(cls, schema: SqlSchema, rng: np.random.Generator) -> SqlDatabase:
        """One with random identifiers.

        Raises:
            ConfigError: the schema has more concepts than there are identifiers.
        """
        pool, concepts = identifiers(), schema.concepts
        if len(concepts) > len(pool):
            raise ConfigError(f"schema {schema.name!r} has {len(concepts)} concepts for {len(pool)} identifiers")
        chosen = [pool[k] for k in rng.choice(len(pool), len(concepts), replace=False)]
        return cls(schema, dict(zip(concepts, chosen, strict=True)), int(rng.integers(2**31)))

    @property
    def columns(self) -> dict[str, list[str]]:
        """Identifiers of tables to those of their columns, as schema rewards take it."""
        return {
            self.names[t.concept]: [self.names[c.concept] for c in t.columns] for t in self.schema.tables
        }  # fmt: skip

    def image(self, fill: int = 0) -> bytes:
        """The bytes of an SQLite file with 10 to 40 rows in each table; ``fill`` chooses the rows."""
        return _image(self.schema, tuple(sorted(self.names.items())), self.seed, fill)

    def ddl(self) -> list[str]:
        """CREATE TABLE statements."""
        out = []
        for table in self.schema.tables:
            columns = [
                f"{self.names[c.concept]} {'TEXT' if c.kind in ('name', 'category') else 'INTEGER'}"
                + (" PRIMARY KEY" if c.kind == "key" else "")
                for c in table.columns
            ]
            out.append(f"CREATE TABLE {self.names[table.concept]} ({', '.join(columns)})")
        return out


@lru_cache(maxsize=4096)
def _image(schema: SqlSchema, names: tuple[tuple[str, str], ...], seed: int, fill: int) -> bytes:
    rng = np.random.default_rng([seed, fill])
    database = SqlDatabase(schema, dict(names), seed)
    sizes = {t.concept: int(rng.integers(10, 41)) for t in schema.tables}
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute("PRAGMA page_size = 512")
        for table, statement in zip(schema.tables, database.ddl(), strict=True):
            connection.execute(statement)
            rows = [[_value(c, k, sizes, rng) for c in table.columns] for k in range(sizes[table.concept])]
            marks = ", ".join("?" * len(table.columns))
            connection.executemany(f"INSERT INTO {database.names[table.concept]} VALUES ({marks})", rows)
        connection.commit()
        return connection.serialize()
    finally:
        connection.close()


def _value(column: Column, row: int, sizes: Mapping[str, int], rng: np.random.Generator) -> Any:
    if column.kind == "key":
        return row + 1
    if column.kind == "link":
        return int(rng.integers(sizes[column.target])) + 1
    if column.kind == "number":
        return int(rng.integers(1, 100))
    pool: Sequence[str] = column.values if column.kind == "category" else _NAMES
    return pool[int(rng.integers(len(pool)))]
