"""The pool: members by name, called with retries, limits, fallbacks, a cache and a budget, and booked.

:meth:`Pool.call` never raises for what an upstream does: a failed call is a :class:`Reply` that says so, and
it is in the ledger like any other.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from guerdon.errors import BudgetExceeded, PoolError, UnknownName, nearest
from guerdon.routing.breaker import Breaker
from guerdon.routing.budget import Budget
from guerdon.routing.cache import ReplyCache
from guerdon.routing.ledger import Ledger, nano_usd
from guerdon.routing.member import Backend, BackendError, Member, Outcome, RawReply, Reply
from guerdon.routing.retry import RetryPolicy
from guerdon.types import Message

__all__ = ["Pool", "estimate_tokens"]


def estimate_tokens(text: str) -> int:
    """Tokens of a text whose endpoint reported none: a quarter of its UTF-8 bytes, rounded up, at least one a text."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // 4) if text else 0


class _Shared:
    """What all views of a pool have in common."""

    def __init__(self, backends: Mapping[str, Backend], ledger: Ledger, cache: ReplyCache | None, retry: RetryPolicy, seed: int) -> None:
        self.backends = dict(backends)
        self.ledger, self.cache, self.retry = ledger, cache, retry
        self.breakers: dict[str, Breaker] = {}
        self.limits: dict[str, asyncio.Semaphore] = {}
        self.random = random.Random(seed)
        self.sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep
        self.clock: Callable[[], float] = time.monotonic
        self.loop: asyncio.AbstractEventLoop | None = None


