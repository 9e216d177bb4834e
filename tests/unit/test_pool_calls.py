"""Calls of a pool: outcomes, retries, fallbacks, money, streams, views. Backends are scripted; nothing waits."""

import asyncio
import json
import logging
import time

import pytest

from guerdon.errors import ConfigError, PoolError, UnknownName
from guerdon.routing.backends import CallableBackend, FaultyBackend, PolicyBackend, RecordedBackend, read_recorded
from guerdon.routing.breaker import BreakerPolicy
from guerdon.routing.budget import Budget
from guerdon.routing.cache import ReplyCache
from guerdon.routing.faults import with_faults
from guerdon.routing.ledger import UNKNOWN, Ledger
from guerdon.routing.member import BackendError, Charge, Member, Outcome, RawReply
from guerdon.routing.pool import Pool, estimate_tokens
from guerdon.routing.retry import RetryPolicy
from guerdon.routing.whole import WholeBackend

GOOD = RawReply("Paris", 100, 50, "m-1")
DOWN = BackendError(Outcome.SERVER_ERROR, "HTTP 500")


class Scripted(WholeBackend):
    """Does one thing after the other; the last one for ever."""

    def __init__(self, *script, model="m-1", identity="scripted", bills_failures=True):
        self.script, self.model, self.identity, self.bills_failures = list(script), model, identity, bills_failures
        self.calls = []

    def _next(self, options):
        self.calls.append(options)
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]

    async def complete(self, messages, **options):
        item = self._next(options)
        if callable(item):
            item = await item()
        if isinstance(item, BaseException):
            raise item
        return item


class Streamed(Scripted):
    async def stream(self, messages, **options):
        for piece in self._next(options):
            if isinstance(piece, BaseException):
                raise piece
            if callable(piece):
                await piece()
            else:
                yield piece


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


def member(name="a", **change):
    return Member(**{"name": name, "input_price": 1.0, "output_price": 2.0, "price_date": "2026-01-15", **change})


def pool_of(*backends, clock=None, **options):
    clock = clock or Clock()
    pairs = [b if isinstance(b, tuple) else (member("abcdef"[k]), b) for k, b in enumerate(backends)]
    return Pool(pairs, clock=clock, sleep=clock.sleep, **options)


USD = (100 * 1.0 + 50 * 2.0) / 1e6


# ---- a call ----


async def test_a_reply_is_billed_and_booked():
    backend = Scripted(GOOD)
    pool = pool_of(backend)
    reply = await pool.call("a", "What is the capital of France?", max_tokens=9, seed=3, trajectory_id="t")
    assert reply.ok and reply.text == "Paris" and reply.model == "m-1" and not reply.model_mismatch
    assert (reply.input_tokens, reply.output_tokens, reply.usage_estimated) == (100, 50, False)
    assert reply.usd == USD and reply.price_date == "2026-01-15" and reply.attempts == 1
    assert backend.calls == [{"timeout": 60.0, "max_tokens": 9, "temperature": 0.0, "top_p": 1.0, "seed": 3}]
    (entry,) = pool.ledger
    assert entry.usd == USD and entry.trajectory_id == "t" and entry.outcome == "ok"
    assert pool.ledger.of_trajectory("t").usd == pool.ledger.total.usd == pool.ledger.by_member()["a"].usd == USD


async def test_the_members_own_defaults_hold_where_the_call_names_none():
    backend = Scripted(GOOD)
    pool = pool_of((member(max_tokens=77, temperature=0.1, top_p=0.9, timeout_s=3), backend))
    await pool.call("a", "x")
    assert backend.calls[0] == {"timeout": 3, "max_tokens": 77, "temperature": 0.1, "top_p": 0.9, "seed": None}
    with pytest.raises(ConfigError, match="max_tokens"):
        await pool.call("a", "x", max_tokens=0)


async def test_an_unknown_member_costs_nothing_and_is_booked():
    pool = pool_of(Scripted(GOOD))
    reply = await pool.call("aa" * 100, "x", trajectory_id="t")
    assert reply.outcome is Outcome.UNKNOWN_MEMBER and reply.usd == 0 and reply.attempts == 0
    for k in range(50):
        await pool.call(f"invented {k}", "x")
    assert set(pool.ledger.by_member()) == {UNKNOWN} and pool.ledger.by_member()[UNKNOWN].calls == 51
    assert pool.ledger.of_trajectory("t").calls == 1 and pool.ledger.failed == 51


async def test_usage_is_estimated_where_none_is_reported():
    pool = pool_of(Scripted(RawReply("abcdefghi")))
    reply = await pool.call("a", "12345678")
    assert (reply.input_tokens, reply.output_tokens, reply.usage_estimated) == (2, 3, True)
    exact = pool_of(Scripted(RawReply("a b c")), count_tokens=lambda text: len(text.split()))
    assert (await exact.call("a", "one two")).output_tokens == 3
    assert estimate_tokens("") == 0 and estimate_tokens("€") == 1 and estimate_tokens("\ud800") == 1


