"""Runs queries against SQLite databases in the sandbox, and remembers what they returned."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sqlite3
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from guerdon.errors import ConfigError, DataError
from guerdon.rewards.sql_items import first_statement
from guerdon.sandbox import Job, Limits, Result, Status, default_sandbox

__all__ = ["Database", "SQLExecutor", "SqlResult"]

Database = str | os.PathLike[str] | bytes | sqlite3.Connection
"""A file's path, the bytes of such a file (an image, as ``connection.serialize()`` gives it), or a connection."""

_IMAGE = 1 << 20
"""Images up to this size travel with a batch of queries; larger ones are written to a file, and a query is a job."""
_BATCH = 512
_CELLS = 2_000_000
_BROKEN = frozenset(
    {
        "sqlite3.OperationalError: database is locked",
        "sqlite3.DatabaseError: file is not a database",
        "sqlite3.DatabaseError: database disk image is malformed",
    }
)
"""Errors that are the database's and not the query's."""


@dataclass(frozen=True, slots=True)
class SqlResult:
    """Rows of a query, or one line that says why there are none; ``timeout`` where a limit of time ended it."""

    rows: tuple[tuple[Any, ...], ...] = ()
    columns: tuple[str, ...] = ()
    error: str | None = None
    timeout: bool = False

    @property
    def ok(self) -> bool:
        """Whether it ran."""
        return self.error is None


@dataclass(frozen=True, slots=True)
class _Place:
    """A database with the name of its present content."""

    key: str
    path: str = ""
    image: bytes = b""

    def __str__(self) -> str:
        return Path(self.path).name if self.path else "the database in memory"


