"""Runs a batch of queries inside the sandbox: every database is opened once, queries follow one another.

This file's text is the program of a sandboxed job; it imports the standard library alone. Standard input is JSON:
``databases`` (key to the image in hexadecimal), ``queries`` (pairs of key and statement), ``seconds`` that one query may
take here, and ``max_rows``. Each query is answered by one line: ``["ok", columns, rows]``, ``["error", text]``, or
``["slow"]`` where it should be run alone. A query that ends the process leaves its line out.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from typing import Any

_READING = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
_STRIDE = 10_000  # virtual machine steps between two looks at the clock


def open_image(image: bytes) -> sqlite3.Connection:
    """A connection to a copy in memory, which can only read."""
    connection = sqlite3.connect(":memory:")
    connection.deserialize(image)
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    connection.execute("PRAGMA query_only = ON")
    connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY)
    return connection


def answer(connection: sqlite3.Connection, sql: str, seconds: float, max_rows: int) -> list[Any]:
    """The line of one query."""
    end = time.monotonic() + seconds
    connection.set_progress_handler(lambda: time.monotonic() > end, _STRIDE)
    try:
        cursor = connection.execute(sql)
        if cursor.description is None:
            return ["error", "the statement returns no rows; write a SELECT"]
        rows = cursor.fetchmany(max_rows + 1)
        cursor.close()
    except MemoryError:
        return ["slow"]
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        slow = str(error) == "interrupted"
        return ["slow"] if slow else ["error", f"{type(error).__module__}.{type(error).__name__}: {error}"]
    if len(rows) > max_rows:
        return ["error", f"the query returns more than {max_rows} rows"]
    return ["ok", [c[0] for c in cursor.description], [[_out(v) for v in row] for row in rows]]


def _out(value: Any) -> Any:
    return {"hex": value.hex()} if isinstance(value, bytes) else value


def main() -> None:
    """Answer what stands on standard input."""
    job = json.loads(sys.stdin.read())
    connections: dict[str, Any] = {}
    for key, sql in job["queries"]:
        if key not in connections:
            try:
                connections[key] = open_image(bytes.fromhex(job["databases"][key]))
            except sqlite3.Error as error:
                connections[key] = f"{type(error).__module__}.{type(error).__name__}: {error}"
        there = connections[key]
        line = ["error", there] if isinstance(there, str) else answer(there, sql, job["seconds"], job["max_rows"])
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