async def test_a_null_reply_is_empty_and_is_paid_once():
    pool = pool_of(Scripted(RawReply(None, 100, 50, "m-1", "content_filter")))
    reply = await pool.call("a", "x")
    assert reply.outcome is Outcome.EMPTY and reply.text is None and reply.usd == USD and reply.attempts == 1
    assert "content_filter" in reply.error and pool.ledger.failed == 1


@pytest.mark.parametrize(
    ("asked", "served", "mismatch"),
    [
        ("m-1", "m-1", False),
        ("M-1", "vendor/m-1", False),
        ("gpt", "gpt-2024-08-06", False),
        ("gpt", "gpt-0613", False),
        ("llama", "llama:latest", False),
        ("gpt", "gpt-mini", True),
        ("gpt", "gpt-32k", True),
        ("gpt", "other", True),
        ("gpt", None, False),
    ],
)
async def test_another_model_than_was_asked_is_flagged(asked, served, mismatch):
    reply = await pool_of(Scripted(RawReply("x", 1, 1, served), model=asked)).call("a", "x")
    assert reply.model_mismatch is mismatch and reply.model == served and reply.ok


async def test_the_model_that_answered_is_billed_where_its_price_is_known():
    served = {"big": (10.0, 20.0)}
    for model, factor, mismatch in (("big", 10, True), ("m-1", 1, False), ("strange", 1, True)):
        pool = pool_of((member(served_prices=served), Scripted(RawReply("x", 100, 50, model))))
        reply = await pool.call("a", "x")
        assert reply.usd == pytest.approx(factor * USD, rel=1e-12) and reply.model_mismatch is mismatch
        assert (reply.input_price, reply.output_price) == (1.0 * factor, 2.0 * factor)


# ---- retries ----


async def test_retries_wait_and_count_and_then_succeed():
    clock = Clock()
    backend = Scripted(DOWN, BackendError(Outcome.RATE_LIMITED, "429", retry_after=7.0), GOOD)
    reply = await pool_of(backend, clock=clock).call("a", "x")
    assert reply.ok and reply.attempts == 3 and reply.usd == USD
    assert 0 <= clock.slept[0] <= 0.5 and 7 <= clock.slept[1] <= 7.5
    assert reply.latency_s == pytest.approx(sum(clock.slept))


@pytest.mark.parametrize(
    ("outcome", "attempts"),
    [
        (Outcome.TIMEOUT, 3),
        (Outcome.RATE_LIMITED, 3),
        (Outcome.SERVER_ERROR, 3),
        (Outcome.CONNECTION, 3),
        (Outcome.CLIENT_ERROR, 1),
        (Outcome.BAD_REPLY, 1),
        (Outcome.MISS, 1),
    ],
)
async def test_only_what_may_pass_is_tried_again(outcome, attempts):
    pool = pool_of(Scripted(BackendError(outcome, "why")))
    reply = await pool.call("a", "x", trajectory_id="t")
    assert reply.outcome is outcome and reply.attempts == attempts and reply.usd == 0 and reply.text is None
    assert "why" in reply.error
    assert len(pool.ledger) == 1 and pool.ledger.of_trajectory("t").calls == 1


async def test_a_retry_after_beyond_the_cap_is_reported_and_not_waited_for():
    clock = Clock()
    reply = await pool_of(Scripted(BackendError(Outcome.RATE_LIMITED, "429", retry_after=3600.0)), clock=clock).call(
        "a", "x"
    )
    assert reply.attempts == 1 and clock.slept == [] and reply.retry_after == 3600.0


async def test_the_total_time_bounds_the_retries():
    clock = Clock()
    retry = RetryPolicy(attempts=100, base_s=10, max_s=10, total_s=25)
    reply = await pool_of(Scripted(DOWN), clock=clock, retry=retry, breaker=None).call("a", "x")
    assert clock.now <= 25 and 2 < reply.attempts < 100


async def test_a_deadline_bounds_the_attempt_and_the_retries():
    clock = Clock()
    backend = Scripted(DOWN)
    pool = pool_of(backend, clock=clock)
    clock.now = 10.0
    reply = await pool.call("a", "x", deadline=10.001)
    assert reply.attempts == 1 and backend.calls[0]["timeout"] == pytest.approx(0.001)
    late = await pool.call("a", "x", deadline=9.0)
    assert late.outcome is Outcome.TIMEOUT and late.attempts == 0


async def test_a_billed_failure_is_paid_although_another_attempt_follows():
    lost = BackendError(Outcome.TIMEOUT, "no reply", billed=RawReply(None, 100, None))
    reply = await pool_of(Scripted(lost, GOOD)).call("a", "x")
    assert reply.ok and reply.input_tokens == 200 and reply.output_tokens == 50
    assert reply.usd == pytest.approx((200 * 1 + 50 * 2) / 1e6)
    assert reply.usage_estimated  # nobody knows what the lost attempt wrote