class Pool(Mapping[str, Member]):
    """Members by name, in order.

    Args:
        members: ``(member, backend)`` pairs.
        ledger: where calls are booked; a new one in memory by default.
        cache: of replies; none by default.
        retry: when to ask again.
        resolver: maps what the router wrote to a member's name or ``None``; replaces exact matching.
        seed: of the backoff's jitter.

    Raises:
        PoolError: no members, a name or alias given twice (up to case), an unknown or circular fallback.
    """

    def __init__(
        self,
        members: Sequence[tuple[Member, Backend]],
        *,
        ledger: Ledger | None = None,
        cache: ReplyCache | None = None,
        retry: RetryPolicy | None = None,
        resolver: Callable[[str], str | None] | None = None,
        seed: int = 0,
    ) -> None:
        if not members:
            raise PoolError("a pool needs at least one member")
        keys = [m.name for m, _ in members]
        twice = next((k for k in keys if keys.count(k) > 1), None)
        if twice is not None:
            raise PoolError(f"member name {twice!r} is given twice; names must be unique")
        self._members: dict[str, tuple[Member, str]] = {m.name: (m, m.name) for m, _ in members}
        self._shared = _Shared(
            {m.name: b for m, b in members}, ledger if ledger is not None else Ledger(), cache, retry or RetryPolicy(), seed
        )
        self._resolver = resolver
        self._names = _names_of([m for m, _ in members])
        for member, _ in members:
            self._check_fallback(member)

    def _check_fallback(self, member: Member) -> None:
        seen = [member.name]
        while member.fallback is not None:
            if member.fallback not in self._members:
                raise PoolError(f"member {seen[-1]!r} falls back to unknown member {member.fallback!r}{nearest(member.fallback, self)}")
            if member.fallback in seen:
                raise PoolError(f"the fallbacks of {' -> '.join([*seen, member.fallback])} run in a circle")
            seen.append(member.fallback)
            member = self[member.fallback]

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **options: Any) -> Pool:
        """Read a pool from a YAML file; see :mod:`guerdon.routing.pool_yaml`."""
        from guerdon.routing.pool_yaml import read_pool

        return read_pool(Path(path), **options)

    # As a mapping -----------------------------------------------------------------------------------------------------

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

    @property
    def ledger(self) -> Ledger:
        """Where calls are booked."""
        return self._shared.ledger

    @property
    def breakers(self) -> dict[str, str]:
        """State of each member's circuit breaker, under the member's name in this view."""
        known = self._shared.breakers
        return {n: known[key].state if key in known else "closed" for n, (_, key) in self._members.items()}

    def resolve(self, text: str) -> str | None:
        """The member that ``text`` names, or None: exact up to case and outer blanks, aliases included."""
        if self._resolver is not None:
            name = self._resolver(text)
            return name if name in self._members else None
        return self._names.get(text.strip().lower())

    def view(
        self,
        *,
        members: Sequence[str] | None = None,
        rename: Mapping[str, str] | None = None,
        reprice: Mapping[str, tuple[float, float]] | None = None,
        descriptors: Mapping[str, str] | None = None,
        add: Sequence[tuple[Member, Backend]] = (),
    ) -> Pool:
        """The same backends, ledger, breakers and cache under other names, prices or descriptors.

        Args:
            members: keep these (old names), in this order; default: all.
            rename: old name to new name.
            reprice: old name to (input, output) price.
            descriptors: old name to new descriptor.
            add: further members.
        """
        for name in (*(members or ()), *(rename or {}), *(reprice or {}), *(descriptors or {})):
            self[name]
        out = object.__new__(Pool)
        out._shared, out._resolver = self._shared, self._resolver
        table: dict[str, tuple[Member, str]] = {}
        for old in members if members is not None else self._members:
            member, key = self._members[old]
            change: dict[str, Any] = {}
            if rename and old in rename:
                change |= {"name": rename[old], "aliases": ()}
            if reprice and old in reprice:
                change |= {"input_price": reprice[old][0], "output_price": reprice[old][1]}
            if descriptors and old in descriptors:
                change["descriptor"] = descriptors[old]
            if member.fallback is not None:
                kept = members is None or member.fallback in members
                change["fallback"] = (rename or {}).get(member.fallback, member.fallback) if kept else None
            if change:
                member = replace(member, **change)
            if member.name in table:
                raise PoolError(f"member name {member.name!r} is given twice; names must be unique")
            table[member.name] = (member, key)
        if add:
            shared = out._shared = _copy_shared(self._shared)
            for member, backend in add:
                if member.name in table:
                    raise PoolError(f"member name {member.name!r} is given twice; names must be unique")
                key = f"{member.name}@{id(backend)}"
                shared.backends[key] = backend
                table[member.name] = (member, key)
        out._members = table
        out._names = _names_of([m for m, _ in table.values()])
        if add:
            for member, _ in table.values():
                out._check_fallback(member)
        return out

    # Money ------------------------------------------------------------------------------------------------------------

    def worst_case_usd(self, name: str, messages: Sequence[Message] | str, max_tokens: int | None = None) -> float:
        """Most that one call can cost: every attempt billed in full, fallbacks included.

        A token is at least one byte, so the input has at most as many tokens as bytes, and 8 more per
        message for its frame. A cached or cheaper reply gives the rest back when the call is settled.
        """
        member = self[name]
        size = sum(len(m["content"].encode("utf-8", "surrogatepass")) + 8 for m in _messages(messages))
        total = 0.0
        while True:
            most = max_tokens or member.max_tokens
            prices = [(member.input_price, member.output_price), *member.served_prices.values()]
            total += self._shared.retry.attempts * max(_price(size, most, a, b) for a, b in prices)
            if member.fallback is None:
                return total
            member = self[member.fallback]

    # Calls ------------------------------------------------------------------------------------------------------------

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
            max_tokens, temperature, top_p, seed: of the reply; the member's own defaults where ``None``.
            trajectory_id: groups calls in the ledger.
            deadline: point on the monotonic clock after which nothing is waited for.
            budget: the worst case is reserved in it first; a call that does not fit is not made
                (``Outcome.BUDGET``).

        Returns:
            The reply, or what went wrong.
        """
        found = self._members.get(name)
        if found is None:
            reply = _failed(name, None, Outcome.UNKNOWN_MEMBER, f"the pool has no member {name[:80]!r}{nearest(name, self)}")
            self.ledger.book(reply, trajectory_id)
            return reply
        messages = _messages(messages)
        token: int | None = None
        if budget is not None:
            try:
                token = budget.reserve(self.worst_case_usd(name, messages, max_tokens))
            except BudgetExceeded as error:
                return _failed(name, found[0], Outcome.BUDGET, str(error))
        call = _Call(self, messages, max_tokens, temperature, top_p, seed, deadline)
        reply = None
        try:
            reply = await call.run(name)
        except asyncio.CancelledError:
            reply = call.cancelled(name)
            raise
        finally:
            if reply is not None:
                self.ledger.book(reply, trajectory_id)
            if budget is not None and token is not None:
                budget.settle(token, reply.usd if reply is not None else 0.0)
        return reply

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
    ) -> AsyncIterator[str | Reply]:
        """As :meth:`call`, in pieces of text followed by one :class:`Reply`.

        Retries and the fallback are used as long as no text has come; after that a failure ends the stream
        with a failed reply that holds the text so far. A consumer that goes away is booked for what came.
        """
        found = self._members.get(name)
        if found is None:
            reply = await self.call(name, messages, trajectory_id=trajectory_id)
            yield reply
            return
        call = _Call(self, _messages(messages), max_tokens, temperature, top_p, seed, deadline)
        final: Reply | None = None
        try:
            async for piece in call.stream(name):
                if isinstance(piece, Reply):
                    final = piece
                else:
                    yield piece
        finally:
            if final is None:
                final = call.cancelled(name)
            self.ledger.book(final, trajectory_id)
        yield final

    def check(self) -> None:
        """Look up every API key now, so that a missing one is named before the first call.

        Raises:
            PoolError: naming the member and the environment variable.
        """
        for name, (_, key) in self._members.items():
            secret = getattr(self._shared.backends[key], "_key", None)
            if secret is not None:
                try:
                    secret.reveal()
                except PoolError as error:
                    raise PoolError(f"member {name!r}: {error}") from None

    async def aclose(self) -> None:
        """Close backends, the shared HTTP session, the cache and the ledger's file. Idempotent."""
        from guerdon.routing.backends import gather_close
        from guerdon.routing.http_client import close_shared_session

        await gather_close(list(self._shared.backends.values()))
        await close_shared_session()
        if self._shared.cache is not None:
            self._shared.cache.close()
            self._shared.cache = None
        self._shared.ledger.close()

    async def __aenter__(self) -> Pool:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


