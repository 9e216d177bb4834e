"""The pool: members by name, called with retries, limits, fallbacks, a cache and a budget, and booked.

:meth:`Pool.call` never raises for what an upstream does: a failed call is a :class:`Reply` that says so, and
it is in the ledger like any other.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from guerdon.errors import BudgetExceeded, ConfigError, PoolError, UnknownName, nearest
from guerdon.routing.breaker import Breaker, BreakerPolicy
from guerdon.routing.budget import Budget
from guerdon.routing.cache import ReplyCache
from guerdon.routing.call import Call, Shared, Slot, price_nano
from guerdon.routing.ledger import Ledger
from guerdon.routing.member import Backend, Member, Outcome, PoolConfigError, Reply
from guerdon.routing.retry import RetryPolicy
from guerdon.types import Message

__all__ = ["Pool", "estimate_tokens"]

# Upper bounds on what a chat template adds: role names and control tokens of a message, a preamble of the request.
_FRAME, _PREAMBLE = 16, 64
_BREAKER = BreakerPolicy()


def estimate_tokens(text: str) -> int:
    """Tokens of a text whose endpoint reported none: a quarter of its UTF-8 bytes, rounded up."""
    return -(-_bytes(text) // 4)


class Pool(Mapping[str, Member]):
    """Members by name, in order.

    Args:
        members: ``(member, backend)`` pairs; a plain function stands for a
            :class:`~guerdon.routing.backends.CallableBackend`.
        ledger: where calls are booked; a new one in memory by default.
        cache: of replies; none by default.
        retry: when to ask again.
        breaker: when to leave a failing member alone; ``None``: never.
        resolver: maps what the router wrote to a member's name or ``None``; replaces exact matching.
        count_tokens: counts the tokens of a text where an endpoint reports no usage.
        seed: of the backoff's jitter.
        clock: monotonic seconds; replaced in tests.
        sleep: how to wait; replaced in tests.

    Raises:
        PoolConfigError: no members, a name or alias given twice (up to case), an unknown or circular fallback;
            all mistakes together.
    """

    def __init__(
        self,
        members: Sequence[tuple[Member, Backend | Callable[[str], Any]]],
        *,
        ledger: Ledger | None = None,
        cache: ReplyCache | None = None,
        retry: RetryPolicy | None = None,
        breaker: BreakerPolicy | None = _BREAKER,
        resolver: Callable[[str], str | None] | None = None,
        count_tokens: Callable[[str], int] = estimate_tokens,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self._shared = Shared(
            ledger if ledger is not None else Ledger(),
            cache,
            retry or RetryPolicy(),
            count_tokens,
            random.Random(seed),
            clock,
            sleep,
        )
        self._resolver, self._policy = resolver, breaker
        self._members: dict[str, tuple[Member, Slot]] = {}
        problems = [] if members else ["a pool needs at least one member"]
        for member, backend in members:
            if member.name in self._members:
                problems.append(_twice(member.name))
                continue
            self._members[member.name] = (member, self._slot(member, backend))
        self._shared.backends.update((name, slot.backend) for name, (_, slot) in self._members.items())
        self._finish(problems)

    def _slot(self, member: Member, backend: Backend | Callable[[str], Any]) -> Slot:
        breaker = None if self._policy is None else Breaker(self._policy, clock=self._shared.clock)
        return Slot(_backend(member, backend), breaker, member.max_concurrency)

    def _finish(self, problems: Sequence[str] = ()) -> None:
        """Index the names, and report what is wrong with them together with ``problems``."""
        found = list(problems)
        self._names: dict[str, str] = {}
        for member in self.values():
            for spelling in (member.name, *member.aliases):
                taken = self._names.setdefault(spelling.lower(), member.name)
                if taken != member.name:
                    both = f"both {taken!r} and {member.name!r}"
                    found.append(f"{spelling!r} stands for {both}; names and aliases must be unique up to case")
        for member in self.values():
            found += self._fallback_problem(member)
        if found:
            raise PoolConfigError(found)

    def _fallback_problem(self, member: Member) -> list[str]:
        chain = [member.name]
        while (following := self._members[chain[-1]][0].fallback) is not None:
            if following not in self._members:
                if len(chain) > 1:  # reported where it stands, not again for everybody who falls back to it
                    return []
                hint = nearest(following, self._members)
                return [f"member {member.name!r} falls back to unknown member {following!r}{hint}"]
            if following in chain:
                # Reported once, for the first of the circle.
                first = following == member.name and member.name == min(chain)
                return [f"the fallbacks {' -> '.join([*chain, following])} run in a circle"] if first else []
            chain.append(following)
        return []

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **options: Any) -> Pool:
        """Read a pool from a YAML file; see :mod:`guerdon.routing.pool_yaml`."""
        from guerdon.routing.pool_yaml import read_pool

        return read_pool(Path(path), **options)

    # As a mapping

    def __getitem__(self, name: str) -> Member:
        found = self._members.get(name)
        if found is None:
            raise UnknownName(f"the pool has no member {name!r}{nearest(name, self._members)}")
        return found[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __repr__(self) -> str:
        return f"Pool({', '.join(self._members)})"

    @property
    def ledger(self) -> Ledger:
        """Where calls are booked."""
        return self._shared.ledger

    @property
    def breakers(self) -> dict[str, str]:
        """State of each member's circuit breaker."""
        return {n: slot.breaker.state if slot.breaker else "closed" for n, (_, slot) in self._members.items()}

    def backend(self, name: str) -> Backend:
        """What a member is asked through."""
        return self._find(name)[1].backend

    def resolve(self, text: str) -> str | None:
        """The member that ``text`` names, or None: exact up to case and outer blanks, aliases included."""
        if self._resolver is not None:
            name = self._resolver(text)
            return name if name in self._members else None
        return self._names.get(text.strip().lower())

    def fingerprint(self) -> str:
        """SHA-256 over members, their order, prices and descriptors, and what they are asked through."""
        rows = [[asdict(member), slot.identity] for member, slot in self._members.values()]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()

    def view(
        self,
        *,
        members: Sequence[str] | None = None,
        rename: Mapping[str, str] | None = None,
        reprice: Mapping[str, tuple[float, float]] | None = None,
        descriptors: Mapping[str, str] | None = None,
        add: Sequence[tuple[Member, Backend | Callable[[str], Any]]] = (),
        wrap: Callable[[str, Backend], Backend] | None = None,
    ) -> Pool:
        """The same backends, ledger, breakers and cache under other names, prices or descriptors.

        Args:
            members: keep these (old names), in this order; default: all. A fallback that is not kept is dropped.
            rename: old name to new name; the aliases of a renamed member are dropped.
            reprice: old name to (input, output) price; its ``served_prices`` are dropped.
            descriptors: old name to new descriptor.
            add: further members; closing the pool does not close their backends.
            wrap: ``wrap(old name, backend)`` returns a backend in its place, with a breaker of its own.

        Raises:
            UnknownName: one of the names is not a member's.
            PoolConfigError: the new names clash, or a price is no price.
        """
        for given in (members, rename, reprice, descriptors):
            for name in given or ():
                if name not in self._members:
                    raise UnknownName(f"the pool has no member {name!r}{nearest(name, self._members)}")
        out = object.__new__(Pool)
        out._shared, out._resolver, out._policy = self._shared, self._resolver, self._policy
        out._members = table = {}
        kept = self._members if members is None else dict.fromkeys(members)
        names = [*((rename or {}).get(old, old) for old in kept), *(member.name for member, _ in add)]
        if len(set(names)) < len(names):
            raise PoolConfigError([_twice(name) for name in sorted({n for n in names if names.count(n) > 1})])
        if not names:
            raise PoolConfigError("a pool needs at least one member")
        for old in kept:
            member, slot = self._members[old]
            change: dict[str, Any] = {}
            if rename and old in rename:
                change |= {"name": rename[old], "aliases": ()}
            if reprice and old in reprice:
                change |= {"input_price": reprice[old][0], "output_price": reprice[old][1], "served_prices": {}}
            if descriptors and old in descriptors:
                change["descriptor"] = descriptors[old]
            if member.fallback is not None and (rename or members is not None):
                change["fallback"] = (
                    (rename or {}).get(member.fallback, member.fallback) if member.fallback in kept else None
                )
            if change:
                member = replace(member, **change)
            if wrap is not None:
                slot = out._slot(member, wrap(old, slot.backend))
            table[member.name] = (member, slot)
        for member, backend in add:
            table[member.name] = (member, out._slot(member, backend))
        if rename or add or members is not None:
            out._finish()
        else:
            out._names = self._names
        return out

    # Money

    def worst_case_usd(self, name: str, messages: Sequence[Message] | str, max_tokens: int | None = None) -> float:
        """Most that one call can cost.

        Every attempt is counted in full where the backend may bill a failed one, at the dearest price that it
        is known to serve, and every fallback on top. A token is at least one byte, so a text has at most as
        many tokens as bytes; 16 more per message and 64 per request stand for the chat template. An endpoint
        that reports more than that is booked for what it reports.
        """
        member, slot = self._find(name)
        frames = _messages(messages)
        given = sum(_bytes(m["content"]) for m in frames) + _FRAME * len(frames) + _PREAMBLE
        total = 0
        while True:
            made = member.max_tokens if max_tokens is None else max_tokens
            most = price_nano(given, made, member.input_price, member.output_price)
            for prices in member.served_prices.values():
                most = max(most, price_nano(given, made, *prices))
            total += most * (self._shared.retry.attempts if slot.bills_failures else 1)
            if member.fallback is None:
                return total / 1e9
            member, slot = self._members[member.fallback]

    def _find(self, name: str) -> tuple[Member, Slot]:
        found = self._members.get(name)
        if found is None:
            raise UnknownName(f"the pool has no member {name!r}{nearest(name, self._members)}")
        return found

    # Calls

    async def call(
        self,
        name: str,
        messages: Sequence[Message] | str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        trajectory_id: str | None = None,
        deadline: float | None = None,
        budget: Budget | None = None,
    ) -> Reply:
        """Ask a member once, as far as the world allows.

        Args:
            name: of a member; an unknown one gives ``Outcome.UNKNOWN_MEMBER`` and costs nothing.
            messages: chat messages, or the text of one user message.
            max_tokens: of the reply; the member's own default where ``None``.
            temperature: of the reply; the member's own default where ``None``.
            top_p: of the reply; the member's own default where ``None``.
            seed: of the reply; the member's own default where ``None``.
            trajectory_id: groups calls in the ledger.
            deadline: point on the monotonic clock after which nothing is waited for.
            budget: the worst case is reserved in it first; a call that does not fit is not made and not
                booked (``Outcome.BUDGET``). Its deadline holds as well.

        Returns:
            The reply, or what went wrong. An attempt that was given up while the endpoint was at work (a
            time-out, a cancellation) is booked with its input, estimated; what the endpoint may have written
            unseen cannot be known.

        Raises:
            PoolError: the ledger's file cannot be written; nothing was paid.
        """
        self.ledger.ready()
        call, token, refused = self._begin(
            name, messages, max_tokens, temperature, top_p, seed, trajectory_id, deadline, budget
        )
        if call is None:
            assert refused is not None
            return refused
        reply: Reply | None = None
        try:
            reply = await call.run()
            return reply
        finally:
            self._end(reply or call.abandoned(), trajectory_id, budget, token)

    async def stream(
        self,
        name: str,
        messages: Sequence[Message] | str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        trajectory_id: str | None = None,
        deadline: float | None = None,
        budget: Budget | None = None,
    ) -> AsyncGenerator[str | Reply, None]:
        """As :meth:`call`, in pieces of text followed by one :class:`Reply`.

        Retries and fallbacks are used as long as no text has come; after that a failure ends the stream with a
        failed reply that holds the text so far. A consumer that goes away (``aclose``, cancellation) is booked
        for what came.
        """
        self.ledger.ready()
        call, token, refused = self._begin(
            name, messages, max_tokens, temperature, top_p, seed, trajectory_id, deadline, budget
        )
        if call is None:
            assert refused is not None
            yield refused
            return
        reply: Reply | None = None
        pieces = call.stream()
        try:
            async for piece in pieces:
                if isinstance(piece, Reply):
                    reply = piece
                else:
                    yield piece
        finally:
            try:
                await pieces.aclose()
            finally:
                reply = reply or call.abandoned()
                self._end(reply, trajectory_id, budget, token)
        yield reply

    def _begin(
        self,
        name: str,
        messages: Sequence[Message] | str,
        max_tokens: int | None,
        temperature: float | None,
        top_p: float | None,
        seed: int | None,
        trajectory_id: str | None,
        deadline: float | None,
        budget: Budget | None,
    ) -> tuple[Call | None, int | None, Reply | None]:
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
        found = self._members.get(name)
        if found is None:
            shown = name[:80]
            error = f"the pool has no member {shown!r}{nearest(shown, self._members)}"
            reply = _refused(shown, None, Outcome.UNKNOWN_MEMBER, error)
            self.ledger.book(reply, trajectory_id)
            return None, None, reply
        messages = _messages(messages)
        token: int | None = None
        if budget is not None:
            try:
                token = budget.reserve(self.worst_case_usd(name, messages, max_tokens))
            except BudgetExceeded as error:
                return None, None, _refused(name, found[0], Outcome.BUDGET, str(error))
            if budget.deadline is not None:
                deadline = budget.deadline if deadline is None else min(deadline, budget.deadline)
        call = Call(name, self._members, self._shared, messages, max_tokens, temperature, top_p, seed, deadline)
        return call, token, None

    def _end(self, reply: Reply, trajectory_id: str | None, budget: Budget | None, token: int | None) -> None:
        if budget is not None and token is not None:
            budget.settle(token, reply.usd)
        self.ledger.book(reply, trajectory_id)

    # Life

    def check(self) -> None:
        """Look up every API key now, so that a missing one is named before the first call.

        Raises:
            PoolError: naming each member and environment variable.
        """
        problems = []
        for name, (_, slot) in self._members.items():
            check = getattr(slot.backend, "check", None)
            if check is not None:
                try:
                    check()
                except PoolError as error:
                    problems.append(f"member {name!r}: {error}")
        if problems:
            raise PoolError("; ".join(problems))

    async def aclose(self) -> None:
        """Close the backends the pool was made with, the cache and the ledger's file, for all views. Idempotent."""
        shared = self._shared
        backends = list({id(b): b for b in shared.backends.values()}.values())
        cache, shared.cache = shared.cache, None
        try:
            await asyncio.gather(*(b.aclose() for b in backends if hasattr(b, "aclose")))
            if cache is not None:
                await asyncio.to_thread(cache.close)
        finally:
            shared.ledger.close()

    async def __aenter__(self) -> Pool:
        self.check()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


def _backend(member: Member, given: Any) -> Backend:
    if hasattr(given, "complete"):
        return cast(Backend, given)
    if not callable(given):
        raise PoolConfigError(f"member {member.name!r} needs a backend or a function, got {type(given).__name__}")
    from guerdon.routing.backends import CallableBackend

    return CallableBackend(given)


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _messages(messages: Sequence[Message] | str) -> Sequence[Message]:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def _twice(name: str) -> str:
    return f"member name {name!r} is given twice; names must be unique"


def _refused(name: str, member: Member | None, outcome: Outcome, error: str) -> Reply:
    prices = (member.input_price, member.output_price, member.price_date) if member else (0.0, 0.0, None)
    return Reply(name, name, None, None, 0, 0, False, 0.0, *prices, 0.0, 0, False, outcome, error)