async def test_an_exception_of_a_strange_backend_is_a_failed_call_without_its_key():
    pool = pool_of(Scripted(KeyError("lost sk-abcdef123456")), retry=RetryPolicy(attempts=1))
    reply = await pool.call("a", "x")
    assert reply.outcome is Outcome.SERVER_ERROR and "KeyError" in reply.error and "abcdef123456" not in reply.error


# ---- fallback ----


async def test_a_fallback_answers_and_is_billed_as_itself():
    pool = pool_of(
        (member("a", fallback="b"), Scripted(BackendError(Outcome.CLIENT_ERROR, "HTTP 401"))),
        (member("b", input_price=10.0, output_price=20.0), Scripted(GOOD)),
    )
    reply = await pool.call("a", "x")
    assert (reply.member, reply.answered_by, reply.ok) == ("a", "b", True)
    assert reply.usd == pytest.approx(10 * USD) and reply.input_price == 10.0 and reply.attempts == 2
    assert pool.ledger.by_member()["b"].usd == pytest.approx(10 * USD) and "a" not in pool.ledger.by_member()


async def test_a_paid_failure_and_its_fallback_are_both_paid_to_whom_they_belong():
    pool = pool_of(
        (member("a", fallback="b"), Scripted(RawReply(None, 10, 20))),
        (member("b", fallback="c"), Scripted(DOWN)),
        (member("c", input_price=10.0, output_price=20.0), Scripted(GOOD)),
    )
    reply = await pool.call("a", "x", trajectory_id="t")
    assert reply.answered_by == "c" and reply.charges == (
        Charge("a", None, 10, 20, 50_000),
        Charge("c", "m-1", 100, 50, 2_000_000),
    )
    sums = pool.ledger.by_member()
    assert (sums["a"].usd, sums["c"].usd) == (50e-6, 2e-3) and (sums["a"].calls, sums["c"].calls) == (0, 1)
    assert sum(u.usd for u in sums.values()) == pytest.approx(reply.usd)
    assert pool.ledger.of_trajectory("t").usd == reply.usd == pool.ledger.total.usd


async def test_when_the_fallback_fails_as_well_both_reasons_are_told():
    pool = pool_of(
        (member("a", fallback="b"), Scripted(BackendError(Outcome.CLIENT_ERROR, "HTTP 401"))),
        (member("b"), Scripted(BackendError(Outcome.BAD_REPLY, "HTML"))),
    )
    reply = await pool.call("a", "x")
    assert reply.outcome is Outcome.BAD_REPLY and reply.error == "a: HTTP 401 / b: HTML"


# ---- breaker, concurrency ----


async def test_an_open_breaker_saves_the_attempt_and_lets_the_fallback_answer():
    down = Scripted(BackendError(Outcome.BAD_REPLY, "HTML"))
    clock = Clock()
    pool = pool_of((member("a", fallback="b"), down), (member("b"), Scripted(GOOD)), clock=clock)
    for _ in range(5):
        assert (await pool.call("a", "x")).ok
    assert pool.breakers == {"a": "open", "b": "closed"} and len(down.calls) == 5
    assert (await pool.call("a", "x")).answered_by == "b" and len(down.calls) == 5
    clock.now += 5
    assert pool.breakers["a"] == "half_open"
    down.script = [GOOD]
    assert (await pool.call("a", "x")).answered_by == "a" and pool.breakers["a"] == "closed"


async def test_breaker_open_is_an_outcome_with_a_time():
    pool = pool_of(Scripted(BackendError(Outcome.BAD_REPLY, "HTML")))
    for _ in range(5):
        await pool.call("a", "x")
    reply = await pool.call("a", "x")
    assert reply.outcome is Outcome.BREAKER_OPEN and reply.retry_after == 5 and reply.attempts == 0


@pytest.mark.parametrize("outcome", [Outcome.CLIENT_ERROR, Outcome.MISS])
async def test_refusals_and_misses_do_not_open_a_breaker(outcome):
    pool = pool_of(Scripted(BackendError(outcome, "no")))
    for _ in range(20):
        await pool.call("a", "x")
    assert pool.breakers["a"] == "closed"


async def test_a_caller_in_a_hurry_does_not_open_the_breaker_for_the_others():
    pool = pool_of(Scripted(BackendError(Outcome.TIMEOUT, "no reply")), retry=RetryPolicy(attempts=1))
    for _ in range(20):
        await pool.call("a", "x", deadline=0.001)
    assert pool.breakers["a"] == "closed"
    for _ in range(5):
        await pool.call("a", "x", deadline=1e9)
    assert pool.breakers["a"] == "open"


async def test_no_more_calls_at_once_than_the_member_allows():
    running = most = 0

    async def slow():
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return GOOD

    pool = Pool([(member(max_concurrency=3), Scripted(slow))])
    view = pool.view(rename={"a": "z"})
    replies = await asyncio.gather(*(pool.call("a", "x") for _ in range(10)), *(view.call("z", "x") for _ in range(10)))
    assert most == 3 and all(r.ok for r in replies)


