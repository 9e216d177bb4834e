"""Bearer keys with money caps and rate limits, kept in SQLite and shared by every worker process.

A request *reserves* its worst case before anything is paid and *settles* what it really used
afterwards. Reserved money counts as spent, so parallel requests cannot together pass a cap, whichever
process serves them: the check and the reservation are one ``BEGIN IMMEDIATE`` transaction.

Each process has one writer thread that owns the connection. It takes whatever requests have queued up
meanwhile and commits them as one batch, so the event loop never waits for the disk and the number of
SQL statements does not grow with concurrency. The database is in WAL mode with ``synchronous=NORMAL``:
a killed process loses nothing; a power cut may lose the last few bookings, never the file.

A process that dies leaves its reservations behind. They go on counting against the cap until another
process sees that their owner has shown no sign of life for ``STALE_S`` seconds; they are then booked
in full, because nobody can know how much of them was used.

Only the SHA-256 of a key is stored. Keys are 256 random bits, so a salt or slow hash adds nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import os
import queue
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guerdon.errors import ConfigError, UnknownName
from guerdon.serve.problems import Problem

__all__ = ["KeyInfo", "KeyStore", "Reservation", "create_key", "digest", "list_keys", "revoke_key"]

STALE_S = 30.0
_BEAT_S = 5.0
_LINGER_S = 0.02
_PICO = 10**12  # money is kept in whole pico-dollars: sums are exact, and a reservation returns to exactly zero
_MAX_USD = 1_000_000.0
_MAX_BATCH = 512

_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY, hash TEXT NOT NULL UNIQUE, name TEXT NOT NULL UNIQUE, created REAL NOT NULL, revoked REAL,
    cap_day INTEGER, cap_month INTEGER, cap_total INTEGER, rpm INTEGER, tpm INTEGER,
    day TEXT NOT NULL DEFAULT '', month TEXT NOT NULL DEFAULT '',
    usd_day INTEGER NOT NULL DEFAULT 0, usd_month INTEGER NOT NULL DEFAULT 0, usd_total INTEGER NOT NULL DEFAULT 0,
    requests REAL, tokens REAL, seen REAL NOT NULL DEFAULT 0,
    calls INTEGER NOT NULL DEFAULT 0, orphaned INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS reservations (
    id TEXT PRIMARY KEY, key TEXT NOT NULL, usd INTEGER NOT NULL, tokens INTEGER NOT NULL,
    day TEXT NOT NULL, month TEXT NOT NULL, owner TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS owners (id TEXT PRIMARY KEY, pid INTEGER NOT NULL, seen REAL NOT NULL) WITHOUT ROWID;
"""
_ROW = (
    "id, hash, name, revoked, cap_day, cap_month, cap_total, rpm, tpm, "
    "day, month, usd_day, usd_month, usd_total, requests, tokens, seen, calls"
)


