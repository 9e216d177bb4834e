"""A cache of replies in SQLite, shared by several processes, asked from the event loop without blocking it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from guerdon.errors import PoolError
from guerdon.routing.member import RawReply
from guerdon.types import Message

__all__ = ["ReplyCache"]

T = TypeVar("T")
_SCHEMA = 1
_APPLICATION = 0x67726364  # marks the file as one of ours


class ReplyCache:
    """Maps (endpoint, messages, sampling parameters) to a reply. Keys are exact: a similar question is another one.

    A sampled reply (temperature above 0) is remembered like any other: give calls a seed, or go without a
    cache, where the samples of one question should differ.

    Args:
        path: SQLite file; made where it does not exist.
        timeout_s: how long a write waits for other processes.

    Raises:
        PoolError: the file is no such cache, is damaged, or cannot be opened.
    """

    def __init__(self, path: str | Path, *, timeout_s: float = 10.0) -> None:
        self.path = Path(path)
        self.hits = self.misses = 0
        self._timeout = timeout_s
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="guerdon-cache")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._guard(self._prepare)
        except OSError as error:
            raise PoolError(f"the reply cache {self.path} cannot be made: {error.strerror or error}") from error
        except PoolError:
            self.close()
            raise

    def _prepare(self) -> None:
        db = self._connection()
        # One transaction, so that processes that start together do not see each other's half-made file.
        db.execute("BEGIN IMMEDIATE")
        try:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            owner = db.execute("PRAGMA application_id").fetchone()[0]
            tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if tables and owner != _APPLICATION:
                raise PoolError(f"{self.path} is another program's database; name another file for the reply cache")
            if tables and version != _SCHEMA:
                raise PoolError(
                    f"the reply cache {self.path} has format {version}, this version writes {_SCHEMA}; use another file"
                )
            if not tables:
                db.execute("CREATE TABLE replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL, made REAL NOT NULL)")
                db.execute(f"PRAGMA application_id = {_APPLICATION}")
                db.execute(f"PRAGMA user_version = {_SCHEMA}")
        finally:
            db.execute("COMMIT")

    def _connection(self) -> sqlite3.Connection:
        db = getattr(self._local, "db", None)
        if db is None:
            db = sqlite3.connect(self.path, timeout=self._timeout, isolation_level=None, check_same_thread=False)
            self._connections.append(db)
            self._to_wal(db)
            db.execute("PRAGMA synchronous = NORMAL")
            self._local.db = db
        return db

    def _to_wal(self, db: sqlite3.Connection) -> None:
        # SQLite does not wait for others when it changes the journal mode, whatever the time-out says.
        end = time.monotonic() + self._timeout
        while True:
            try:
                db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def _guard(self, work: Callable[..., T], *args: Any) -> T:
        try:
            return work(*args)
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise PoolError(
                f"the reply cache {self.path} cannot be used ({error}); remove the file or name another one"
            ) from error

    @staticmethod
    def key(identity: str, messages: Sequence[Message], parameters: Mapping[str, Any]) -> str:
        """SHA-256 over all that a reply depends on."""
        text = json.dumps([_SCHEMA, identity, [dict(m) for m in messages], parameters], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    async def get(self, key: str) -> RawReply | None:
        """The reply, or None.

        Raises:
            PoolError: the file cannot be read.
        """
        found = await asyncio.get_running_loop().run_in_executor(self._threads, self._guard, self._get, key)
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
        return found

    def _get(self, key: str) -> RawReply | None:
        row = self._connection().execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return RawReply(**json.loads(row[0])) if row else None

    async def put(self, key: str, reply: RawReply) -> None:
        """Remember a reply; the first one stays where two processes ask at the same time.

        Raises:
            PoolError: the file cannot be written.
        """
        await asyncio.get_running_loop().run_in_executor(self._threads, self._guard, self._put, key, reply)

    def _put(self, key: str, reply: RawReply) -> None:
        fields = {name: getattr(reply, name) for name in RawReply.__dataclass_fields__}
        self._connection().execute(
            "INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", (key, json.dumps(fields), time.time())
        )

    def close(self) -> None:
        """Close the file. Idempotent; it waits for writes under way."""
        self._threads.shutdown(wait=True)
        for db in self._connections:
            db.close()
        self._connections.clear()