async def test_waiting_for_a_place_ends_with_the_deadline():
    gate = asyncio.Event()

    async def hang():
        await gate.wait()
        return GOOD

    pool = Pool([(member(max_concurrency=1), Scripted(hang))])
    first = asyncio.create_task(pool.call("a", "x"))
    await asyncio.sleep(0)
    reply = await pool.call("a", "x", deadline=time.monotonic() + 0.01)
    assert reply.outcome is Outcome.TIMEOUT and reply.attempts == 0 and reply.usd == 0
    gate.set()
    assert (await first).ok and (await pool.call("a", "x")).ok  # the place was given back


def test_one_pool_serves_several_event_loops():
    pool = Pool([(member(max_concurrency=1), Scripted(GOOD))])

    async def three():
        return await asyncio.gather(*(pool.call("a", "x") for _ in range(3)))

    for _ in range(2):
        assert all(r.ok for r in asyncio.run(three()))


# ---- money ----


async def test_a_call_that_might_not_fit_is_not_made():
    backend = Scripted(GOOD, bills_failures=False)
    pool = pool_of(backend)
    worst = pool.worst_case_usd("a", "x" * 20, 50)
    assert worst == pytest.approx(((20 + 16 + 64) * 1.0 + 50 * 2.0) / 1e6)
    budget = Budget(max_usd=1.5 * worst)
    assert (await pool.call("a", "x" * 20, max_tokens=50, budget=budget)).ok
    assert budget.spent_usd == USD and budget.remaining_usd == pytest.approx(1.5 * worst - USD)
    reply = await pool.call("a", "x" * 20, max_tokens=50, budget=budget)
    assert reply.outcome is Outcome.BUDGET and reply.usd == 0 and len(backend.calls) == 1
    assert "is left" in reply.error and len(pool.ledger) == 1


async def test_concurrent_calls_cannot_slip_under_the_cap_together():
    gate = asyncio.Event()

    async def wait():
        await gate.wait()
        return GOOD

    pool = pool_of((member(max_concurrency=50), Scripted(wait, bills_failures=False)))
    budget = Budget(max_usd=3.5 * pool.worst_case_usd("a", "x", 50))
    tasks = [asyncio.create_task(pool.call("a", "x", max_tokens=50, budget=budget)) for _ in range(10)]
    await asyncio.sleep(0.01)
    gate.set()
    outcomes = [r.outcome for r in await asyncio.gather(*tasks)]
    assert outcomes.count(Outcome.OK) == 3 and outcomes.count(Outcome.BUDGET) == 7


def test_the_worst_case_counts_retries_fallbacks_and_dearer_models():
    pool = pool_of(
        (member("a", fallback="b", served_prices={"big": (5.0, 50.0)}), Scripted(GOOD)),
        (member("b", max_tokens=10), Scripted(GOOD, bills_failures=False)),
        retry=RetryPolicy(attempts=4),
    )
    text = "é" * 10  # 20 bytes
    a, b = (100 * 5.0 + 7 * 50.0) / 1e6, (100 * 1.0 + 7 * 2.0) / 1e6
    assert pool.worst_case_usd("a", text, 7) == pytest.approx(4 * a + b)
    assert pool.worst_case_usd("b", [{"role": "user", "content": text}]) == pytest.approx((100 + 10 * 2.0) / 1e6)
    with pytest.raises(UnknownName):
        pool.worst_case_usd("c", text, 7)


async def test_a_budgets_deadline_is_the_calls_deadline():
    clock = Clock()
    backend = Scripted(GOOD)
    pool = pool_of(backend, clock=clock)
    await pool.call("a", "x", budget=Budget(deadline_s=2, clock=clock))
    assert backend.calls[0]["timeout"] == 2


async def test_a_cancelled_call_is_booked_with_its_input():
    started = asyncio.Event()

    async def hang():
        started.set()
        await asyncio.Event().wait()

    pool, budget = Pool([(member(), Scripted(hang))]), Budget(max_usd=1.0)
    task = asyncio.create_task(pool.call("a", "x" * 400, trajectory_id="t", budget=budget))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (entry,) = pool.ledger
    assert entry.outcome == "cancelled" and entry.input_tokens == 100 and entry.usage_estimated
    assert entry.usd == 100e-6 == budget.spent_usd and budget.remaining_usd == pytest.approx(1 - 100e-6)
    assert pool.breakers["a"] == "closed"


async def test_a_call_cancelled_while_it_waits_for_a_retry_costs_nothing():
    async def forever(seconds):
        await asyncio.Event().wait()

    pool = Pool([(member(), Scripted(DOWN))], sleep=forever)
    task = asyncio.create_task(pool.call("a", "x"))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    (entry,) = pool.ledger
    assert entry.outcome == "cancelled" and entry.usd == 0 and entry.attempts == 1


# ---- streams ----


async def collect(stream):
    return [piece async for piece in stream]