def digest(key: str | bytes) -> str:
    """What is stored of a key."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """One key as the administrator sees it; money in USD, ``spent_*`` include what is reserved."""

    id: str
    name: str
    created: float
    revoked: float | None
    usd_day: float | None
    usd_month: float | None
    usd_total: float | None
    rpm: int | None
    tpm: int | None
    spent_day: float
    spent_month: float
    spent_total: float
    reserved: float
    calls: int
    orphaned: float


@dataclass(slots=True)
class Reservation:
    """Money and tokens set aside for one request."""

    id: str
    digest: str
    usd: float
    tokens: int


@dataclass(slots=True)
class _Op:
    kind: str  # "check", "reserve", "extend" or "settle"
    digest: str
    id: str = ""
    usd: int = 0
    tokens: int = 0
    future: asyncio.Future[Any] | None = None
    loop: asyncio.AbstractEventLoop | None = None


@dataclass(slots=True)
class _Key:
    """One row of ``keys`` while a batch works on it."""

    id: str
    hash: str
    name: str
    revoked: float | None
    cap_day: int | None
    cap_month: int | None
    cap_total: int | None
    rpm: int | None
    tpm: int | None
    day: str
    month: str
    usd_day: int
    usd_month: int
    usd_total: int
    requests: float | None
    tokens: float | None
    seen: float
    calls: int

    def roll(self, now: float, day: str) -> None:
        """Start new periods and refill the buckets."""
        if self.day != day:
            self.day, self.usd_day = day, 0
        if self.month != day[:7]:
            self.month, self.usd_month = day[:7], 0
        passed = max(0.0, now - self.seen)  # a clock that steps back refills nothing
        if self.rpm is not None:
            self.requests = min(
                self.rpm, (self.rpm if self.requests is None else self.requests) + passed * self.rpm / 60
            )
        if self.tpm is not None:
            self.tokens = min(self.tpm, (self.tpm if self.tokens is None else self.tokens) + passed * self.tpm / 60)
        self.seen = max(now, self.seen)

    def add(self, usd: int) -> None:
        self.usd_day += usd
        self.usd_month += usd
        self.usd_total += usd

    def money_problem(self, usd: int, now: float) -> Problem | None:
        for period, cap, spent in (
            ("day", self.cap_day, self.usd_day),
            ("month", self.cap_month, self.usd_month),
            ("total", self.cap_total, self.usd_total),
        ):
            if cap is not None and spent + usd > cap:
                return Problem(
                    402,
                    "budget_exceeded",
                    f"this request could cost up to ${usd / _PICO:.6f}, but key {self.name!r} has "
                    f"${max(0, cap - spent) / _PICO:.6f} left of its {period} cap of ${cap / _PICO:.6f}; "
                    "lower max_tokens or ask for a higher cap",
                    retry_after=_until_next(period, now),
                )
        return None

    def rate_problem(self, tokens: int) -> Problem | None:
        if self.rpm is not None and (self.requests or 0.0) < 1:
            wait = (1 - (self.requests or 0.0)) * 60 / self.rpm
            return Problem(
                429,
                "rate_limit_exceeded",
                f"key {self.name!r} may make {self.rpm} requests a minute; retry in {wait:.1f} s",
                retry_after=wait,
            )
        if self.tpm is not None and (self.tokens or 0.0) < tokens:
            if tokens > self.tpm:
                return Problem(
                    429,
                    "request_too_large",
                    f"this request may use {tokens} tokens, more than the {self.tpm} a minute of key {self.name!r}; "
                    "lower max_tokens or shorten the messages",
                    param="max_tokens",
                )
            wait = (tokens - (self.tokens or 0.0)) * 60 / self.tpm
            return Problem(
                429,
                "rate_limit_exceeded",
                f"key {self.name!r} may use {self.tpm} tokens a minute, and this request up to {tokens}; "
                f"retry in {wait:.1f} s",
                retry_after=wait,
            )
        return None


def _day(now: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(now))


def _until_next(period: str, now: float) -> float | None:
    """Seconds until a new UTC day or month begins; ``None`` where waiting does not help."""
    if period == "total":
        return None
    t = time.gmtime(now)
    left = 86400 - (t.tm_hour * 3600 + t.tm_min * 60 + t.tm_sec)
    if period == "month":
        following = (t.tm_year + t.tm_mon // 12, t.tm_mon % 12 + 1, 1, 0, 0, 0, 0, 0, 0)
        import calendar

        left = calendar.timegm(following) - int(now)
    return float(max(1, left))


def _connect(path: str | Path) -> sqlite3.Connection:
    try:
        conn = sqlite3.connect(str(path), timeout=10.0, isolation_level=None, check_same_thread=False)
        conn.execute("PRAGMA journal_mode=WAL")
        conn.execute("PRAGMA synchronous=NORMAL")
        conn.execute("PRAGMA wal_autocheckpoint=4000")  # the only moment that waits for the disk: make it rare
        conn.executescript(_SCHEMA)
    except sqlite3.Error as error:
        raise ConfigError(f"--keys {path}: cannot be used as a key store ({error}); give a new file") from error
    with contextlib.suppress(OSError):
        os.chmod(path, 0o600)
    return conn


class KeyStore:
    """The keys of one server process.

    Args:
        path: SQLite file; made when absent.
        clock: seconds since the epoch; injected in tests.

    Use ``async with`` or :meth:`start` and :meth:`aclose`.
    """

    def __init__(self, path: str | Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = Path(path)
        self.owner = secrets.token_hex(8)
        self._clock = clock
        self._queue: queue.SimpleQueue[_Op | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._counter = 0
        self._known: dict[str, float] = {}
        self._unbooked: list[_Op] = []
        self._last_beat = 0.0

    async def __aenter__(self) -> KeyStore:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def start(self) -> None:
        """Open the file and start the writer thread.

        Raises:
            ConfigError: the file is not a key store, or cannot be written.
        """
        if self._thread is None:
            conn = _connect(self.path)
            self._beat(conn, force=True)
            self._thread = threading.Thread(target=self._work, args=(conn,), name="guerdon-keys", daemon=True)
            self._thread.start()

    async def aclose(self) -> None:
        """Book what is queued and stop the thread. Idempotent."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            self._queue.put(None)
            await asyncio.get_running_loop().run_in_executor(None, thread.join)

    async def check(self, key_digest: str) -> None:
        """Return when the key exists and is not revoked; answers are remembered for a second.

        Raises:
            Problem: 401.
        """
        now = time.monotonic()
        if self._known.get(key_digest, 0.0) > now:
            return
        await self._ask(_Op("check", key_digest))
        if len(self._known) > 10_000:
            self._known.clear()
        self._known[key_digest] = now + 1.0

    async def reserve(self, key_digest: str, *, usd: float, tokens: int) -> Reservation:
        """Count one request and set its worst case aside.

        Raises:
            Problem: 401 for an unknown or revoked key, 402 over a money cap, 429 over a rate limit, 503
                when the file cannot be written.
        """
        self._counter += 1
        reservation = Reservation(f"{self.owner}-{self._counter}", key_digest, usd, tokens)
        await self._ask(_Op("reserve", key_digest, reservation.id, _pico(usd), tokens))
        return reservation

    async def extend(self, reservation: Reservation, *, usd: float) -> None:
        """Set ``usd`` more aside for the same request.

        Raises:
            Problem: 402 over a money cap.
        """
        await self._ask(_Op("extend", reservation.digest, reservation.id, _pico(usd)))
        reservation.usd += usd

    def settle(self, reservation: Reservation, *, usd: float, tokens: int) -> None:
        """Book what was used and free the rest. Returns at once; the writer thread does it in order."""
        self._queue.put(_Op("settle", reservation.digest, reservation.id, _pico(usd), tokens))

    async def flush(self) -> None:
        """Return when everything queued so far has been committed."""
        with contextlib.suppress(Problem):
            await self._ask(_Op("check", ""))

    async def _ask(self, op: _Op) -> None:
        if self._thread is None:
            raise Problem(503, "keys_closed", "the server is shutting down", retry_after=1)
        op.loop = asyncio.get_running_loop()
        op.future = op.loop.create_future()
        self._queue.put(op)
        await op.future

    # ---- the writer thread ----

    def _work(self, conn: sqlite3.Connection) -> None:
        try:
            closing = False
            while not closing:
                ops, closing = self._drain()
                self._commit(conn, ops)
            with contextlib.suppress(sqlite3.Error):
                conn.execute("DELETE FROM owners WHERE id = ?", (self.owner,))
        finally:
            conn.close()

    def _drain(self) -> tuple[list[_Op], bool]:
        """Wait for work, then take all of it; what could not be booked before goes first.

        Nobody waits for a settlement, so settlements alone linger a little: the next reservation then
        takes them along, and a lone client costs one transaction a request instead of two.
        """
        ops = self._unbooked
        self._unbooked = []
        until = time.monotonic() + (1.0 if ops else _BEAT_S)
        lone = awaited = False
        while len(ops) < _MAX_BATCH:
            try:
                op = (
                    self._queue.get_nowait() if awaited else self._queue.get(timeout=max(0.0, until - time.monotonic()))
                )
            except queue.Empty:
                break
            if op is None:
                return ops, True
            ops.append(op)
            awaited = awaited or op.future is not None
            if not lone:
                lone, until = True, time.monotonic() + _LINGER_S
        return ops, False

    def _commit(self, conn: sqlite3.Connection, ops: list[_Op]) -> None:
        try:
            self._beat(conn)
            answers = self._apply(conn, ops) if ops else []
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                conn.execute("ROLLBACK")
            # Nothing was written. Callers are refused, since what cannot be booked must not be spent;
            # settlements are kept and tried again.
            self._unbooked = [op for op in ops if op.future is None]
            answers = [
                Problem(503, "keys_unavailable", f"the key store cannot be written ({error})", retry_after=1)
            ] * len(ops)
        waiting: dict[asyncio.AbstractEventLoop, list[tuple[_Op, Problem | None]]] = {}
        for op, answer in zip(ops, answers, strict=True):
            if op.loop is not None:
                waiting.setdefault(op.loop, []).append((op, answer))
        for loop, results in waiting.items():
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(self._deliver, results)

    def _deliver(self, results: list[tuple[_Op, Problem | None]]) -> None:
        for op, answer in results:
            future = op.future
            assert future is not None
            if future.cancelled():
                # Its caller went away before it could know the reservation: free it again.
                if op.kind == "reserve" and answer is None:
                    self._queue.put(_Op("settle", op.digest, op.id))
            elif answer is None:
                future.set_result(None)
            else:
                future.set_exception(answer)

    def _apply(self, conn: sqlite3.Connection, ops: list[_Op]) -> list[Problem | None]:
        now = self._clock()
        today = _day(now)
        conn.execute("BEGIN IMMEDIATE")
        hashes = json.dumps(list({op.digest for op in ops}))
        rows = conn.execute(f"SELECT {_ROW} FROM keys WHERE hash IN (SELECT value FROM json_each(?))", (hashes,))
        keys = {row[1]: _Key(*row) for row in rows.fetchall()}
        for known in keys.values():
            known.roll(now, today)
        held = _held(conn, [op.id for op in ops if op.kind in ("settle", "extend")])
        new: dict[str, list[Any]] = {}
        gone: list[str] = []
        answers: list[Problem | None] = []
        for op in ops:
            key = keys.get(op.digest)
            if op.kind == "settle":
                _settle(op, key, held, gone)
                answers.append(None)
            elif key is None or key.revoked is not None:
                what = "unknown" if key is None else "revoked"
                answers.append(Problem(401, "invalid_api_key", f"this API key is {what}; ask for a valid one"))
            elif op.kind == "check":
                answers.append(None)
            elif op.kind == "reserve":
                problem = key.rate_problem(op.tokens) or key.money_problem(op.usd, now)
                if problem is None:
                    key.add(op.usd)
                    key.calls += 1
                    if key.rpm is not None:
                        key.requests = (key.requests or 0.0) - 1
                    if key.tpm is not None:
                        key.tokens = (key.tokens or 0.0) - op.tokens
                    new[op.id] = [op.id, key.id, op.usd, op.tokens, today, today[:7], self.owner]
                answers.append(problem)
            else:
                row = held.get(op.id)
                if row is None:
                    problem = Problem(503, "reservation_lost", "the server was suspended for too long", retry_after=1)
                else:
                    problem = key.money_problem(op.usd, now)
                if problem is None and row is not None:
                    key.add(op.usd)
                    # From now on the whole reservation counts in the period in which it grew.
                    _move(key, row, today)
                    row[2] += op.usd
                    new[op.id] = row
                answers.append(problem)
        changed = [
            [k.id, k.day, k.month, k.usd_day, k.usd_month, k.usd_total, k.requests, k.tokens, k.seen, k.calls]
            for k in keys.values()
        ]
        conn.execute(_UPDATE, (json.dumps(changed),))
        if new:
            conn.execute(_INSERT, (json.dumps(list(new.values())),))
        if gone:
            conn.execute("DELETE FROM reservations WHERE id IN (SELECT value FROM json_each(?))", (json.dumps(gone),))
        conn.execute("COMMIT")
        return answers

    def _beat(self, conn: sqlite3.Connection, force: bool = False) -> None:
        """Show that this process lives, and book what dead ones have left."""
        now = self._clock()
        if not force and abs(now - self._last_beat) < _BEAT_S:
            return
        conn.execute("BEGIN IMMEDIATE")
        conn.execute("INSERT OR REPLACE INTO owners VALUES (?, ?, ?)", (self.owner, os.getpid(), now))
        dead = "owner NOT IN (SELECT id FROM owners WHERE seen >= ?)"
        conn.execute(
            "UPDATE keys SET orphaned = orphaned + (SELECT coalesce(sum(usd), 0) FROM reservations"
            f" WHERE key = keys.id AND {dead})",
            (now - STALE_S,),
        )
        conn.execute(f"DELETE FROM reservations WHERE {dead}", (now - STALE_S,))
        conn.execute("DELETE FROM owners WHERE seen < ?", (now - STALE_S,))
        conn.execute("COMMIT")
        self._last_beat = now


