"""Evaluate a policy over recorded replies: what was asked before is answered again, the rest is a stated miss.

A reply is found by member, query, parameters and version. A policy that asks something new gets no reply, and
its trajectory is incomplete: nobody knows how it would have gone on. Incomplete trajectories are counted and
left out of every mean, never scored 0; :meth:`Coverage.bounds` says between which values the truth lies.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from guerdon.errors import ConfigError, DataError
from guerdon.routing.member import Backend, BackendError, Outcome, RawReply
from guerdon.routing.pool import Pool
from guerdon.routing.record import RouteRecord
from guerdon.routing.recorded import squash
from guerdon.routing.whole import WholeBackend, last_user_text
from guerdon.types import Message, Trajectory

__all__ = ["Coverage", "ReplayBook", "coverage", "replay_pool"]

Key = tuple[str, str, str, str]


class ReplayBook:
    """Replies by (member that answered, query up to blanks, parameters, version).

    Only replies with a text are kept: a recorded failure says nothing about what the member would have said.
    The first reply to a question stays; others that differ are counted in ``conflicts``.

    Args:
        records: of routed trajectories.
    """

    def __init__(self, records: Iterable[RouteRecord] = ()) -> None:
        self._replies: dict[Key, RawReply] = {}
        self.conflicts = 0
        for record in records:
            self.add(record)

    def add(self, record: RouteRecord) -> None:
        """Take in one trajectory."""
        for step in record.steps:
            if step.outcome != Outcome.OK.value or step.reply is None:
                continue
            reply = RawReply(step.reply, step.input_tokens, step.output_tokens, step.model)
            key = _key(step.answered_by, step.query, record.parameters, record.version)
            self.conflicts += self._replies.setdefault(key, reply).text != reply.text

    def find(self, member: str, query: str, parameters: Mapping[str, Any], version: str) -> RawReply | None:
        """The recorded reply, or None."""
        return self._replies.get(_key(member, query, parameters, version))

    def __len__(self) -> int:
        return len(self._replies)


def _key(member: str, query: str, parameters: Mapping[str, Any], version: str) -> Key:
    return member, squash(query), json.dumps(parameters, sort_keys=True, default=str), version


class _ReplayBackend(WholeBackend):
    def __init__(
        self, book: ReplayBook, member: str, template: str | None, parameters: Mapping[str, Any], version: str
    ) -> None:
        self._book, self._member, self._version = book, member, version
        self._parameters = dict(parameters)
        self._before, _, self._after = (template or "{query}").partition("{query}")

    async def complete(self, messages: Sequence[Message], **options: Any) -> RawReply:
        query = last_user_text(messages).removeprefix(self._before).removesuffix(self._after)
        found = self._book.find(self._member, query, self._parameters, self._version)
        if found is None:
            raise BackendError(Outcome.MISS, "no recorded reply to this question")
        return found


def replay_pool(
    pool: Pool,
    book: ReplayBook,
    *,
    helper_prompt: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    version: str = "",
) -> Pool:
    """A view of ``pool`` in which every member answers from ``book`` and from nothing else.

    Names, descriptors and prices are the view's own, so that a re-priced or smaller pool can be replayed.

    Args:
        pool: whose members are replayed.
        book: recorded replies.
        helper_prompt: the wrapper with ``{query}`` that the environment puts around queries.
        parameters, version: of the records that count; both must agree.

    Raises:
        ConfigError: the wrapper has no ``{query}``.
        DataError: the book is empty.
    """
    if helper_prompt is not None and "{query}" not in helper_prompt:
        raise ConfigError("helper_prompt must contain {query}")
    if not len(book):
        raise DataError("there is no recorded reply to replay")

    def recorded(name: str, backend: Backend) -> Backend:
        return _ReplayBackend(book, name, helper_prompt, parameters or {}, version)

    return pool.view(wrap=recorded)


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a replay was recorded.

    Attributes:
        calls, misses: executed calls, and those without a recorded reply.
        complete: per trajectory, whether it met no miss.
        missed_by: misses per member.
    """

    calls: int
    misses: int
    complete: tuple[bool, ...]
    missed_by: Mapping[str, int] = field(default_factory=dict)

    @property
    def of_calls(self) -> float | None:
        """Share of calls that were answered; ``None`` where there were none."""
        return None if self.calls == 0 else 1 - self.misses / self.calls

    @property
    def of_trajectories(self) -> float:
        """Share of trajectories without a miss."""
        return sum(self.complete) / len(self.complete)

    def mean(self, values: Sequence[float]) -> float | None:
        """Mean over complete trajectories; ``None`` where there are none."""
        known = [v for v, whole in zip(values, self.complete, strict=True) if whole]
        return sum(known) / len(known) if known else None

    def bounds(self, values: Sequence[float], low: float = 0.0, high: float = 1.0) -> tuple[float, float]:
        """Mean over all trajectories if every incomplete one had gone worst, and best.

        Args:
            values: one per trajectory; those of incomplete ones are not looked at.
            low, high: range of the values.
        """
        known = sum(v for v, whole in zip(values, self.complete, strict=True) if whole)
        n, open_ = len(self.complete), self.complete.count(False)
        return (known + low * open_) / n, (known + high * open_) / n


def coverage(trajectories: Sequence[Trajectory]) -> Coverage:
    """Count the misses of replayed trajectories.

    Args:
        trajectories: with the calls in ``info["calls"]``.

    Raises:
        DataError: no trajectories.
    """
    if not trajectories:
        raise DataError("nothing was replayed: the list of trajectories is empty")
    missed: Counter[str] = Counter()
    calls = 0
    complete = []
    for trajectory in trajectories:
        made = [c.reply for c in trajectory.info.get("calls", ()) if c.reply.outcome is not Outcome.BUDGET]
        misses = [r.member for r in made if r.outcome is Outcome.MISS]
        missed.update(misses)
        calls += len(made)
        complete.append(not misses)
    return Coverage(calls, missed.total(), tuple(complete), dict(missed))