async def test_a_stream_gives_pieces_and_then_the_reply():
    pool = pool_of(Streamed(["Pa", "", "ris", GOOD]))
    *pieces, reply = await collect(pool.stream("a", "x", trajectory_id="t"))
    assert pieces == ["Pa", "ris"] and reply.ok and reply.text == "Paris" and reply.usd == USD
    assert pool.ledger.of_trajectory("t").usd == USD


async def test_a_stream_that_fails_before_any_text_is_tried_again_and_falls_back():
    pool = pool_of((member("a", fallback="b"), Streamed([DOWN])), (member("b"), Streamed([DOWN], ["Paris", GOOD])))
    *pieces, reply = await collect(pool.stream("a", "x"))
    assert pieces == ["Paris"] and reply.answered_by == "b" and reply.attempts == 5 and reply.usd == USD


async def test_a_stream_that_fails_later_ends_there_and_is_paid():
    pool = pool_of(
        (member("a", fallback="b"), Streamed(["x" * 8, BackendError(Outcome.BAD_REPLY, "broke off")])), Scripted(GOOD)
    )
    *pieces, reply = await collect(pool.stream("a", "y" * 40))
    assert pieces == ["x" * 8] and reply.outcome is Outcome.BAD_REPLY and reply.text == "x" * 8
    assert reply.answered_by == "a" and (reply.input_tokens, reply.output_tokens) == (10, 2) and reply.usage_estimated
    assert pool.ledger.total.usd == pytest.approx((10 + 2 * 2) / 1e6)


async def test_a_stream_without_an_end_or_without_text():
    odd = pool_of(Streamed([]))
    assert [p.outcome for p in await collect(odd.stream("a", "x"))] == [Outcome.BAD_REPLY]
    null = pool_of(Streamed([RawReply(None, 100, 50)]))
    (reply,) = await collect(null.stream("a", "x"))
    assert reply.outcome is Outcome.EMPTY and reply.usd == USD
    unknown = await collect(null.stream("z", "x"))
    assert unknown[0].outcome is Outcome.UNKNOWN_MEMBER


async def test_a_consumer_that_goes_away_pays_what_came():
    closed = []

    class Watched(Streamed):
        async def stream(self, messages, **options):
            try:
                yield "x" * 40
                await asyncio.Event().wait()
            finally:
                closed.append(True)

    pool, budget = Pool([(member(max_concurrency=1), Watched([]))]), Budget(max_usd=1)
    stream = pool.stream("a", "y" * 400, budget=budget)
    assert await anext(stream) == "x" * 40
    await stream.aclose()
    (entry,) = pool.ledger
    assert closed == [True]
    assert entry.outcome == "cancelled" and (entry.input_tokens, entry.output_tokens) == (100, 10)
    assert budget.spent_usd == entry.usd == pytest.approx(120e-6)
    again = pool.stream("a", "y")
    assert await anext(again) == "x" * 40  # the place was given back
    await again.aclose()


async def test_a_stream_is_cut_at_the_deadline_and_the_breaker_does_not_mind():
    async def hang():
        await asyncio.Event().wait()

    pool = Pool([(member(), Streamed(["abcd", hang]))])
    *pieces, reply = await collect(pool.stream("a", "x", deadline=time.monotonic() + 0.02))
    assert pieces == ["abcd"] and reply.outcome is Outcome.TIMEOUT and reply.output_tokens == 1
    assert pool.breakers["a"] == "closed"


# ---- cache ----


async def test_a_cached_reply_is_free_and_booked(tmp_path):
    backend = Scripted(GOOD)
    pool = pool_of(backend, cache=ReplyCache(tmp_path / "c.sqlite"))
    first = await pool.call("a", "x", trajectory_id="t")
    second = await pool.call("a", "x", trajectory_id="t")
    assert first.usd == USD and not first.cached
    assert second.ok and second.cached and second.usd == 0 and second.attempts == 0 and second.text == "Paris"
    assert (second.input_tokens, second.output_tokens) == (100, 50) and len(backend.calls) == 1
    assert pool.ledger.of_trajectory("t").calls == 2 and pool.ledger.total.usd == USD
    assert [p if isinstance(p, str) else p.cached for p in await collect(pool.stream("a", "x"))] == ["Paris", True]
    for other in ({"max_tokens": 5}, {"temperature": 0.5}, {"seed": 1}, {"top_p": 0.5}):
        assert not (await pool.call("a", "x", **other)).cached
    assert not (await pool.call("a", "y")).cached
    assert (await pool.view(rename={"a": "z"}).call("z", "x")).cached  # the same endpoint by another name
    await pool.aclose()


async def test_failures_are_not_cached_and_unidentified_backends_neither(tmp_path):
    cache = ReplyCache(tmp_path / "c.sqlite")
    pool = pool_of(Scripted(RawReply(None, 1, 1), GOOD), Scripted(GOOD, identity=None), cache=cache)
    assert (await pool.call("a", "x")).outcome is Outcome.EMPTY
    assert not (await pool.call("a", "x")).cached and (await pool.call("a", "x")).cached
    await pool.call("b", "x")
    assert not (await pool.call("b", "x")).cached
    await pool.aclose()