_UPDATE = """
UPDATE keys SET day = json_extract(j.value, '$[1]'), month = json_extract(j.value, '$[2]'),
    usd_day = json_extract(j.value, '$[3]'), usd_month = json_extract(j.value, '$[4]'),
    usd_total = json_extract(j.value, '$[5]'), requests = json_extract(j.value, '$[6]'),
    tokens = json_extract(j.value, '$[7]'), seen = json_extract(j.value, '$[8]'), calls = json_extract(j.value, '$[9]')
FROM json_each(?) AS j WHERE keys.id = json_extract(j.value, '$[0]')
"""
_INSERT = """
INSERT OR REPLACE INTO reservations
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
    json_extract(value, '$[3]'), json_extract(value, '$[4]'), json_extract(value, '$[5]'), json_extract(value, '$[6]')
FROM json_each(?)
"""


def _held(conn: sqlite3.Connection, ids: list[str]) -> dict[str, list[Any]]:
    """The reservations with these ids, read in one step however many they are."""
    if not ids:
        return {}
    (text,) = conn.execute(
        "SELECT json_group_array(json_array(id, key, usd, tokens, day, month, owner)) FROM reservations"
        " WHERE id IN (SELECT value FROM json_each(?))",
        (json.dumps(ids),),
    ).fetchone()
    return {row[0]: row for row in json.loads(text)}


