"""Whatever happens to its calls, the ledger's sums are exactly what trajectories and replies report."""

import asyncio
import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.routing.budget import Budget
from guerdon.routing.cache import ReplyCache
from guerdon.routing.ledger import Ledger, nano_usd
from guerdon.routing.member import BackendError, Member, Outcome, RawReply, Reply
from guerdon.routing.pool import Pool
from guerdon.routing.retry import RetryPolicy
from guerdon.routing.whole import WholeBackend
from guerdon.types import Usage

tokens = st.none() | st.integers(0, 10_000)
raw = st.builds(RawReply, st.none() | st.just("a reply"), tokens, tokens, st.sampled_from([None, "m", "big"]))
failing = [Outcome.TIMEOUT, Outcome.SERVER_ERROR, Outcome.CLIENT_ERROR, Outcome.BAD_REPLY, Outcome.MISS]
failure = st.builds(lambda o, b: ("fail", o, b), st.sampled_from(failing), st.none() | raw)
event = raw | failure | st.sampled_from(["hang", "crash"])
prices = st.floats(0, 100, allow_nan=False).map(lambda x: round(x, 6))


class Scripted(WholeBackend):
    model = "m"
    bills_failures = True

    def __init__(self, name, script):
        self.identity, self.script = name, script

    def _next(self):
        return self.script.pop(0) if self.script else RawReply("more", 1, 1)

    async def complete(self, messages, **options):
        item = self._next()
        if item == "hang":
            await asyncio.Event().wait()
        if item == "crash":
            raise RuntimeError("crash")
        if isinstance(item, tuple):
            raise BackendError(item[1], "failed", billed=item[2])
        return item

    async def stream(self, messages, **options):
        item = self._next()
        yield "some "
        if item == "hang":
            yield "more"
            await asyncio.Event().wait()
        if item == "crash":
            raise RuntimeError("crash")
        if isinstance(item, tuple):
            raise BackendError(item[1], "failed", billed=item[2])
        yield item


calls = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", "nobody"]),
        st.sampled_from(["t1", "t2", None]),
        st.sampled_from(["q1", "q2", "q3"]),
        st.booleans(),  # streamed
    ),
    max_size=12,
)


async def _no_sleep(seconds):
    await asyncio.sleep(0)


async def play(scripts, price, plan, cache):
    members = [
        Member(
            name, input_price=price[2 * k], output_price=price[2 * k + 1], fallback="b" if name == "a" else None,
            served_prices={"big": (price[1], price[0])}, max_concurrency=2,
        )
        for k, name in enumerate("abc")
    ]  # fmt: skip
    pool = Pool(
        [(m, Scripted(m.name, list(s))) for m, s in zip(members, scripts, strict=True)],
        cache=cache,
        retry=RetryPolicy(attempts=2, base_s=0),
        sleep=_no_sleep,
        breaker=None,
    )
    reported: dict[str | None, Usage] = {}
    budget = Budget(max_usd=1e6)

    def book(trajectory, reply: Reply):
        used = Usage(1, reply.input_tokens, reply.output_tokens, reply.usd, reply.latency_s)
        reported[trajectory] = reported.get(trajectory, Usage()) + used

    async def one(name, trajectory, query, streamed):
        if not streamed:
            book(trajectory, await pool.call(name, query, trajectory_id=trajectory, budget=budget))
            return
        async for piece in pool.stream(name, query, trajectory_id=trajectory, budget=budget):
            if isinstance(piece, Reply):
                book(trajectory, piece)

    tasks = [asyncio.create_task(one(*c)) for c in plan]
    if tasks:
        await asyncio.wait(tasks, timeout=0.02)
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert outcome is None or isinstance(outcome, asyncio.CancelledError)
    # A cancelled call reports to nobody: what it cost is in the ledger all the same.
    for entry in pool.ledger:
        if entry.outcome == "cancelled":
            used = Usage(1, entry.input_tokens, entry.output_tokens, entry.usd, entry.latency_s)
            reported[entry.trajectory_id] = reported.get(entry.trajectory_id, Usage()) + used
    return pool, reported, budget


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[st.lists(event, max_size=8)] * 3),
    st.lists(prices, min_size=6, max_size=6),
    calls,
    st.booleans(),
)
def test_the_ledger_is_the_sum_of_the_trajectories(tmp_path_factory, scripts, price, plan, cached):
    cache = ReplyCache(tmp_path_factory.mktemp("cache") / "c.sqlite") if cached else None
    pool, reported, budget = asyncio.run(play(scripts, price, plan, cache))
    if cache is not None:
        cache.close()
    ledger = pool.ledger
    assert len(ledger) == len(ledger.entries) == len(plan)  # every call is one row
    assert set(ledger.trajectories()) == set(reported)
    for trajectory, used in reported.items():
        booked = ledger.of_trajectory(trajectory)
        assert (booked.calls, booked.input_tokens, booked.output_tokens) == (
            used.calls,
            used.input_tokens,
            used.output_tokens,
        )
        assert nano_usd(booked.usd) == nano_usd(used.usd)
    total = sum(e.nano_usd for e in ledger)
    assert ledger.total_nano_usd == total == sum(nano_usd(u.usd) for u in reported.values())
    assert total == sum(nano_usd(u.usd) for u in ledger.by_member().values())
    assert total == nano_usd(budget.spent_usd) and budget.remaining_usd == 1e6 - budget.spent_usd
    assert ledger.failed == sum(e.outcome != "ok" for e in ledger)
    for entry in ledger:
        assert not (entry.cached and not entry.charges and entry.nano_usd and entry.attempts == 0)