class _Call:
    """One call in progress: attempts, waits, fallbacks, and what has been billed so far."""

    def __init__(
        self,
        pool: Pool,
        messages: Sequence[Message],
        max_tokens: int | None,
        temperature: float | None,
        top_p: float | None,
        seed: int | None,
        deadline: float | None,
    ) -> None:
        self.pool, self.shared, self.messages = pool, pool._shared, messages
        self.max_tokens, self.temperature, self.top_p, self.seed = max_tokens, temperature, top_p, seed
        self.deadline = deadline
        self.began = self.shared.clock()
        self.attempts = 0
        self.input_tokens = self.output_tokens = 0
        self.estimated = False
        self.nano = 0
        self.model: str | None = None
        self.member: Member | None = None
        self.sent = False
        self.text: list[str] = []

    # One member after the other ---------------------------------------------------------------------------------------

    async def run(self, name: str) -> Reply:
        asked: str | None = name
        while True:
            assert asked is not None
            member, key = self.pool._members[asked]
            self.member = member
            raw, cached, error = await self._member(member, key)
            if error is None or member.fallback is None:
                return self._reply(name, member, raw, cached, error)
            asked = member.fallback

    async def _member(self, member: Member, key: str) -> tuple[RawReply | None, bool, BackendError | None]:
        shared = self.shared
        options = {
            "max_tokens": self.max_tokens or member.max_tokens,
            "temperature": member.temperature if self.temperature is None else self.temperature,
            "top_p": member.top_p if self.top_p is None else self.top_p,
            "seed": self.seed,
        }
        backend = shared.backends[key]
        cache_key = None
        if shared.cache is not None:
            cache_key = ReplyCache.key(backend.identity, self.messages, options)
            hit = await shared.cache.get(cache_key)
            if hit is not None:
                self.input_tokens, self.output_tokens, self.estimated = self._usage(hit)
                self.model = hit.model
                return hit, True, None
        error: BackendError | None = None
        for attempt in range(1, shared.retry.attempts + 1):
            try:
                raw = await self._attempt(member, key, backend, options)
            except BackendError as failure:
                error = failure
                if failure.billed is not None:
                    self._bill(member, backend, failure.billed)
                wait = shared.retry.wait(attempt, failure.retry_after, shared.random) if failure.outcome.retryable else None
                if wait is None or not self._time_for(wait):
                    return None, False, error
                await shared.sleep(wait)
                continue
            self._bill(member, backend, raw)
            if not (raw.text and raw.text.strip()):
                return raw, False, BackendError(Outcome.EMPTY, f"a reply without text (finish reason {raw.finish_reason!r})")
            if cache_key is not None and shared.cache is not None:
                await shared.cache.put(cache_key, raw)
            return raw, False, None
        return None, False, error

    def _time_for(self, wait: float) -> bool:
        now = self.shared.clock()
        if now + wait - self.began > self.shared.retry.total_s:
            return False
        return self.deadline is None or now + wait < self.deadline

    async def _attempt(self, member: Member, key: str, backend: Backend, options: dict[str, Any]) -> RawReply:
        breaker = self._breaker(key)
        if not breaker.allow():
            raise _BreakerOpen(member.name, breaker.retry_after)
        timeout = self._timeout(member)
        known = False
        try:
            async with self._limit(member, key):
                self.attempts += 1
                self.sent = True
                raw = await backend.complete(self.messages, timeout=timeout, **options)
                self.sent = False
            breaker.record(True)
            known = True
            return raw
        except BackendError as failure:
            self.sent = False
            # A refusal or a miss says nothing about the endpoint's health.
            breaker.record(failure.outcome in (Outcome.CLIENT_ERROR, Outcome.MISS))
            known = True
            raise
        except PoolError as failure:
            self.sent = False
            raise BackendError(Outcome.CLIENT_ERROR, str(failure)) from failure
        finally:
            if not known:
                breaker.release()

    def _timeout(self, member: Member) -> float:
        if self.deadline is None:
            return member.timeout_s
        left = self.deadline - self.shared.clock()
        if left <= 0:
            raise BackendError(Outcome.TIMEOUT, "the deadline has passed")
        return min(member.timeout_s, left)

    async def stream(self, name: str) -> AsyncIterator[str | Reply]:
        asked: str | None = name
        while asked is not None:
            member, key = self.pool._members[asked]
            self.member = member
            backend = self.shared.backends[key]
            error: BackendError | None = None
            for attempt in range(1, self.shared.retry.attempts + 1):
                error = None
                breaker = self._breaker(key)
                raw: RawReply | None = None
                if not breaker.allow():
                    error = _BreakerOpen(member.name, breaker.retry_after)
                    break
                known = False
                try:
                    async with self._limit(member, key):
                        self.attempts += 1
                        self.sent = True
                        pieces = backend.stream(
                            self.messages,
                            max_tokens=self.max_tokens or member.max_tokens,
                            temperature=member.temperature if self.temperature is None else self.temperature,
                            top_p=member.top_p if self.top_p is None else self.top_p,
                            seed=self.seed,
                            timeout=self._timeout(member),
                        )
                        async for piece in pieces:
                            if isinstance(piece, RawReply):
                                raw = piece
                            else:
                                self.text.append(piece)
                                yield piece
                        self.sent = False
                    breaker.record(True)
                    known = True
                except BackendError as failure:
                    error, self.sent = failure, False
                    breaker.record(failure.outcome in (Outcome.CLIENT_ERROR, Outcome.MISS))
                    known = True
                except PoolError as failure:
                    error, self.sent = BackendError(Outcome.CLIENT_ERROR, str(failure)), False
                finally:
                    if not known:
                        breaker.release()
                if error is None and raw is not None:
                    self._bill(member, backend, raw)
                    if not (raw.text and raw.text.strip()):
                        error = BackendError(Outcome.EMPTY, f"a reply without text (finish reason {raw.finish_reason!r})")
                    else:
                        yield self._reply(name, member, raw, False, None)
                        return
                if self.text:
                    # What was shown cannot be taken back, and was paid for.
                    partial = RawReply("".join(self.text))
                    self._bill(member, backend, partial)
                    yield self._reply(name, member, partial, False, error or BackendError(Outcome.BAD_REPLY, "no end of stream"))
                    return
                assert error is not None
                wait = self.shared.retry.wait(attempt, error.retry_after, self.shared.random) if error.outcome.retryable else None
                if wait is None or not self._time_for(wait):
                    break
                await self.shared.sleep(wait)
            if member.fallback is None:
                yield self._reply(name, member, None, False, error)
                return
            asked = member.fallback

    # Bookkeeping ------------------------------------------------------------------------------------------------------

    def _usage(self, raw: RawReply) -> tuple[int, int, bool]:
        estimated = raw.input_tokens is None or raw.output_tokens is None
        given = raw.input_tokens if raw.input_tokens is not None else sum(estimate_tokens(m["content"]) for m in self.messages)
        made = raw.output_tokens if raw.output_tokens is not None else estimate_tokens(raw.text or "")
        return given, made, estimated

    def _bill(self, member: Member, backend: Backend, raw: RawReply) -> None:
        given, made, estimated = self._usage(raw)
        self.input_tokens += given
        self.output_tokens += made
        self.estimated |= estimated
        self.model = raw.model or self.model
        a, b = self._prices(member, raw.model)
        self.nano += nano_usd(_price(given, made, a, b))

    @staticmethod
    def _prices(member: Member, served: str | None) -> tuple[float, float]:
        """The model that answered is billed, where its price is known."""
        return member.served_prices.get(served or "", (member.input_price, member.output_price))

    def _breaker(self, key: str) -> Breaker:
        breaker = self.shared.breakers.get(key)
        if breaker is None:
            breaker = self.shared.breakers[key] = Breaker(clock=self.shared.clock)
        return breaker

    def _limit(self, member: Member, key: str) -> asyncio.Semaphore:
        # A semaphore belongs to the loop in which it was first waited for.
        loop = asyncio.get_running_loop()
        if self.shared.loop is not loop:
            self.shared.loop = loop
            self.shared.limits.clear()
        limit = self.shared.limits.get(key)
        if limit is None:
            limit = self.shared.limits[key] = asyncio.Semaphore(member.max_concurrency)
        return limit

    def _reply(self, name: str, member: Member, raw: RawReply | None, cached: bool, error: BackendError | None) -> Reply:
        model = self.model
        wanted = self.shared.backends[self.pool._members[member.name][1]].model
        a, b = self._prices(member, model)
        keep = error is None or (raw is not None and bool(self.text))
        return Reply(
            member=name,
            answered_by=member.name,
            model=model,
            text=raw.text if raw is not None and keep else None,
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            usage_estimated=self.estimated,
            usd=self.nano / 1e9,
            input_price=a,
            output_price=b,
            price_date=member.price_date,
            latency_s=self.shared.clock() - self.began,
            attempts=self.attempts,
            cached=cached,
            outcome=Outcome.OK if error is None else error.outcome,
            error=None if error is None else str(error)[:300],
            retry_after=None if error is None else error.retry_after,
            finish_reason=raw.finish_reason if raw is not None else None,
            model_mismatch=bool(wanted and model and not _same_model(wanted, model)),
        )

    def cancelled(self, name: str) -> Reply:
        """A call that was given up from outside: what is known to be billed, and an estimate of what was under way."""
        member = self.member or self.pool[name]
        if self.sent or self.text:
            backend = self.shared.backends[self.pool._members[member.name][1]]
            self._bill(member, backend, RawReply("".join(self.text)))
        return self._reply(name, member, None, False, BackendError(Outcome.CANCELLED, "the caller went away"))


