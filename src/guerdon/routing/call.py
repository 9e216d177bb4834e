"""One call in progress: attempts, waits and fallbacks, and what has to be paid so far.

:class:`~guerdon.routing.pool.Pool` makes a :class:`Call`, runs or streams it, and books the reply.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from guerdon.errors import PoolError
from guerdon.routing.breaker import Breaker
from guerdon.routing.cache import ReplyCache
from guerdon.routing.ledger import Ledger
from guerdon.routing.member import Backend, BackendError, Charge, Member, Outcome, RawReply, Reply
from guerdon.routing.retry import RetryPolicy
from guerdon.routing.secrets import scrub
from guerdon.types import Message

__all__ = ["Call", "Shared", "Slot", "price_nano"]

log = logging.getLogger("guerdon.pool")

# What an endpoint may append to the model's name and still mean the same model: a date, a digest, "latest".
_REVISION = re.compile(r"-(\d{4}|\d{6}|\d{8}|\d{4}-\d{2}-\d{2})|[:@-]latest|@.+")


@dataclass(slots=True)
class Shared:
    """What all views of a pool have in common."""

    ledger: Ledger
    cache: ReplyCache | None
    retry: RetryPolicy
    count_tokens: Callable[[str], int]
    random: random.Random
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep
    backends: dict[str, Backend] = field(default_factory=dict)


class Slot:
    """A backend with its circuit breaker and its places; members of several views can stand for one slot.

    Args:
        backend: what is asked.
        breaker: ``None`` never opens.
        places: most calls at once.
    """

    __slots__ = ("_places", "_semaphores", "backend", "bills_failures", "breaker", "identity", "model")

    def __init__(self, backend: Backend, breaker: Breaker | None, places: int) -> None:
        self.backend, self.breaker, self._places = backend, breaker, places
        self.identity: str | None = getattr(backend, "identity", None)
        self.model: str | None = getattr(backend, "model", None)
        self.bills_failures: bool = getattr(backend, "bills_failures", True)
        self._semaphores: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
            weakref.WeakKeyDictionary()
        )

    def places(self) -> asyncio.Semaphore:
        """The running loop's semaphore."""
        loop = asyncio.get_running_loop()
        found = self._semaphores.get(loop)
        if found is None:
            found = self._semaphores[loop] = asyncio.Semaphore(self._places)
        return found


