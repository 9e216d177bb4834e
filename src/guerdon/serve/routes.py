"""What can be served: one fixed member, a router that chooses once, or a trained Router-R1.

Serving a request has two steps. :meth:`Served.plan` decides, without paying, who will be asked, why, and
what it can cost at worst; the server reserves that much. :meth:`Served.answer` or :meth:`Served.stream`
then does it. An answer that failed carries a :class:`~guerdon.serve.problems.Problem` and still says
what was spent, so that it can be booked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from guerdon.errors import ConfigError, DataError, EngineError, UnknownName, nearest
from guerdon.routing.member import Outcome, Reply
from guerdon.routing.pool import Pool
from guerdon.serve.problems import Problem
from guerdon.serve.request import ChatRequest, question_of
from guerdon.serve.settings import Settings
from guerdon.serve.tally import TallyLedger, tallied

__all__ = ["Answer", "FixedMember", "MultiRound", "Plan", "Rule", "Served", "SingleRound", "load_served"]


@dataclass(slots=True)
class Plan:
    """Who will be asked, and what it can cost.

    Attributes:
        reason: why this route.
        member: who will be asked; ``None`` where that is decided on the way.
        usd: most that the answer can cost.
        tokens: most tokens that it can use, input and output together.
        spent: what has been spent so far at worst; booked when the request is cancelled. ``None`` means
            that nobody can know, and ``usd`` is booked.
    """

    reason: str
    member: str | None
    usd: float
    tokens: int
    spent: float | None = None


@dataclass(slots=True)
class Answer:
    """What came out.

    Attributes:
        member: who answered; ``None`` where several took part or nobody did.
        input_tokens, output_tokens: of the members, and of a router's own policy.
        usd: paid to the members.
        trace: one entry per call, as JSON values.
        waited_s: how long the pool (or the policy) was waited for.
        problem: why there is no text.
    """

    text: str
    reason: str
    member: str | None
    input_tokens: int
    output_tokens: int
    usd: float
    calls: int
    finish_reason: str = "stop"
    trace: list[dict[str, Any]] = field(default_factory=list)
    waited_s: float = 0.0
    problem: Problem | None = None


class Served(Protocol):
    """Something that answers chat requests.

    Attributes:
        name: the model name under which clients ask for it.
        owner: shown in ``GET /v1/models``.
        heavy: True where planning itself costs noticeable time, so that limits are checked before it.
    """

    name: str
    owner: str
    heavy: bool

    async def plan(self, request: ChatRequest) -> Plan:
        """Choose, without paying."""
        ...

    async def answer(self, request: ChatRequest, plan: Plan) -> Answer:
        """Do it."""
        ...

    def stream(self, request: ChatRequest, plan: Plan) -> AsyncGenerator[str | Answer, None]:
        """Do it, and yield pieces of text followed by one :class:`Answer`."""
        ...

    async def aclose(self) -> None:
        """Release what it holds; the pool is closed by the server."""
        ...


class FixedMember:
    """Always the same member of the pool.

    Args:
        pool: where it lives.
        member: its name there.
        name: under which it is served; the member's own by default.
    """

    owner = "pool"
    heavy = False

    def __init__(self, pool: Pool, member: str, name: str | None = None) -> None:
        if member not in pool:
            raise UnknownName(f"the pool has no member {member!r}{nearest(member, pool)}")
        self.pool = pool
        self.member = member
        self.name = name or member
        self.reason = "addressed directly" if self.name == member else f"always {member}"

    async def plan(self, request: ChatRequest) -> Plan:
        """The price of the longest reply."""
        return plan_call(self.pool, self.member, self.reason, request)

    async def aclose(self) -> None:
        """Nothing to end: the pool closes itself."""

    async def answer(self, request: ChatRequest, plan: Plan) -> Answer:
        """One call."""
        return await _call(self.pool, self.member, request, plan)

    def stream(self, request: ChatRequest, plan: Plan) -> AsyncGenerator[str | Answer, None]:
        """One streamed call."""
        return _stream(self.pool, self.member, request, plan)


class SingleRound:
    """A router that reads the question once and names one member.

    Args:
        pool: where the members live.
        router: has ``route(question) -> (member, reason)`` (or just the member's name). It runs in one
            thread of its own, so it need not be thread-safe and never holds up the event loop.
        name: under which it is served.
    """

    owner = "router"
    heavy = True

    def __init__(self, pool: Pool, router: Any, name: str = "router") -> None:
        self.pool = pool
        self.router = router
        self.name = name
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="guerdon-route")

    async def plan(self, request: ChatRequest) -> Plan:
        """Ask the router.

        Raises:
            Problem: 500, when it fails or names a member that the pool does not have.
        """
        loop = asyncio.get_running_loop()
        try:
            chosen = await loop.run_in_executor(self._threads, self.router.route, question_of(request.messages))
        except Exception as error:
            raise Problem(500, "router_failed", f"router {self.name!r} failed ({type(error).__name__})") from error
        member, reason = chosen if isinstance(chosen, tuple) else (chosen, f"chosen by {self.name}")
        name = member if member in self.pool else self.pool.resolve(member)
        if name is None:
            raise Problem(500, "router_failed", f"router {self.name!r} chose {member!r}, which the pool does not have")
        return plan_call(self.pool, name, str(reason), request)

    async def answer(self, request: ChatRequest, plan: Plan) -> Answer:
        """One call of the chosen member."""
        assert plan.member is not None
        return await _call(self.pool, plan.member, request, plan)

    async def aclose(self) -> None:
        """End the thread."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def stream(self, request: ChatRequest, plan: Plan) -> AsyncGenerator[str | Answer, None]:
        """One streamed call of the chosen member."""
        assert plan.member is not None
        return _stream(self.pool, plan.member, request, plan)


class Rule:
    """A router that needs no training: the cheapest, dearest, largest, or a random member.

    Args:
        pool: the members.
        rule: which.
        seed: of the random one.
    """

    names = ("cheapest", "dearest", "largest", "random")

    def __init__(self, pool: Pool, rule: str, seed: int = 0) -> None:
        import numpy as np

        from guerdon.routing import baselines

        choosers = (baselines.cheapest, baselines.dearest, baselines.largest, baselines.random_member)
        self.pool, self.rule = pool, rule
        self._choose = dict(zip(self.names, choosers, strict=True))[rule]
        self._generator = np.random.default_rng(seed)

    def route(self, question: str) -> tuple[str, str]:
        """The member, and the rule."""
        return self._choose(question, self.pool, self._generator), f"{self.rule} member"


class MultiRound:
    """A trained Router-R1: thinks, asks members, and writes an answer.

    Args:
        pool: the members it may ask.
        router: has ``async answer(question, *, max_cost_usd, max_calls, deadline)`` and returns an object
            with ``text``, ``reason``, ``usage`` (the members'), ``policy_usage`` and ``record``.
        name: under which it is served.
        max_cost_usd: cap of a request that names none.
        max_calls: likewise.
    """

    owner = "router"
    heavy = False

    def __init__(
        self,
        pool: Pool,
        router: Any,
        name: str = "router-r1",
        *,
        max_cost_usd: float = 0.10,
        max_calls: int | None = None,
    ) -> None:
        self.pool = pool
        self.router = router
        self.name = name
        self.max_cost_usd = max_cost_usd
        self.max_calls = max_calls

    async def plan(self, request: ChatRequest) -> Plan:
        """The cap itself is the worst case: the router reserves every call against it."""
        usd = self.max_cost_usd if request.max_cost_usd is None else request.max_cost_usd
        return Plan("decided while thinking", None, usd, input_estimate(request) + (request.max_tokens or 0))

    async def answer(self, request: ChatRequest, plan: Plan) -> Answer:
        """Let it work.

        An error of the router becomes an answer with a problem, booked with what was spent before it: as a
        :class:`~guerdon.serve.tally.TallyLedger` knows, else the whole cap.
        """
        started = time.perf_counter()
        known = isinstance(self.pool.ledger, TallyLedger)
        try:
            with tallied() as tally:
                try:
                    routed = await self.router.answer(
                        question_of(request.messages),
                        max_cost_usd=plan.usd,
                        max_calls=self.max_calls if request.max_calls is None else request.max_calls,
                        deadline=request.deadline,
                    )
                finally:
                    plan.spent = tally.usd if known else None
        except Exception as error:  # noqa: BLE001 - a policy or engine may raise anything; booked and reported
            if isinstance(error, DataError | EngineError):  # blank, or too long for the policy
                problem = Problem(400, "invalid_question", str(error), param="messages")
            else:
                problem = Problem(500, "router_failed", f"router {self.name!r} failed ({type(error).__name__})")
            problem.__cause__ = error
            usd = plan.usd if plan.spent is None else plan.spent
            return Answer("", plan.reason, None, 0, 0, usd, 0, problem=problem)
        return _routed(routed, time.perf_counter() - started)

    async def aclose(self) -> None:
        """End the router's engine, where it has one."""
        close = getattr(self.router, "aclose", None)
        if close is not None:
            await close()

    async def stream(self, request: ChatRequest, plan: Plan) -> AsyncGenerator[str | Answer, None]:
        """The final answer in one piece: its thoughts and the members' replies are not shown."""
        answer = await self.answer(request, plan)
        if answer.text:
            yield answer.text
        yield answer


def token_estimate(request: ChatRequest) -> int:
    """Tokens that a request may use: about a third of its characters, and what it asks for."""
    return input_estimate(request) + (request.max_tokens or 0)


def input_estimate(request: ChatRequest) -> int:
    """Input tokens, rather too many than too few: a third of the characters, and four a message."""
    return sum(len(m["content"]) for m in request.messages) // 3 + 4 * len(request.messages)


def plan_call(pool: Pool, member: str, reason: str, request: ChatRequest) -> Plan:
    """The plan of a single call."""
    entry = pool[member]
    longest = request.max_tokens or entry.max_tokens
    usd = pool.worst_case_usd(member, request.messages, longest)
    given = input_estimate(request)
    # A plain call that is cancelled under way may be finished, and billed, all the same.
    once = (given * entry.input_price + longest * entry.output_price) / 1e6
    return Plan(reason, member, usd, given + longest, spent=min(usd, once))


async def _call(pool: Pool, member: str, request: ChatRequest, plan: Plan) -> Answer:
    started = time.perf_counter()
    reply = await pool.call(
        member,
        request.messages,
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        deadline=request.deadline,
    )
    return _answer_of(reply, plan.reason, request.max_tokens or pool[member].max_tokens, time.perf_counter() - started)


def _answer_of(reply: Reply, reason: str, longest: int, waited: float) -> Answer:
    if reply.answered_by != reply.member:
        reason = f"{reason}; {reply.member} failed, {reply.answered_by} answered instead"
    finish = reply.finish_reason
    if finish is None:  # the endpoint did not say: judge by the length
        finish = "length" if not reply.usage_estimated and reply.output_tokens >= longest else "stop"
    return Answer(
        text=reply.text or "",
        reason=reason,
        member=reply.answered_by,
        input_tokens=reply.input_tokens,
        output_tokens=reply.output_tokens,
        usd=reply.usd,
        calls=1,
        finish_reason=finish,
        trace=[trace_of(reply)],
        waited_s=waited,
        problem=None if reply.ok else problem_of(reply),
    )


_FAILURES: dict[Outcome, tuple[int, str, str]] = {
    Outcome.TIMEOUT: (504, "upstream_timeout", "did not answer in time"),
    Outcome.RATE_LIMITED: (503, "upstream_rate_limited", "is rate limited upstream"),
    Outcome.SERVER_ERROR: (502, "upstream_error", "failed upstream"),
    Outcome.CLIENT_ERROR: (502, "upstream_refused", "refused the request upstream"),
    Outcome.BAD_REPLY: (502, "upstream_bad_reply", "sent something that is not a chat completion"),
    Outcome.EMPTY: (502, "upstream_empty_reply", "sent a reply without text"),
    Outcome.CONNECTION: (502, "upstream_unreachable", "cannot be reached"),
    Outcome.BREAKER_OPEN: (503, "upstream_unavailable", "failed too often lately and is being left alone for a while"),
    Outcome.BUDGET: (402, "max_cost_exceeded", "could cost more than is left"),
    Outcome.MISS: (502, "recording_miss", "has no recorded reply to this"),
    Outcome.UNKNOWN_MEMBER: (404, "model_not_found", "does not exist"),
    Outcome.CANCELLED: (503, "cancelled", "was cancelled"),
}


def problem_of(reply: Reply) -> Problem:
    """What the client is told about a failed call: who failed and how, never the upstream's own words."""
    status, code, what = _FAILURES[reply.outcome]
    retry_after = reply.retry_after
    if retry_after is None and status == 503:
        retry_after = 1.0
    return Problem(status, code, f"member {reply.member!r} {what}", retry_after=retry_after)


def trace_of(reply: Reply) -> dict[str, Any]:
    """One call, as JSON values."""
    return {
        "member": reply.member,
        "answered_by": reply.answered_by,
        "model": reply.model,
        "model_mismatch": reply.model_mismatch,
        "outcome": reply.outcome.value,
        "attempts": reply.attempts,
        "cached": reply.cached,
        "latency_s": reply.latency_s,
        "input_tokens": reply.input_tokens,
        "output_tokens": reply.output_tokens,
        "usage_estimated": reply.usage_estimated,
        "usd": reply.usd,
        "input_price": reply.input_price,
        "output_price": reply.output_price,
        "price_date": reply.price_date,
    }


async def _stream(pool: Pool, member: str, request: ChatRequest, plan: Plan) -> AsyncGenerator[str | Answer, None]:
    started = time.perf_counter()
    pieces: Any = pool.stream(
        member,
        request.messages,
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        deadline=request.deadline,
    )
    entry = pool[member]
    given = input_estimate(request) * entry.input_price
    length = count = 0
    waiting, waited = started, 0.0
    async with aclosing(pieces):
        async for piece in pieces:
            waited += time.perf_counter() - waiting
            if isinstance(piece, str):
                length, count = length + len(piece), count + 1
                # Should the client leave now, this is booked: the input, and a token for every piece or
                # every three characters, whichever is more.
                plan.spent = min(plan.usd, (given + max(count, length // 3 + 1) * entry.output_price) / 1e6)
                yield piece
            else:
                yield _answer_of(piece, plan.reason, request.max_tokens or entry.max_tokens, waited)
            waiting = time.perf_counter()


def _routed(routed: Any, waited: float) -> Answer:
    """The answer of a Router-R1; one without text is a failure that was paid."""
    used = routed.usage + routed.policy_usage
    # What a member's endpoint said about a failure, and what the policy was shown, stay inside.
    steps = [{k: v for k, v in step.items() if k not in ("error", "shown")} for step in routed.record.get("steps", ())]
    answered = {step["answered_by"] for step in steps}
    text = routed.text or ""
    problem = None
    if not text.strip():
        problem = Problem(502, "no_answer", f"the router ended without an answer ({routed.reason})")
    return Answer(
        text=text,
        reason=routed.reason,
        member=answered.pop() if len(answered) == 1 else None,
        input_tokens=used.input_tokens,
        output_tokens=used.output_tokens,
        usd=routed.usage.usd,
        calls=routed.usage.calls,
        trace=steps,
        waited_s=waited,
        problem=problem,
    )


def load_served(spec: str, pool: Pool, *, name: str | None = None, settings: Settings | None = None) -> Served:
    """Load what ``--router`` names.

    Args:
        spec: ``member:NAME``; ``cheapest``, ``dearest``, ``largest`` or ``random``; the folder of a trained
            Router-R1; or the file of a saved single-round router.
        pool: the members.
        name: under which it is served; the folder's or file's own by default.
        settings: their cost cap is the Router-R1's.

    Raises:
        ConfigError: nothing of that name, or a router over members that the pool does not have.
        CheckpointError, DataError: what is there is no whole router.
        UnknownName: no such member.
    """
    if spec.startswith("member:"):
        return FixedMember(pool, spec.removeprefix("member:"), name)
    if spec in Rule.names:
        return SingleRound(pool, Rule(pool, spec), name or spec)
    path = Path(spec)
    if path.is_dir():
        from guerdon.routing.router_r1 import RouterR1

        cap = settings.max_cost_usd if settings is not None and settings.max_cost_usd is not None else 0.10
        return MultiRound(pool, RouterR1.load(path, pool), name or path.resolve().name, max_cost_usd=cap)
    if path.is_file():
        from guerdon.routing.routers import load_router

        router = load_router(path)
        absent = [m for m in router.members if pool.resolve(m) is None]
        if absent:
            raise ConfigError(
                f"--router {spec} chooses among members that the pool does not have: {', '.join(absent)}; "
                "add them to the pool, or as aliases of its members"
            )
        return SingleRound(pool, router, name or path.stem)
    raise ConfigError(
        f"--router {spec}: no such file or folder; give the folder of a trained Router-R1, the file of a saved router, "
        f"member:NAME, or one of {', '.join(Rule.names)}"
    )