async def test_a_cache_that_breaks_under_way_is_left_out_and_nothing_is_lost(tmp_path, caplog):
    cache = ReplyCache(tmp_path / "c.sqlite")
    pool = pool_of(Scripted(GOOD), cache=cache)

    async def broken(key, reply):
        raise PoolError("the reply cache is full")

    cache.put = broken
    with caplog.at_level(logging.WARNING):
        assert (await pool.call("a", "x")).usd == USD and (await pool.call("a", "x")).usd == USD
    assert len(pool.ledger) == 2 and caplog.text.count("the reply cache is full; going on without it") == 1
    cache.close()


# ---- pools and views ----


def test_a_pool_names_all_that_is_wrong_with_it():
    def make(*members):
        return Pool([(m, Scripted(GOOD)) for m in members])

    with pytest.raises(ConfigError, match="at least one member"):
        Pool([])
    with pytest.raises(ConfigError, match="'a' is given twice"):
        make(member("a"), member("a"))
    with pytest.raises(ConfigError, match="stands for both 'Big' and 'b'"):
        make(member("Big"), member("b", aliases=("BIG",)))
    with pytest.raises(ConfigError, match="unknown member 'bb'; did you mean b"):
        make(member("a", fallback="bb"), member("b"))
    with pytest.raises(ConfigError, match="a -> b -> c -> a run in a circle"):
        make(member("a", fallback="b"), member("b", fallback="c"), member("c", fallback="a"))
    with pytest.raises(ConfigError, match="b -> c -> b run in a circle"):
        make(member("a", fallback="b"), member("b", fallback="c"), member("c", fallback="b"))
    with pytest.raises(ConfigError, match="needs a backend or a function, got int"):
        Pool([(member("a"), 3)])
    with pytest.raises(ConfigError) as caught:
        make(member("a", fallback="z"), member("A"), member("a"))
    assert len(caught.value.problems) == 3


def test_names_are_resolved_exactly_up_to_case_and_blanks():
    pool = pool_of((member("Qwen2.5-7B", aliases=("qwen",)), Scripted(GOOD)), (member("Llama"), Scripted(GOOD)))
    assert pool.resolve(" qwen2.5-7b ") == pool.resolve("QWEN") == "Qwen2.5-7B" and pool.resolve("Qwen2.5-72B") is None
    assert list(pool) == ["Qwen2.5-7B", "Llama"] and "qwen" not in pool and pool["Llama"].output_price == 2.0
    with pytest.raises(UnknownName, match="did you mean Llama"):
        pool["Lama"]
    lenient = pool_of(Scripted(GOOD), resolver=lambda text: "a" if "a" in text else "nobody")
    assert lenient.resolve("banana") == "a" and lenient.resolve("x") is None


async def test_a_view_renames_reprices_and_redescribes_and_shares_the_books():
    pool = pool_of(Scripted(GOOD), (member("b", fallback="a", descriptor="old"), Scripted(GOOD)), Scripted(GOOD))
    view = pool.view(
        members=["b", "a"], rename={"a": "n1", "b": "n2"}, reprice={"a": (3.0, 4.0)}, descriptors={"b": "new"}
    )
    assert list(view) == ["n2", "n1"] and view["n2"].fallback == "n1" and view["n2"].descriptor == "new"
    assert (await view.call("n1", "x")).usd == pytest.approx((100 * 3 + 50 * 4) / 1e6)
    assert view.ledger is pool.ledger and len(pool.ledger) == 1 and view.resolve("N1") == "n1"
    assert list(pool) == ["a", "b", "c"] and pool["b"].descriptor == "old" and pool["a"].input_price == 1.0
    assert pool.view(members=["b"])["b"].fallback is None
    swapped = pool.view(rename={"a": "b", "b": "a"})
    assert list(swapped) == ["b", "a", "c"] and swapped["a"].fallback == "b"
    more = view.view(add=[(member("n3", fallback="n1"), lambda q: "hello")])
    assert (await more.call("n3", "x")).text == "hello" and "n3" not in view
    with pytest.raises(ConfigError, match="'n1' is given twice"):
        view.view(rename={"n2": "n1"})
    with pytest.raises(ConfigError, match="unknown member 'nobody'"):
        view.view(add=[(member("n3", fallback="nobody"), lambda q: q)])
    with pytest.raises(UnknownName, match="zz"):
        view.view(members=["zz"])
    with pytest.raises(ConfigError, match="output_price=-1"):
        view.view(reprice={"n1": (1.0, -1.0)})


def test_the_fingerprint_sees_what_matters():
    pool = pool_of(Scripted(GOOD, identity="x"), Scripted(GOOD, identity="y"))
    same = pool_of(Scripted(GOOD, identity="x"), Scripted(GOOD, identity="y"))
    assert pool.fingerprint() == same.fingerprint()
    changed = [
        pool.view(reprice={"a": (1.0, 3.0)}),
        pool.view(descriptors={"a": "other"}),
        pool.view(members=["b", "a"]),
        pool.view(rename={"a": "z"}),
        pool_of(Scripted(GOOD, identity="other"), Scripted(GOOD, identity="y")),
    ]
    assert len({p.fingerprint() for p in [pool, *changed]}) == 6