def _settle(op: _Op, key: _Key | None, held: dict[str, list[Any]], gone: list[str]) -> None:
    row = held.pop(op.id, None)
    if row is None or key is None:
        return  # settled before, or already booked in full because this process seemed dead
    gone.append(op.id)
    _, _, usd, tokens, day, month, _ = row
    change = op.usd - usd
    key.usd_total += change
    if key.day == day:
        key.usd_day += change
    if key.month == month:
        key.usd_month += change
    if key.tpm is not None:
        key.tokens = min(key.tpm, (key.tokens or 0.0) + tokens - op.tokens)


def _move(key: _Key, row: list[Any], today: str) -> None:
    if row[4] != today:
        key.usd_day += row[2]
        row[4] = today
    if row[5] != today[:7]:
        key.usd_month += row[2]
        row[5] = today[:7]


def _pico(usd: float) -> int:
    """Whole pico-dollars, rounded up: never less than what was asked for."""
    return math.ceil(usd * _PICO)


# ---- administration: short synchronous transactions, for the command line ----


def create_key(
    path: str | Path,
    name: str,
    *,
    usd_day: float | None = None,
    usd_month: float | None = None,
    usd_total: float | None = None,
    rpm: int | None = None,
    tpm: int | None = None,
) -> str:
    """Make a key and return it; it is never shown again, since only its hash is stored.

    Args:
        usd_day: most USD per UTC day; likewise per month, and for ever.
        rpm: requests per minute (a bucket of that size, refilled continuously).
        tpm: tokens per minute, input and output together.

    Raises:
        ConfigError: a name that is taken, or a cap out of range.
    """
    if not name or len(name) > 100:
        raise ConfigError(f"a key needs a name of 1 to 100 characters, got {len(name)}")
    caps = {"usd_day": usd_day, "usd_month": usd_month, "usd_total": usd_total}
    for cap, usd in caps.items():
        if usd is not None and not 0 <= usd <= _MAX_USD:
            raise ConfigError(f"{cap} must be from 0 to {_MAX_USD:,.0f} USD, got {usd}")
    for limit, count in {"rpm": rpm, "tpm": tpm}.items():
        if count is not None and count < 1:
            raise ConfigError(f"{limit} must be at least 1, got {count}")
    key = f"gd-{secrets.token_urlsafe(32)}"
    money = [None if usd is None else round(usd * _PICO) for usd in caps.values()]
    with contextlib.closing(_connect(path)) as conn:
        try:
            conn.execute(
                "INSERT INTO keys (id, hash, name, created, cap_day, cap_month, cap_total, rpm, tpm)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (secrets.token_hex(4), digest(key), name, time.time(), *money, rpm, tpm),
            )
        except sqlite3.IntegrityError:
            raise ConfigError(f"a key named {name!r} exists already; choose another name") from None
    return key


