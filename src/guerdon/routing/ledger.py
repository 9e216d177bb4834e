"""Every call, with its tokens, money, latency and outcome; nothing is paid that is not in it.

Money is booked in whole billionths of a dollar. Their sums are exact whatever the order of the calls, so the
ledger and the trajectories agree to the last digit; a float in USD is only made for display.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from guerdon.errors import DataError, PoolError
from guerdon.routing.lines import LineWriter, read_lines
from guerdon.routing.member import Charge, Outcome, Reply
from guerdon.types import Usage

__all__ = ["UNKNOWN", "Entry", "Ledger", "nano_usd", "read_ledger"]

UNKNOWN = "(unknown)"
"""Stands in the sums by member for all names that no member has; a policy may invent any number of them."""


def nano_usd(usd: float) -> int:
    """USD as whole billionths."""
    return round(usd * 1_000_000_000)


class Entry(NamedTuple):
    """One call, as it was booked; see :class:`~guerdon.routing.member.Reply` for the fields.

    ``charges`` lists what each member was paid where more than one was: ``(member, model, input tokens,
    output tokens, billionths of a dollar)``.
    """

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
    charges: tuple[Charge, ...] = ()

    @property
    def usd(self) -> float:
        """What it cost."""
        return self.nano_usd / 1e9


class _Sum:
    __slots__ = ("calls", "failed", "input_tokens", "nano_usd", "output_tokens", "seconds")

    def __init__(self) -> None:
        self.calls = self.failed = self.input_tokens = self.output_tokens = self.nano_usd = 0
        self.seconds = 0.0

    def add(self, failed: bool, input_tokens: int, output_tokens: int, nano: int, seconds: float) -> None:
        self.calls += 1
        self.failed += failed
        self.input_tokens += input_tokens
        self.output_tokens += output_tokens
        self.nano_usd += nano
        self.seconds += seconds

    def pay(self, charge: Charge) -> None:
        self.input_tokens += charge.input_tokens
        self.output_tokens += charge.output_tokens
        self.nano_usd += charge.nano_usd

    def usage(self) -> Usage:
        return Usage(self.calls, self.input_tokens, self.output_tokens, self.nano_usd / 1e9, self.seconds)


class Ledger:
    """The book of a pool.

    Args:
        path: append every entry to this JSONL file, each in one write, as soon as the call is over; ``None``
            keeps the book in memory only.
        keep: how many entries stay in memory (sums are of all of them); ``None`` for all.
        by_trajectory: also keep sums per trajectory. Long-running servers turn it off.

    Raises:
        PoolError: the file cannot be opened.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        keep: int | None = 10_000,
        by_trajectory: bool = True,
    ) -> None:
        self.entries: deque[Entry] = deque(maxlen=keep)
        self._total = _Sum()
        self._members: dict[str, _Sum] = {}
        self._trajectories: dict[str | None, _Sum] | None = {} if by_trajectory else None
        self._path = path
        self._file: LineWriter | None = None
        self._waiting: list[bytes] = []
        self._problem: OSError | None = None
        if path is not None:
            try:
                self._file = LineWriter(path)
            except OSError as error:
                raise PoolError(f"the ledger {path} cannot be written: {error.strerror or error}") from error

    def ready(self) -> None:
        """Make sure that the next call can be booked; asked before each one is paid.

        Raises:
            PoolError: rows could not be written (for example because no space is left). They are kept in
                memory and written as soon as that is possible.
        """
        if self._waiting and not self._write():
            why = getattr(self._problem, "strerror", None) or self._problem
            raise PoolError(
                f"the ledger {self._path} cannot be written ({why}); {len(self._waiting)} rows wait in memory, "
                "and no further call is paid before they are written"
            )

    def book(self, reply: Reply, trajectory_id: str | None = None) -> Entry:
        """Append one call. It never fails: a row that cannot be written waits, and :meth:`ready` reports it."""
        nano = nano_usd(reply.usd)
        entry = Entry(
            time.time(), trajectory_id, reply.member, reply.answered_by, reply.model, reply.outcome.value,
            reply.input_tokens, reply.output_tokens, reply.usage_estimated, nano, reply.input_price,
            reply.output_price, reply.price_date, reply.latency_s, reply.attempts, reply.cached, reply.error,
            reply.charges,
        )  # fmt: skip
        failed = reply.outcome is not Outcome.OK
        row = (failed, reply.input_tokens, reply.output_tokens, nano, reply.latency_s)
        self._total.add(*row)
        answered = UNKNOWN if reply.outcome is Outcome.UNKNOWN_MEMBER else reply.answered_by
        if reply.charges:
            # The call counts for the one that answered, the money for each that was paid.
            self._sum(answered).add(failed, 0, 0, 0, reply.latency_s)
            for charge in reply.charges:
                self._sum(charge.member).pay(charge)
        else:
            self._sum(answered).add(*row)
        if self._trajectories is not None:
            found = self._trajectories.get(trajectory_id)
            if found is None:
                found = self._trajectories[trajectory_id] = _Sum()
            found.add(*row)
        self.entries.append(entry)
        if self._file is not None:
            self._waiting.append(json.dumps(entry._asdict()).encode() + b"\n")
            self._write()
        return entry

    def _sum(self, member: str) -> _Sum:
        found = self._members.get(member)
        if found is None:
            found = self._members[member] = _Sum()
        return found

    def _write(self) -> bool:
        assert self._file is not None
        while self._waiting:
            try:
                self._file.write(self._waiting[0])
            except OSError as error:
                self._problem = error
                return False
            del self._waiting[0]
        self._problem = None
        return True

    @property
    def total(self) -> Usage:
        """Sum over all calls."""
        return self._total.usage()

    @property
    def total_nano_usd(self) -> int:
        """Money of all calls in billionths of a dollar."""
        return self._total.nano_usd

    @property
    def failed(self) -> int:
        """How many calls did not end with a reply."""
        return self._total.failed

    def by_member(self) -> dict[str, Usage]:
        """Calls by the member that answered, tokens and money by the member that was paid."""
        return {name: s.usage() for name, s in self._members.items()}

    def of_trajectory(self, trajectory_id: str | None) -> Usage:
        """Sum over the calls of one trajectory.

        Raises:
            PoolError: this ledger was made with ``by_trajectory=False``.
        """
        if self._trajectories is None:
            raise PoolError("this ledger keeps no sums per trajectory; make it with by_trajectory=True")
        found = self._trajectories.get(trajectory_id)
        return found.usage() if found is not None else Usage()

    def trajectories(self) -> list[str | None]:
        """The trajectories that called."""
        return list(self._trajectories or ())

    def __len__(self) -> int:
        return self._total.calls

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def close(self) -> None:
        """Write what waits and close the file. Idempotent.

        Raises:
            PoolError: rows are left that cannot be written.
        """
        if self._file is not None:
            try:
                self.ready()
            finally:
                self._file.close()
                self._file = None


def read_ledger(path: str | os.PathLike[str]) -> list[Entry]:
    """Read a ledger file; a torn line (a crash in the middle of a write) is left out.

    Raises:
        DataError: the file is absent, or a whole line is not an entry; the line is named.
    """
    entries = []
    for number, row in read_lines(path):
        if row is None:
            continue
        missing = [k for k in Entry._fields if k not in row and k not in Entry._field_defaults]
        if missing:
            raise DataError(f"{path}, line {number}: not a ledger entry (no {missing[0]!r})")
        known: dict[str, Any] = {k: v for k, v in row.items() if k in Entry._fields}
        known["charges"] = tuple(Charge(*c) for c in row.get("charges") or ())
        entries.append(Entry(**known))
    return entries
