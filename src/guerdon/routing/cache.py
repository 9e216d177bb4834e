"""A cache of replies in SQLite, shared by several processes, asked from the event loop without blocking it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from guerdon.errors import PoolError
from guerdon.routing.member import RawReply
from guerdon.types import Message

__all__ = ["ReplyCache"]

_SCHEMA = 1


class ReplyCache:
    """Maps (endpoint, messages, sampling parameters) to a reply. Keys are exact: a similar question is another one.

    Args:
        path: SQLite file; made where it does not exist.
        timeout_s: how long a write waits for other processes.

    Raises:
        PoolError: the file is no such cache, or cannot be opened.
    """

    def __init__(self, path: str | Path, *, timeout_s: float = 10.0) -> None:
        self.path = Path(path)
        self.hits = self.misses = 0
        self._timeout = timeout_s
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="guerdon-cache")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._guard(self._prepare)

    def _prepare(self) -> None:
        db = self._connection()
        db.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL, made REAL NOT NULL)")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _SCHEMA):
            raise PoolError(f"the reply cache {self.path} has format {version}, this version writes {_SCHEMA}; use another file")
        db.execute(f"PRAGMA user_version = {_SCHEMA}")

    def _connection(self) -> sqlite3.Connection:
        db = getattr(self._local, "db", None)
        if db is None:
            db = sqlite3.connect(self.path, timeout=self._timeout, isolation_level=None, check_same_thread=False)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            self._local.db = db
            self._connections.append(db)
        return db

    def _guard(self, work: Any, *args: Any) -> Any:
        try:
            return work(*args)
        except sqlite3.DatabaseError as error:
            raise PoolError(f"the reply cache {self.path} cannot be used ({error}); remove the file or name another one") from error

    @staticmethod
    def key(identity: str, messages: Sequence[Message], parameters: dict[str, Any]) -> str:
        """SHA-256 over all that a reply depends on."""
        text = json.dumps([_SCHEMA, identity, [dict(m) for m in messages], parameters], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    async def get(self, key: str) -> RawReply | None:
        """The reply, or None."""
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
        """Remember a reply; the first one stays where two processes are equally fast."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self._guard, self._put, key, reply)

    def _put(self, key: str, reply: RawReply) -> None:
        fields = {name: getattr(reply, name) for name in RawReply.__dataclass_fields__}
        self._connection().execute(
            "INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", (key, json.dumps(fields, ensure_ascii=False), time.time())
        )

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._threads.shutdown(wait=True)
        for db in self._connections:
            db.close()
        self._connections.clear()