class Call:
    """Asks a member, and its fallbacks after it.

    Args:
        name: of the member that is asked.
        table: members and their slots.
        shared: the pool's parts.
        messages: chat messages.
        max_tokens, temperature, top_p, seed: the member's own defaults where ``None``.
        deadline: on the pool's clock.
    """

    def __init__(
        self,
        name: str,
        table: Mapping[str, tuple[Member, Slot]],
        shared: Shared,
        messages: Sequence[Message],
        max_tokens: int | None,
        temperature: float | None,
        top_p: float | None,
        seed: int | None,
        deadline: float | None,
    ) -> None:
        self.name, self.table, self.shared, self.messages = name, table, shared, messages
        self.max_tokens, self.temperature, self.top_p, self.seed = max_tokens, temperature, top_p, seed
        self.deadline = deadline
        self.member, self.slot = table[name]
        self.began = shared.clock()
        self.attempts = 0
        self.under_way = False
        self.charges: list[Charge] = []
        self.estimated = False
        self.text: list[str] = []
        self.failures: list[str] = []
        self._input_estimate: int | None = None

    async def run(self) -> Reply:
        """Ask, and wait for the whole reply."""
        while True:
            try:
                return await self._ask()
            except BackendError as error:
                if not self._fall_back(error):
                    return self._failed(error)

    async def stream(self) -> AsyncGenerator[str | Reply, None]:
        """Yield pieces of text, then the reply. Once there was text, nobody else is asked."""
        while True:
            try:
                async with aclosing(self._ask_stream()) as pieces:
                    async for piece in pieces:
                        yield piece
                return
            except BackendError as error:
                if self.text or not self._fall_back(error):
                    yield self._failed(error)
                    return

    def abandoned(self) -> Reply:
        """A call that was given up from outside: what must be paid, estimated where it was still under way."""
        if self.under_way:
            self._pay(RawReply("".join(self.text) or None))
        return self._failed(BackendError(Outcome.CANCELLED, "the caller went away"))

    # Attempts

    async def _ask(self) -> Reply:
        key, hit = await self._recall()
        if hit is not None:
            return self._reply(hit, cached=True)
        options = self._options()
        attempt = 0
        while True:
            attempt += 1
            try:
                async with _Attempt(self) as timeout:
                    raw = await self.slot.backend.complete(self.messages, timeout=timeout, **options)
                self._accept(raw)
            except BackendError as error:
                if error.billed is not None:
                    self._pay(error.billed)
                await self._wait(error, attempt)
                continue
            await self._remember(key, raw)
            return self._reply(raw)

    async def _ask_stream(self) -> AsyncGenerator[str | Reply, None]:
        key, hit = await self._recall()
        if hit is not None:
            yield hit.text or ""
            yield self._reply(hit, cached=True)
            return
        options = self._options()
        attempt = 0
        while True:
            attempt += 1
            raw: RawReply | None = None
            try:
                async with (
                    _Attempt(self) as timeout,
                    aclosing(self.slot.backend.stream(self.messages, timeout=timeout, **options)) as pieces,
                ):
                    while (piece := await self._next(pieces)) is not None:
                        if isinstance(piece, RawReply):
                            raw = piece
                        elif piece:
                            self.text.append(piece)
                            yield piece
                    if raw is None:
                        raise BackendError(Outcome.BAD_REPLY, "the stream ended without a reply")
                self._accept(raw)
            except BackendError as error:
                if self.text and error.outcome is not Outcome.EMPTY:
                    # What was shown cannot be taken back, and is paid.
                    known = error.billed or RawReply(None)
                    self._pay(RawReply("".join(self.text), known.input_tokens, known.output_tokens, known.model))
                    raise
                if error.billed is not None:
                    self._pay(error.billed)
                await self._wait(error, attempt)
                continue
            await self._remember(key, raw)
            yield self._reply(raw)
            return

    async def _next(self, pieces: Any) -> str | RawReply | None:
        try:
            if self.deadline is None:
                return await anext(pieces, None)
            async with asyncio.timeout(self.deadline - self.shared.clock()):
                return await anext(pieces, None)
        except TimeoutError:
            raise _DeadlinePassed(Outcome.TIMEOUT, "the deadline has passed", billed=RawReply(None)) from None

    def _options(self) -> dict[str, Any]:
        member = self.member
        return {
            "max_tokens": member.max_tokens if self.max_tokens is None else self.max_tokens,
            "temperature": member.temperature if self.temperature is None else self.temperature,
            "top_p": member.top_p if self.top_p is None else self.top_p,
            "seed": self.seed,
        }

    def _accept(self, raw: RawReply) -> None:
        self._pay(raw)
        if not (raw.text and raw.text.strip()):
            raise BackendError(Outcome.EMPTY, f"a reply without text (finish reason {raw.finish_reason!r})")

    async def _wait(self, error: BackendError, attempt: int) -> None:
        """Wait for the next attempt, or raise ``error`` where there is none."""
        if not error.outcome.retryable:
            raise error
        wait = self.shared.retry.wait(attempt, error.retry_after, self.shared.random)
        if wait is None:
            raise error
        then = self.shared.clock() + wait
        if then - self.began > self.shared.retry.total_s or (self.deadline is not None and then >= self.deadline):
            raise error
        await self.shared.sleep(wait)

    def _fall_back(self, error: BackendError) -> bool:
        following = self.member.fallback
        if following is None:
            return False
        self.failures.append(f"{self.member.name}: {error}")
        self.member, self.slot = self.table[following]
        return True

    # Cache

    async def _recall(self) -> tuple[str | None, RawReply | None]:
        cache, identity = self.shared.cache, self.slot.identity
        if cache is None or identity is None:
            return None, None
        key = cache.key(identity, self.messages, self._options())
        try:
            return key, await cache.get(key)
        except PoolError as error:
            self._cache_failed(error)
            return None, None

    async def _remember(self, key: str | None, raw: RawReply) -> None:
        if key is None or self.shared.cache is None:
            return
        try:
            await self.shared.cache.put(key, raw)
        except PoolError as error:
            # The reply is here and paid; it must not be lost with its copy.
            self._cache_failed(error)

    def _cache_failed(self, error: PoolError) -> None:
        if self.shared.cache is not None:
            self.shared.cache = None
            log.warning("%s; going on without it", error)

    # Money

    def _usage(self, raw: RawReply) -> tuple[int, int]:
        given, made = raw.input_tokens, raw.output_tokens
        if given is None:
            self.estimated = True
            if self._input_estimate is None:
                self._input_estimate = sum(self.shared.count_tokens(m["content"]) for m in self.messages)
            given = self._input_estimate
        if made is None:
            self.estimated = True
            made = self.shared.count_tokens(raw.text) if raw.text else 0
        return given, made

    def _prices(self, served: str | None) -> tuple[float, float]:
        """Of the model that answered, where they are known; else of the one that was asked."""
        member = self.member
        if served is not None and served in member.served_prices:
            return member.served_prices[served]
        return member.input_price, member.output_price

    def _pay(self, raw: RawReply) -> None:
        given, made = self._usage(raw)
        nano = price_nano(given, made, *self._prices(raw.model))
        self.charges.append(Charge(self.member.name, raw.model, given, made, nano))
        self.under_way = False

    # Replies

    def _reply(self, raw: RawReply, *, cached: bool = False) -> Reply:
        return self._made(raw.model, raw.text, Outcome.OK, None, raw, cached)

    def _failed(self, error: BackendError) -> Reply:
        model = next((c.model for c in reversed(self.charges) if c.member == self.member.name and c.model), None)
        text = "".join(self.text) or None
        message = " / ".join([*self.failures, f"{self.member.name}: {error}" if self.failures else str(error)])[:500]
        return self._made(model, text, error.outcome, message, error, False)

    def _made(
        self, model: str | None, text: str | None, outcome: Outcome, error: str | None, source: Any, cached: bool
    ) -> Reply:
        member, charges = self.member, self.charges
        given, made = sum(c.input_tokens for c in charges), sum(c.output_tokens for c in charges)
        if cached:
            hit = self._usage(source)
            given, made = given + hit[0], made + hit[1]
        mixed = len({c[:2] for c in charges}) > 1 or (bool(charges) and charges[0].member != member.name)
        input_price, output_price = self._prices(model)
        asked = self.slot.model
        return Reply(
            member=self.name,
            answered_by=member.name,
            model=model,
            text=text,
            input_tokens=given,
            output_tokens=made,
            usage_estimated=self.estimated,
            usd=sum(c.nano_usd for c in charges) / 1e9,
            input_price=input_price,
            output_price=output_price,
            price_date=member.price_date,
            latency_s=self.shared.clock() - self.began,
            attempts=self.attempts,
            cached=cached,
            outcome=outcome,
            error=error,
            retry_after=getattr(source, "retry_after", None),
            finish_reason=getattr(source, "finish_reason", None),
            model_mismatch=model is not None and asked is not None and model != asked and not _same(asked, model),
            charges=tuple(charges) if mixed else (),
        )