async def test_check_names_every_missing_key(monkeypatch):
    from guerdon.routing.http_client import HttpBackend
    from guerdon.routing.secrets import Secret

    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    monkeypatch.setenv("A_KEY", "k")

    def http(**options):
        return HttpBackend("http://127.0.0.1:9/v1", "m", **options)

    pool = pool_of(
        http(api_key=Secret("NO_SUCH_KEY")), http(api_key=Secret("A_KEY")), http(headers={"x": "${OTHER_KEY}"})
    )
    with pytest.raises(PoolError, match=r"member 'a'.*NO_SUCH_KEY.*member 'c'.*OTHER_KEY"):
        async with pool:
            raise AssertionError("must not be entered")
    reply = await pool.call("a", "x")
    assert reply.outcome is Outcome.CLIENT_ERROR and "NO_SUCH_KEY" in reply.error
    await pool.aclose()


# ---- backends in this process ----


async def test_functions_of_every_kind():
    async def later(q):
        await asyncio.sleep(0)
        return f"later {q}", 4

    pool = Pool(
        [
            (member("a"), lambda q: q.upper()),
            (member("b"), later),
            (member("c"), CallableBackend(lambda q: time.sleep(0.02) or "slept", blocking=True)),
            (member("d"), lambda q: RawReply("raw", 1, 2, "m")),
            (member("e"), lambda q: {"text": q}),
            (member("f"), lambda q: 1 / 0),
            (member("g"), lambda q: None),
            (member("h"), lambda q: ("x", -1)),
        ],
        retry=RetryPolicy(attempts=1),
    )
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    replies = {n: await pool.call(n, messages) for n in pool}
    assert replies["a"].text == "HI" and replies["b"].text == "later hi" and replies["b"].output_tokens == 4
    assert replies["c"].text == "slept" and replies["d"].input_tokens == 1
    assert replies["e"].outcome is Outcome.BAD_REPLY and "dict" in replies["e"].error
    assert replies["f"].outcome is Outcome.SERVER_ERROR and "ZeroDivisionError" in replies["f"].error
    assert replies["g"].outcome is Outcome.EMPTY and replies["h"].outcome is Outcome.BAD_REPLY


async def test_a_blocking_function_neither_holds_up_the_loop_nor_outlives_its_time():
    pool = Pool(
        [(member(timeout_s=0.05), CallableBackend(lambda q: time.sleep(0.3), blocking=True))],
        retry=RetryPolicy(attempts=1),
    )
    began = time.monotonic()
    replies = await asyncio.gather(*(pool.call("a", "x") for _ in range(3)))
    assert all(r.outcome is Outcome.TIMEOUT for r in replies) and time.monotonic() - began < 0.25


async def test_recorded_replies_are_exact_then_near_then_a_miss():
    class Encoder:
        def encode(self, texts):
            import numpy as np

            rows = np.array([[float("capital" in t), float("currency" in t), 0.1] for t in texts])
            return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    replies = {"capital of France": ("Paris", 7), "currency of Peru": "sol"}
    exact = RecordedBackend(replies)
    pool = Pool([(member("a"), exact), (member("b"), RecordedBackend(replies, encoder=Encoder()))])
    assert (await pool.call("a", " capital  of France\n")).output_tokens == 7
    missed = await pool.call("a", "the capital of France")
    assert missed.outcome is Outcome.MISS and missed.text is None and missed.usd == 0 and missed.attempts == 1
    assert (await pool.call("b", "the capital of France")).text == "Paris"
    assert (await pool.call("b", "the river of France")).outcome is Outcome.MISS
    assert (exact.exact, exact.near, exact.missed) == (1, 0, 1) and pool.breakers["a"] == "closed"