class _BreakerOpen(BackendError):
    def __init__(self, name: str, wait: float) -> None:
        super().__init__(Outcome.BREAKER_OPEN, f"{name!r} failed too often lately; it is asked again in {wait:.1f} s at the earliest", retry_after=wait)


def _same_model(asked: str, served: str) -> bool:
    """Endpoints append dates and revisions to the name they were asked for."""
    a, b = asked.lower().rpartition("/")[2], served.lower().rpartition("/")[2]
    return a == b or b.startswith(f"{a}-") or b.startswith(f"{a}:") or b.startswith(f"{a}@")


def _price(input_tokens: int, output_tokens: int, input_price: float, output_price: float) -> float:
    return (input_tokens * input_price + output_tokens * output_price) / 1e6


def _messages(messages: Sequence[Message] | str) -> Sequence[Message]:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def _names_of(members: Sequence[Member]) -> dict[str, str]:
    names: dict[str, str] = {}
    for member in members:
        for spelling in (member.name, *member.aliases):
            key = spelling.strip().lower()
            if names.setdefault(key, member.name) != member.name:
                raise PoolError(f"{spelling!r} stands for both {names[key]!r} and {member.name!r}; names and aliases must be unique up to case")
    return names


def _failed(name: str, member: Member | None, outcome: Outcome, error: str) -> Reply:
    prices = (member.input_price, member.output_price, member.price_date) if member else (0.0, 0.0, None)
    return Reply(name, name, None, None, 0, 0, False, 0.0, *prices, 0.0, 0, False, outcome, error)


def _copy_shared(shared: _Shared) -> _Shared:
    copy = object.__new__(_Shared)
    copy.__dict__.update(shared.__dict__)
    copy.backends = dict(shared.backends)
    return copy
