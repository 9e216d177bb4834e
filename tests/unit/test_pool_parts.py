"""Retry, breaker, budget, secrets, members: the small parts of the pool, each by itself."""

import asyncio
import email.utils
import math
import random
import threading

import pytest

from guerdon.errors import BudgetExceeded, ConfigError, PoolError
from guerdon.routing.breaker import Breaker, BreakerPolicy
from guerdon.routing.budget import Budget
from guerdon.routing.member import Member
from guerdon.routing.retry import RetryPolicy, parse_retry_after
from guerdon.routing.secrets import Secret, expand, scrub


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# ---- retry ----


def test_backoff_is_full_jitter_below_a_doubling_bound():
    policy, rng = RetryPolicy(attempts=6, base_s=1.0, max_s=4.0), random.Random(0)
    for attempt, bound in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 4.0), (5, 4.0)):
        waits = [policy.wait(attempt, None, rng) for _ in range(300)]
        assert 0 <= min(waits) < 0.1 * bound and 0.9 * bound < max(waits) <= bound
    assert policy.wait(6, None, rng) is None


def test_retry_after_is_waited_in_full_and_ends_the_retries_beyond_the_cap():
    policy = RetryPolicy(attempts=3, base_s=0.5, max_retry_after_s=30)
    assert 7 <= policy.wait(1, 7.0, random.Random(1)) <= 7.5
    assert policy.wait(1, 31.0, random.Random(1)) is None


def test_retry_after_header():
    now = 1_800_000_000.0
    assert parse_retry_after("7") == 7.0 and parse_retry_after("0.25") == 0.25
    assert parse_retry_after(email.utils.formatdate(now + 12, usegmt=True), now) == pytest.approx(12)
    assert parse_retry_after(email.utils.formatdate(now + 12), now) == pytest.approx(12)  # zone -0000
    assert parse_retry_after(email.utils.formatdate(now - 12, usegmt=True), now) == 0.0
    assert parse_retry_after("-3") == 0.0
    for junk in (None, "", "soon", "nan", "Mon, 99 Foo"):
        assert parse_retry_after(junk, now) is None