def test_recordings_are_read_from_jsonl_and_csv(tmp_path):
    rows = [
        {"member": "a", "query": "q1", "reply": "r1", "output_tokens": 3, "input_tokens": 5, "model": "m"},
        {"member": "b", "query": "q1", "reply": "r2"},
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    (tmp_path / "r.csv").write_text('member,query,reply,output_tokens\na,q1,"r,1",3\nb,q1,r2,\n')
    assert read_recorded(tmp_path / "r.jsonl")["a"]["q1"] == RawReply("r1", 5, 3, "m")
    assert read_recorded(tmp_path / "r.csv") == {"a": {"q1": RawReply("r,1", None, 3)}, "b": {"q1": RawReply("r2")}}
    (tmp_path / "wide.csv").write_text("prompt,x_response\nq1,r1\n")
    assert read_recorded(tmp_path / "wide.csv", query="prompt", reply="x_response") == {"": {"q1": RawReply("r1")}}
    (tmp_path / "bad.jsonl").write_text(
        '{"member": "a", "query": "q"}\n[1]\n{"member": "a", "query": "q", "reply": "r", "output_tokens": -1}'
    )
    with pytest.raises(ValueError, match=r"row 1 has no 'reply'; row 2 is no object; row 3 has token counts"):
        read_recorded(tmp_path / "bad.jsonl")
    (tmp_path / "empty.csv").write_text("")
    for name in ("empty.csv", "absent.csv"):
        with pytest.raises(ValueError, match=name):
            read_recorded(tmp_path / name)


async def test_a_policy_is_loaded_once_when_it_is_first_asked():
    from guerdon.types import StopReason

    loads = []

    class Engine:
        max_context = 20
        tokenizer = type("T", (), {"all_special_tokens": ["<eos>"]})()
        policy = type("P", (), {"render": staticmethod(lambda messages: list(range(len(messages[-1]["content"]))))})()
        closed = False

        def start(self, messages, ids):
            return self

        async def generate(self, sampling):
            self.sampling = sampling
            return type("C", (), {"text": " Paris<eos>", "token_ids": (1, 2), "stop": StopReason.EOS})()

        def close(self):
            pass

        async def aclose(self):
            self.closed = True

    engine = Engine()
    pool = Pool([(member(), PolicyBackend(lambda: loads.append(1) or engine))])
    replies = await asyncio.gather(*(pool.call("a", "x" * 10, max_tokens=50) for _ in range(3)))
    assert loads == [1] and {r.text for r in replies} == {"Paris"}
    assert (replies[0].input_tokens, replies[0].output_tokens, replies[0].finish_reason) == (10, 2, "stop")
    assert engine.sampling.max_tokens == 10  # what is left of the context
    long = await pool.call("a", "x" * 20)
    assert long.outcome is Outcome.CLIENT_ERROR and "20 tokens" in long.error
    await pool.aclose()
    assert engine.closed


# ---- faults ----


async def test_faults_come_at_their_rates_and_do_not_depend_on_the_order():
    rates = {"timeout": 0.2, "null": 0.2, "forged_answer": 0.1, "wrong_model": 0.1}

    async def outcomes(order):
        backend = FaultyBackend(CallableBackend(lambda q: "fine"), rates, seed=3)
        pool = Pool([(member(), backend)], retry=RetryPolicy(attempts=1), breaker=None)
        replies = {k: await pool.call("a", f"question {k}") for k in order}
        return {k: (r.outcome, r.text, r.model_mismatch) for k, r in sorted(replies.items())}

    forth, back = await outcomes(range(800)), await outcomes(range(799, -1, -1))
    assert forth == back
    share = {o: sum(v[0] is o for v in forth.values()) / 800 for o in Outcome}
    assert share[Outcome.TIMEOUT] == pytest.approx(0.2, abs=0.05) and share[Outcome.EMPTY] == pytest.approx(
        0.2, abs=0.05
    )
    assert sum("<answer>" in (v[1] or "") for v in forth.values()) / 800 == pytest.approx(0.1, abs=0.04)
    assert sum(v[2] for v in forth.values()) / 800 == pytest.approx(0.1, abs=0.04)


async def test_a_retry_draws_anew_and_members_fail_apart():
    pool = with_faults(
        Pool(
            [(member("a"), lambda q: "fine"), (member("b"), lambda q: "fine")],
            retry=RetryPolicy(base_s=0),
            breaker=None,
        ),
        {"500": 0.5},
    )
    replies = [[await pool.call(n, f"q{k}") for k in range(200)] for n in ("a", "b")]
    for row in replies:
        assert sum(r.ok for r in row) / 200 == pytest.approx(1 - 0.5**3, abs=0.08)
    assert [r.attempts for r in replies[0]] != [r.attempts for r in replies[1]]
    with pytest.raises(ConfigError, match="did you mean timeout"):
        FaultyBackend(CallableBackend(str), {"timeot": 0.1})
    with pytest.raises(ConfigError, match="at most 1"):
        FaultyBackend(CallableBackend(str), {"null": 0.6, "html": 0.6})


async def test_the_breaker_can_be_tuned_or_left_out():
    tuned = pool_of(Scripted(BackendError(Outcome.BAD_REPLY, "x")), breaker=BreakerPolicy(min_calls=1))
    await tuned.call("a", "x")
    assert tuned.breakers["a"] == "open"
    without = pool_of(Scripted(BackendError(Outcome.BAD_REPLY, "x")), breaker=None)
    for _ in range(20):
        await without.call("a", "x")
    assert without.breakers["a"] == "closed"


async def test_a_call_costs_little():
    pool = Pool([(member(), lambda q: ("fine", 3))], ledger=Ledger(keep=10))

    async def cpu(calls):
        began = time.process_time()
        for _ in range(calls):
            await pool.call("a", "what is the capital of France", trajectory_id="t")
        return (time.process_time() - began) / calls

    assert min([await cpu(200) for _ in range(8)]) < 60e-6
