"""What one request has spent so far, whoever makes the calls on its behalf.

A Router-R1 calls the pool from tasks of its own. Context variables follow into them, and every call passes
the ledger; so the ledger is the one place that can add up a request's money while it is still running.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from guerdon.routing.ledger import Entry, Ledger
from guerdon.routing.member import Reply

__all__ = ["Tally", "TallyLedger", "tallied"]


@dataclass(slots=True)
class Tally:
    """USD booked so far."""

    usd: float = 0.0


_CURRENT: ContextVar[Tally | None] = ContextVar("guerdon_tally", default=None)


class TallyLedger(Ledger):
    """A ledger for a server: it knows the request in whose name a call is booked."""

    def book(self, reply: Reply, trajectory_id: str | None = None) -> Entry:
        """Append one call; see :meth:`guerdon.routing.ledger.Ledger.book`."""
        tally = _CURRENT.get()
        if tally is not None:
            tally.usd += reply.usd
        return super().book(reply, trajectory_id)


@contextmanager
def tallied() -> Iterator[Tally]:
    """Add up what is booked in this context, and in the tasks that begin in it."""
    tally = Tally()
    token = _CURRENT.set(tally)
    try:
        yield tally
    finally:
        _CURRENT.reset(token)