@pytest.mark.parametrize("bad", [{"attempts": 0}, {"base_s": -1}, {"total_s": math.inf}])
def test_retry_settings_are_checked(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        RetryPolicy(**bad)


# ---- breaker ----


def feed(breaker, *results):
    for ok in results:
        ticket = breaker.enter()
        if ticket is not None:
            breaker.record(ticket, ok)


def test_it_opens_above_half_of_at_least_five():
    breaker = Breaker(clock=Clock())
    feed(breaker, False, False, False, False)
    assert breaker.state == "closed"  # four are too few
    feed(breaker, False)
    assert breaker.state == "open" and breaker.enter() is None
    even = Breaker(clock=Clock())
    feed(even, *[True, False] * 10)
    assert even.state == "closed"  # half is not more than half


def test_old_results_are_forgotten_but_an_unbroken_row_of_failures_is_not():
    clock = Clock()
    breaker = Breaker(BreakerPolicy(window_s=10, consecutive=8), clock=clock)
    for _ in range(7):
        feed(breaker, False)
        clock.now += 11
    assert breaker.state == "closed"  # never two in one window
    feed(breaker, False)
    assert breaker.state == "open"


def test_a_busy_endpoint_costs_no_more_memory_than_a_quiet_one():
    clock = Clock()
    breaker = Breaker(BreakerPolicy(window_s=60), clock=clock)
    for k in range(20_000):
        feed(breaker, k % 3 != 0)
        clock.now += 0.01
    assert len(breaker._counts) <= 66
    assert breaker._seen == pytest.approx(6000, rel=0.02)  # a minute's results, however many came before
    assert breaker._failed == pytest.approx(2000, rel=0.02)


def test_one_probe_after_the_cooldown_decides():
    clock = Clock()
    breaker = Breaker(BreakerPolicy(min_calls=1, cooldown_s=5, max_cooldown_s=8), clock=clock)
    feed(breaker, False)
    assert breaker.retry_after == 5
    clock.now += 5
    assert breaker.state == "half_open"
    probe = breaker.enter()
    assert probe is not None and breaker.enter() is None  # one only
    breaker.record(probe, False)
    assert breaker.state == "open" and breaker.retry_after == 8  # doubled, up to the cap
    clock.now += 8
    feed(breaker, True)
    assert breaker.state == "closed" and breaker.retry_after == 0
    feed(breaker, True, True, True, False)
    assert breaker.state == "closed"  # the past is forgotten


def test_a_cancelled_probe_makes_room_for_the_next():
    clock = Clock()
    breaker = Breaker(BreakerPolicy(min_calls=1), clock=clock)
    feed(breaker, False)
    clock.now += 5
    breaker.release(breaker.enter())
    assert breaker.enter() is not None


def test_stragglers_from_before_it_opened_do_not_count():
    clock = Clock()
    breaker = Breaker(BreakerPolicy(min_calls=1, cooldown_s=5), clock=clock)
    tickets = [breaker.enter() for _ in range(4)]
    for ticket in tickets[:3]:
        breaker.record(ticket, False)
    assert breaker.retry_after == 5  # opened once, not three times
    breaker.record(tickets[3], True)
    assert breaker.state == "open"


# ---- budget ----


def test_reservations_count_until_they_are_settled():
    budget = Budget(max_usd=0.1)
    a, b = budget.reserve(0.04), budget.reserve(0.06)
    assert budget.remaining_usd == 0.0 and not budget.can_reserve(1e-9)
    with pytest.raises(BudgetExceeded, match=r"up to \$0\.010000, \$0\.000000 is left"):
        budget.reserve(0.01)
    budget.settle(a, 0.01)
    assert budget.remaining_usd == pytest.approx(0.03)
    budget.settle(b, 0.0)
    assert budget.spent_usd == 0.01 and budget.calls == 2
    with pytest.raises(ValueError, match="settled already"):
        budget.settle(a, 0.0)


def test_a_cap_that_is_met_exactly_is_met():
    budget = Budget(max_usd=0.3)
    for _ in range(3):
        budget.settle(budget.reserve(0.1), 0.1)  # 0.1 + 0.1 + 0.1 > 0.3 in floats
    assert budget.remaining_usd == 0.0 and budget.can_reserve(0.0)


def test_calls_and_time_are_capped_too():
    clock = Clock()
    budget = Budget(max_calls=2, deadline_s=10, clock=clock)
    assert budget.remaining_usd == math.inf
    token = budget.reserve(5.0)
    budget.reserve(5.0)
    with pytest.raises(BudgetExceeded, match="all 2 calls"):
        budget.reserve(0.0)
    budget.settle(token, 1.0)
    assert not budget.can_reserve(0.0)  # a settled call is still a call
    late = Budget(deadline_s=10, clock=clock)
    clock.now += 10
    with pytest.raises(BudgetExceeded, match="time"):
        late.reserve(0.0)


def test_threads_cannot_pass_the_cap_together():
    budget, granted = Budget(max_usd=1.0), []

    def grab() -> None:
        for _ in range(200):
            try:
                granted.append(budget.reserve(0.01))
            except BudgetExceeded:
                return

    threads = [threading.Thread(target=grab) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(granted) == 100


@pytest.mark.parametrize("bad", [{"max_usd": -1}, {"max_usd": math.nan}, {"max_calls": -1}, {"deadline_s": math.inf}])
def test_budget_settings_are_checked(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Budget(**bad)


# ---- secrets ----


def test_a_secret_shows_its_variable_only(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "  planted-key-123 \n")
    secret = Secret("SOME_KEY")
    assert secret.reveal() == "planted-key-123"
    assert "planted" not in repr(secret) + str(secret) + str(vars(type(secret)))
    assert expand("Key ${SOME_KEY}!") == "Key planted-key-123!"
    monkeypatch.setenv("SOME_KEY", "two\nlines")
    with pytest.raises(PoolError, match="SOME_KEY") as caught:
        secret.reveal()
    assert "two" not in str(caught.value)
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(PoolError, match="SOME_KEY"):
        secret.reveal()


@pytest.mark.parametrize(
    "text",
    [
        "Incorrect key provided: sk-proj-AbCdEf0123456789",
        "got Authorization: Bearer AbCdEf0123456789.x",
        "authorization=AbCdEf0123456789",
        '{"api_key": "AbCdEf0123456789"}',
        "hf_AbCdEf0123456789 is revoked",
        "plain AbCdEf0123456789 here",
    ],
)
def test_scrub(text):
    clean = scrub(text, ["plain AbCdEf0123456789"])
    assert "AbCdEf0123456789" not in clean and "***" in clean


def test_scrub_leaves_ordinary_words_alone():
    text = "the risk-averse bearer of api keys asked: is sk-ip a word?"
    assert scrub(text) == text


# ---- members ----


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"name": "a:b"}, "':'"),
        ({"name": "  "}, "blank"),
        ({"name": " a"}, "blanks around"),
        ({"name": "a\nb"}, "line breaks"),
        ({"name": "a</search>"}, "'<'"),
        ({"aliases": ("x:y",)}, "alias 'x:y'"),
        ({"input_price": math.nan}, "no input_price"),
        ({"output_price": -0.1}, "output_price=-0.1"),
        ({"output_price": math.inf}, "output_price=inf"),
        ({"output_price": True}, "no output_price"),
        ({"max_concurrency": 0}, "max_concurrency=0"),
        ({"max_tokens": 1.5}, "max_tokens=1.5"),
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"top_p": 0}, "top_p=0"),
        ({"fallback": "a"}, "fall back to itself"),
        ({"served_prices": {"m": (1.0, -1.0)}}, "served_prices 'm'"),
    ],
)
def test_a_member_that_cannot_work_says_why(bad, says):
    with pytest.raises(ValueError, match="member") as caught:  # also a ValueError, as the paper's spec wants it
        Member(**{"name": "a", "input_price": 1.0, "output_price": 2.0, **bad})
    assert says in str(caught.value) and isinstance(caught.value, PoolError)


def test_all_mistakes_of_a_member_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        Member("a:b", input_price=-1.0)
    assert len(caught.value.problems) == 3  # name, input_price, and no output_price


def test_the_parts_are_light(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys, guerdon.routing.pool, guerdon.routing.backends, guerdon.routing.http_client; "
        "print([m for m in ('torch', 'transformers', 'sklearn') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert out.stdout.strip() == "[]"


def test_asyncio_is_not_needed_to_build_one():
    from guerdon.routing.pool import Pool

    pool = Pool([(Member("a", input_price=0, output_price=0), lambda q: q)])
    assert asyncio.run(pool.call("a", "x")).text == "x"