def list_keys(path: str | Path) -> list[KeyInfo]:
    """All keys, oldest first.

    Raises:
        ConfigError: there is no such file, or it is not a key store.
    """
    if not Path(path).exists():
        raise ConfigError(f"no key store at {path}; `guerdon keys create` makes one")
    today = _day(time.time())
    with contextlib.closing(_connect(path)) as conn:
        rows = conn.execute(
            "SELECT id, name, created, revoked, cap_day, cap_month, cap_total, rpm, tpm,"
            " iif(day = ?, usd_day, 0), iif(month = ?, usd_month, 0), usd_total,"
            " (SELECT coalesce(sum(usd), 0) FROM reservations WHERE key = keys.id), calls, orphaned"
            " FROM keys ORDER BY created, id",
            (today, today[:7]),
        ).fetchall()
    money = {4, 5, 6, 9, 10, 11, 12, 14}
    return [KeyInfo(*(v / _PICO if i in money and v is not None else v for i, v in enumerate(row))) for row in rows]


def revoke_key(path: str | Path, key: str) -> None:
    """Refuse a key, given by name or id, from now on (running servers notice within a second).

    Raises:
        UnknownName: no such key.
    """
    known = list_keys(path)
    if not any(key in (k.id, k.name) for k in known):
        names = ", ".join(k.name for k in known) or "none"
        raise UnknownName(f"no key {key!r} in {path}; there are: {names}")
    with contextlib.closing(_connect(path)) as conn:
        conn.execute("UPDATE keys SET revoked = coalesce(revoked, ?) WHERE id = ? OR name = ?", (time.time(), key, key))