class SQLExecutor:
    """Runs single read-only statements against SQLite databases.

    Args:
        timeout: seconds of one query.
        max_rows: a query with more rows is an error.
        memory_mb: of one query.
        cache: how many results are remembered, of gold queries and of others each.

    A database is a file's path, the bytes of such a file, or an ``sqlite3`` connection, of whose present content a copy
    is queried. Of several statements only the first is run; writing statements are errors. A result is remembered by the
    database (for a file its path and time of change) and the statement, a time-out too, so that every reward sees the
    same one. Queries of small images are run many to a process (:meth:`run_many`), at a fraction of the cost.
    """

    def __init__(
        self, timeout: float = 30.0, max_rows: int = 100_000, *, memory_mb: int = 512, cache: int = 10_000
    ) -> None:
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
            raise ConfigError(f"timeout must be a positive number of seconds, got {timeout!r}")
        if max_rows < 1:
            raise ConfigError(f"max_rows must be at least 1, got {max_rows}")
        if cache < 1:
            raise ConfigError(f"cache must be at least 1, got {cache}")
        self.timeout, self.max_rows = float(timeout), max_rows
        self._limits = Limits(cpu_s=math.ceil(timeout), wall_s=timeout, memory_mb=memory_mb, output_bytes=1 << 26)
        self._gold, self._seen = _Memory(cache), _Memory(cache)
        self._lock = threading.Lock()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, db: Database, sql: str) -> SqlResult:
        """Run the first statement of ``sql``.

        Raises:
            ConfigError: the database does not exist or may not be read.
            DataError: it is locked or no SQLite database, so that nothing can be said about the query.
        """
        return self.run_many([(db, sql)])[0]

    def run_many(self, queries: Sequence[tuple[Database, str]]) -> list[SqlResult]:
        """:meth:`run` for pairs of database and text, in order, with as few processes as possible."""
        places = [self._place(db) for db, _ in queries]
        found = self._run([(place, first_statement(sql)) for place, (_, sql) in zip(places, queries, strict=True)])
        for place, result in zip(places, found, strict=True):
            if result.error in _BROKEN:
                raise DataError(f"{place} cannot be queried: {result.error}")
        return found

    def prefetch(self, queries: Sequence[tuple[Database, str]]) -> None:
        """Run queries together and remember the results; what cannot be queried is left to :meth:`run` to report."""
        wanted = []
        for db, sql in queries:
            with contextlib.suppress(DataError):
                wanted.append((self._place(db), first_statement(sql)))
        self._run(wanted)

    def gold(self, db: Database, sql: str) -> SqlResult:
        """:meth:`run` for a gold query; its result is not pushed out by those of candidates.

        Raises:
            DataError: the query does not run: a gold query that fails is a mistake in the data.
        """
        place = self._place(db)
        found = self._gold.get((place.key, sql))
        if found is None:
            found = self._run([(place, first_statement(sql))])[0]
            if not found.ok:
                raise DataError(f"the gold query {sql[:80]!r} does not run on {place}: {found.error}")
            self._gold.put((place.key, sql), found)
        return found

    def _run(self, queries: Sequence[tuple[_Place, str]]) -> list[SqlResult]:
        """Results in order; each query that is not remembered is run once."""
        found: dict[tuple[str, str], SqlResult] = {}
        waiting: dict[tuple[str, str], _Place] = {}
        for place, statement in queries:
            key = (place.key, statement)
            known = SqlResult(error="the query is empty") if not statement else self._seen.get(key)
            if known is not None:
                found[key] = known
            else:
                waiting[key] = place
        alone = [key for key, place in waiting.items() if place.path]
        together = [key for key, place in waiting.items() if not place.path]
        while together:
            part = together[:_BATCH]
            done = self._batch(part, waiting)
            found.update({key: result for key, result in zip(part, done, strict=False) if result is not None})
            alone += [key for key, result in zip(part, done, strict=False) if result is None]
            if len(done) < len(part):
                # The next query ended the process, or its time ran out: it gets a process and limits of its own.
                alone.append(part[len(done)])
            together = together[min(len(done) + 1, len(part)) :]
        if alone:
            jobs = [self._job(key[1], waiting[key]) for key in alone]
            sandbox = default_sandbox()
            reports = sandbox.map(jobs) if len(jobs) > 1 else [sandbox.run(jobs[0])]
            found.update({key: _single(report) for key, report in zip(alone, reports, strict=True)})
        for key in waiting:
            if found[key].error not in _BROKEN:
                self._seen.put(key, found[key])
        return [found[place.key, statement] for place, statement in queries]

    def _batch(self, keys: Sequence[tuple[str, str]], places: dict[tuple[str, str], _Place]) -> list[SqlResult | None]:
        """Results of the first so many queries; None where one should run alone."""
        message = {
            "databases": {key[0]: places[key].image.hex() for key in keys},
            "queries": [[name, sql.encode("utf-8", "replace").decode()] for name, sql in keys],
            "seconds": min(1.0, self.timeout / 2),
            "max_rows": self.max_rows,
        }
        report = default_sandbox().run(Job(_runner(), "program", json.dumps(message), limits=self._limits))
        out: list[SqlResult | None] = []
        for line in report.stdout.split("\n")[:-1]:
            kind, *rest = json.loads(line)
            if kind == "slow":
                out.append(None)
            elif kind == "error":
                out.append(SqlResult(error=rest[0]))
            else:
                out.append(SqlResult(tuple(tuple(_in(v) for v in row) for row in rest[1]), tuple(rest[0])))
        return out

    def _job(self, statement: str, place: _Place) -> Job:
        path = place.path or self._file(place)
        return Job(statement, "sql", database=path, max_rows=self.max_rows, limits=self._limits)

    def _place(self, db: Database) -> _Place:
        if isinstance(db, str | os.PathLike):
            path = os.fspath(db)
            if not os.path.isfile(path):
                raise ConfigError(f"database {path!r} does not exist; give the path of an SQLite file")
            if not os.access(path, os.R_OK):
                raise ConfigError(f"database {path!r} may not be read by this user; change its permissions")
            return _Place(f"{path}:{os.stat(path).st_mtime_ns}", path)
        if not isinstance(db, bytes | sqlite3.Connection):
            raise DataError(f"a database is a path, bytes or an sqlite3 connection, got {type(db).__name__}")
        image = db if isinstance(db, bytes) else db.serialize()
        place = _Place(hashlib.sha256(image).hexdigest()[:24], image=image)
        return place if len(image) <= _IMAGE else _Place(place.key, self._file(place))

    def _file(self, place: _Place) -> str:
        with self._lock:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="guerdon-sql-")
            path = Path(self._folder.name) / f"{place.key}.sqlite"
            if not path.exists():
                path.write_bytes(place.image)
            return str(path)


def _single(report: Result) -> SqlResult:
    if not report.ok or not report.values:
        stopped = report.status in (Status.TIMEOUT, Status.CPU)
        return SqlResult(error=report.error or "the query gave no rows", timeout=stopped)
    columns, rows = report.values[0][1]
    return SqlResult(tuple(tuple(r) for r in rows), tuple(columns))


def _in(value: Any) -> Any:
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) else value


@cache
def _runner() -> str:
    return Path(__file__).with_name("sql_runner.py").read_text(encoding="utf-8")


class _Memory:
    """Results by key: the latest so many, and the latest so many cells."""

    def __init__(self, most: int) -> None:
        self._most, self._cells = most, 0
        self._kept: OrderedDict[tuple[str, str], SqlResult] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str]) -> SqlResult | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: tuple[str, str], result: SqlResult) -> None:
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = result
            self._cells += _size(result)
            while len(self._kept) > 1 and (len(self._kept) > self._most or self._cells > _CELLS):
                self._cells -= _size(self._kept.popitem(last=False)[1])


def _size(result: SqlResult) -> int:
    return len(result.rows) * max(1, len(result.columns))
