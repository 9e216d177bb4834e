"""Every call, with its tokens, money, latency and outcome; nothing is paid that is not in it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from guerdon.errors import DataError, PoolError
from guerdon.routing.member import Reply
from guerdon.types import Usage

__all__ = ["Entry", "Ledger", "nano_usd", "read_ledger"]


def nano_usd(usd: float) -> int:
    """USD as whole billionths. Sums of these are exact and do not depend on the order of the calls."""
    return round(usd * 1_000_000_000)


@dataclass(frozen=True, slots=True)
class Entry:
    """One call, as it was booked."""

    time: float
    trajectory_id: str | None
    member: str
    answered_by: str
    model: str | None
    outcome: str
    input_tokens: int
    output_tokens: int
    usage_estimated: bool
    nano_usd: int
    input_price: float
    output_price: float
    price_date: str | None
    latency_s: float
    attempts: int
    cached: bool
    error: str | None

    @property
    def usd(self) -> float:
        """What it cost."""
        return self.nano_usd / 1e9


@dataclass(slots=True)
class _Sum:
    calls: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    nano_usd: int = 0
    seconds: float = 0.0

    def add(self, entry: Entry) -> None:
        self.calls += 1
        self.failed += entry.outcome != "ok"
        self.input_tokens += entry.input_tokens
        self.output_tokens += entry.output_tokens
        self.nano_usd += entry.nano_usd
        self.seconds += entry.latency_s

    def usage(self) -> Usage:
        return Usage(self.calls, self.input_tokens, self.output_tokens, self.nano_usd / 1e9, self.seconds)


class Ledger:
    """The book of a pool.

    Args:
        path: append every entry to this JSONL file as one flushed line; ``None`` keeps sums and entries in
            memory only. A line that a crash tore off is skipped by :func:`read_ledger`.
        keep: how many entries stay in memory (sums are of all of them); ``None`` for all.
        by_trajectory: also keep sums per trajectory. Long-running servers turn it off.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, keep: int | None = None, by_trajectory: bool = True) -> None:
        self.entries: list[Entry] = []
        self._keep = keep
        self._total = _Sum()
        self._members: dict[str, _Sum] = {}
        self._trajectories: dict[str | None, _Sum] | None = {} if by_trajectory else None
        self._file: TextIO | None = None
        if path is not None:
            target = Path(path)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                torn = target.exists() and target.stat().st_size > 0 and not target.read_bytes().endswith(b"\n")
                self._file = target.open("a", encoding="utf-8")
                if torn:
                    self._file.write("\n")
            except OSError as error:
                raise PoolError(f"the ledger {target} cannot be written: {error.strerror or error}") from error

    def book(self, reply: Reply, trajectory_id: str | None = None) -> Entry:
        """Append one call.

        Raises:
            PoolError: the file cannot be written (for example: no space left); the entry is in memory.
        """
        entry = Entry(
            time.time(), trajectory_id, reply.member, reply.answered_by, reply.model, reply.outcome.value,
            reply.input_tokens, reply.output_tokens, reply.usage_estimated, nano_usd(reply.usd), reply.input_price,
            reply.output_price, reply.price_date, reply.latency_s, reply.attempts, reply.cached, reply.error,
        )  # fmt: skip
        self._total.add(entry)
        self._members.setdefault(entry.answered_by, _Sum()).add(entry)
        if self._trajectories is not None:
            self._trajectories.setdefault(trajectory_id, _Sum()).add(entry)
        self.entries.append(entry)
        if self._keep is not None and len(self.entries) > 2 * self._keep:
            del self.entries[: -self._keep]
        if self._file is not None:
            try:
                self._file.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")
                self._file.flush()
            except OSError as error:
                raise PoolError(f"the ledger file cannot be written: {error.strerror or error}") from error
        return entry

    @property
    def total(self) -> Usage:
        """Sum over all calls."""
        return self._total.usage()

    def by_member(self) -> dict[str, Usage]:
        """Sums by the member that answered."""
        return {name: s.usage() for name, s in self._members.items()}

    def of_trajectory(self, trajectory_id: str | None) -> Usage:
        """Sum over the calls of one trajectory."""
        if self._trajectories is None:
            raise PoolError("this ledger keeps no sums per trajectory")
        return self._trajectories.get(trajectory_id, _Sum()).usage()

    def __len__(self) -> int:
        return self._total.calls

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_ledger(path: str | os.PathLike[str]) -> list[Entry]:
    """Read a ledger file; a torn line (a crash in the middle of a write) is left out.

    Raises:
        DataError: the file is absent, or a whole line is not an entry.
    """
    names = {f.name for f in fields(Entry)}
    entries = []
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise DataError(f"the ledger {path} cannot be read: {error.strerror or error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            raw: Mapping[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(raw, dict) or not names <= raw.keys():
            raise DataError(f"{path}, line {number}: not a ledger entry")
        entries.append(Entry(**{k: raw[k] for k in names}))
    return entries