@given(st.lists(st.integers(0, 10**12), max_size=50), st.randoms())
def test_sums_do_not_depend_on_the_order(amounts, random):
    base = Reply("a", "a", None, None, 1, 1, False, 0.0, 1.0, 1.0, None, 0.0, 1, False, Outcome.OK)
    shuffled = list(amounts)
    random.shuffle(shuffled)
    books = Ledger(), Ledger()
    for ledger, order in zip(books, (amounts, shuffled), strict=True):
        for nano in order:
            ledger.book(replace(base, usd=nano / 1e9), "t")
    assert books[0].total == books[1].total and books[0].total_nano_usd == sum(amounts)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.booleans()), max_size=40), st.floats(0, 5))
def test_what_is_reserved_never_exceeds_the_cap(steps, cap):
    budget = Budget(max_usd=cap)
    open_: list[tuple[int, float]] = []
    for usd, share, close in steps:
        if close and open_:
            token, reserved = open_.pop()
            budget.settle(token, reserved * share)
        elif budget.can_reserve(usd):
            open_.append((budget.reserve(usd), usd))
        assert budget.remaining_usd >= 0
        held = math.fsum(r for _, r in open_)
        assert budget.spent_usd + held <= cap + 1e-9 * (len(steps) + 1)


@given(
    st.text(max_size=200),
    st.integers(1, 2000),
    st.lists(prices, min_size=4, max_size=4),
    st.integers(0, 3),
    st.integers(0, 2000),
)
def test_the_worst_case_covers_what_a_call_costs(text, limit, price, failures, made):
    """As long as an endpoint counts at most a token a byte (and a template's frame) and keeps to the limit."""
    size = len(text.encode("utf-8", "surrogatepass"))
    lost = ("fail", Outcome.TIMEOUT, RawReply(None, size + 16, min(made, limit)))
    backend = Scripted("a", [lost] * failures + [RawReply("fine", size + 80, min(made, limit), "big")])
    member = Member("a", input_price=price[0], output_price=price[1], served_prices={"big": (price[2], price[3])})
    pool = Pool([(member, backend)], retry=RetryPolicy(attempts=4, base_s=0), sleep=_no_sleep)
    budget = Budget(max_usd=pool.worst_case_usd("a", text, limit))
    reply = asyncio.run(pool.call("a", text, max_tokens=limit, budget=budget))
    assert reply.ok and reply.usd <= pool.worst_case_usd("a", text, limit) + 1e-12 and budget.remaining_usd >= 0