class _DeadlinePassed(BackendError):
    """The caller's time is over, the endpoint's is not."""


class _Attempt:
    """One attempt's place at its member and its ticket at the breaker; entering it gives the seconds it has."""

    __slots__ = ("_call", "_cut", "_places", "_slot", "_ticket")

    def __init__(self, call: Call) -> None:
        self._call, self._slot = call, call.slot
        self._cut = False
        self._ticket = 0

    async def __aenter__(self) -> float:
        call = self._call
        self._places = await self._enter()
        breaker = self._slot.breaker
        if breaker is not None:
            ticket = breaker.enter()
            if ticket is None:
                self._places.release()
                wait = breaker.retry_after
                raise BackendError(
                    Outcome.BREAKER_OPEN,
                    f"{call.member.name!r} failed too often lately and is left alone for {wait:.1f} s more",
                    retry_after=wait,
                )
            self._ticket = ticket
        timeout = call.member.timeout_s
        if call.deadline is not None and (left := call.deadline - call.shared.clock()) < timeout:
            self._cut, timeout = True, max(left, 0.0)
        call.attempts += 1
        call.under_way = True
        return timeout

    async def _enter(self) -> asyncio.Semaphore:
        call = self._call
        places = self._slot.places()
        if call.deadline is None:
            await places.acquire()
            return places
        left = call.deadline - call.shared.clock()
        try:
            if left <= 0:
                raise TimeoutError
            if not places.locked():
                await places.acquire()
            else:
                await asyncio.wait_for(places.acquire(), left)
        except TimeoutError:
            raise BackendError(Outcome.TIMEOUT, "the deadline passed before it was this call's turn") from None
        return places

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        call, breaker = self._call, self._slot.breaker
        self._places.release()
        if error is not None and not isinstance(error, Exception):
            if breaker is not None:
                breaker.release(self._ticket)
            return
        call.under_way = False
        if breaker is not None:
            self._judge(breaker, error)
        if isinstance(error, PoolError):
            raise BackendError(Outcome.CLIENT_ERROR, str(error)) from error
        if error is not None and not isinstance(error, BackendError):
            # A backend is a stranger's code; what it raises must not take the run down with it.
            why = scrub(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
            raise BackendError(Outcome.SERVER_ERROR, f"the backend raised {why}") from error

    def _judge(self, breaker: Breaker, error: BaseException | None) -> None:
        outcome = getattr(error, "outcome", None)
        if isinstance(error, _DeadlinePassed) or (self._cut and outcome is Outcome.TIMEOUT):
            # A caller in a hurry says nothing about the endpoint.
            breaker.release(self._ticket)
        else:
            # Neither does a refusal or a miss: something was there and answered.
            breaker.record(self._ticket, error is None or outcome in (Outcome.CLIENT_ERROR, Outcome.MISS))


def price_nano(input_tokens: int, output_tokens: int, input_price: float, output_price: float) -> int:
    """Price in billionths of a dollar; prices are in USD per million tokens."""
    return round(1000 * (input_tokens * input_price + output_tokens * output_price))


def _same(asked: str, served: str) -> bool:
    a, b = asked.lower().rpartition("/")[2], served.lower().rpartition("/")[2]
    return a == b or (b.startswith(a) and _REVISION.fullmatch(b[len(a) :]) is not None)
