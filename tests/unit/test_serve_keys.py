"""Keys: caps hold under concurrency and across processes, rates refill, nothing is lost when a process dies."""

import asyncio
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import ConfigError, UnknownName
from guerdon.serve.keys import STALE_S, KeyStore, create_key, digest, list_keys, revoke_key
from guerdon.serve.problems import Problem

NOON = datetime(2026, 3, 31, 12, tzinfo=UTC).timestamp()


class Clock:
    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.sqlite"


def spent(path) -> int:
    with sqlite3.connect(path) as conn:
        return conn.execute("SELECT usd_total FROM keys").fetchone()[0]


async def refused(store, key, **worst) -> Problem:
    with pytest.raises(Problem) as caught:
        await store.reserve(digest(key), **worst)
    return caught.value


async def test_parallel_requests_cannot_pass_a_cap(path):
    key = create_key(path, "team", usd_total=1.0)
    async with KeyStore(path) as store:
        results = await asyncio.gather(
            *(store.reserve(digest(key), usd=0.03, tokens=10) for _ in range(200)), return_exceptions=True
        )
        granted = [r for r in results if not isinstance(r, BaseException)]
        assert len(granted) == 33  # 33 x 0.03 = 0.99; the 34th could reach 1.02
        assert {r.status for r in results if isinstance(r, Problem)} == {402}
        for r in granted:
            store.settle(r, usd=0.01, tokens=5)
        await store.flush()
        (info,) = list_keys(path)
        assert info.reserved == 0.0
        assert spent(path) == 33 * 10**10  # exactly 0.33 USD in pico-dollars
        # What was freed can be reserved again: 0.67 left.
        again = await asyncio.gather(
            *(store.reserve(digest(key), usd=0.03, tokens=10) for _ in range(200)), return_exceptions=True
        )
        assert sum(not isinstance(r, BaseException) for r in again) == 22


WORKER = """
import asyncio, sys
from guerdon.serve.keys import KeyStore, digest
async def main(path, key):
    async with KeyStore(path) as store:
        asking = [store.reserve(digest(key), usd=0.01, tokens=1) for _ in range(100)]
        got = await asyncio.gather(*asking, return_exceptions=True)
        granted = [r for r in got if not isinstance(r, BaseException)]
        for r in granted[::2]:
            store.settle(r, usd=0.01, tokens=1)
        await store.flush()
        print(len(granted), flush=True)
        await asyncio.to_thread(sys.stdin.read)  # hold the rest until the test has looked
asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.integration
def test_several_processes_keep_one_cap(path):
    key = create_key(path, "team", usd_day=1.5)
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(path), key], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    granted = [int(w.stdout.readline()) for w in workers]
    assert sum(granted) == 150  # of the 300 that were asked for
    assert list_keys(path)[0].spent_day == pytest.approx(1.5, abs=1e-12)
    for w in workers:
        w.communicate()


@pytest.mark.integration
def test_a_killed_process_leaves_its_reservations_booked(path):
    key = create_key(path, "team", usd_total=10.0)
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(path), key], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert int(worker.stdout.readline()) == 100
    worker.kill()
    worker.communicate()
    import time

    async def restart(later: float) -> None:
        async with KeyStore(path, clock=lambda: time.time() + later):
            pass

    asyncio.run(restart(0.0))  # too early to tell a dead process from a slow one
    info = list_keys(path)[0]
    assert info.reserved == pytest.approx(0.5) and info.orphaned == 0
    assert info.spent_total == pytest.approx(1.0)
    asyncio.run(restart(STALE_S + 1))
    info = list_keys(path)[0]
    assert info.reserved == 0 and info.orphaned == pytest.approx(0.5)
    assert info.spent_total == pytest.approx(1.0)  # the worst case stays booked


async def test_a_late_settlement_after_reaping_changes_nothing(path):
    key = create_key(path, "team", usd_total=10.0)
    clock = Clock()
    async with KeyStore(path, clock=clock) as slow:
        held = await slow.reserve(digest(key), usd=1.0, tokens=1)
        clock.now += STALE_S + 1
        async with KeyStore(path, clock=clock):
            pass
        slow.settle(held, usd=0.1, tokens=1)
        await slow.flush()
        assert list_keys(path)[0].spent_total == pytest.approx(1.0)
        with pytest.raises(Problem, match="suspended"):
            await slow.extend(held, usd=0.5)


async def test_requests_per_minute(path):
    key = create_key(path, "team", rpm=5)
    clock = Clock()
    async with KeyStore(path, clock=clock) as store:
        for _ in range(5):
            await store.reserve(digest(key), usd=0, tokens=1)
        problem = await refused(store, key, usd=0, tokens=1)
        assert (problem.status, problem.code, problem.retry_after) == (429, "rate_limit_exceeded", pytest.approx(12.0))
        clock.now += 11.9
        assert (await refused(store, key, usd=0, tokens=1)).retry_after == pytest.approx(0.1)
        clock.now += 0.2
        await store.reserve(digest(key), usd=0, tokens=1)


async def test_tokens_per_minute_are_reserved_and_given_back(path):
    key = create_key(path, "team", tpm=100)
    clock = Clock()
    async with KeyStore(path, clock=clock) as store:
        held = await store.reserve(digest(key), usd=0, tokens=80)
        problem = await refused(store, key, usd=0, tokens=30)
        assert problem.status == 429 and problem.retry_after == pytest.approx(6.0)
        store.settle(held, usd=0, tokens=20)
        await store.reserve(digest(key), usd=0, tokens=30)
        problem = await refused(store, key, usd=0, tokens=101)
        assert problem.code == "request_too_large" and problem.param == "max_tokens" and problem.retry_after is None


async def test_caps_start_anew_each_day_and_month(path):
    key = create_key(path, "team", usd_day=1.0, usd_month=1.5)
    clock = Clock()  # noon of the last day of March
    async with KeyStore(path, clock=clock) as store:
        await store.reserve(digest(key), usd=1.0, tokens=1)
        problem = await refused(store, key, usd=0.1, tokens=1)
        assert problem.status == 402 and "day cap" in problem.message and problem.retry_after == 12 * 3600
        clock.now += 12 * 3600
        held = await store.reserve(digest(key), usd=1.0, tokens=1)  # a new day and a new month
        store.settle(held, usd=1.0, tokens=1)
        clock.now += 24 * 3600
        problem = await refused(store, key, usd=0.6, tokens=1)
        assert "month cap" in problem.message and problem.retry_after == 29 * 24 * 3600


async def test_settling_after_midnight_leaves_the_new_day_alone(path):
    key = create_key(path, "team", usd_day=1.0)
    clock = Clock()
    async with KeyStore(path, clock=clock) as store:
        held = await store.reserve(digest(key), usd=1.0, tokens=1)
        clock.now += 13 * 3600
        await store.reserve(digest(key), usd=0.4, tokens=1)
        store.settle(held, usd=0.2, tokens=1)
        assert (await refused(store, key, usd=0.61, tokens=1)).status == 402
        await store.reserve(digest(key), usd=0.6, tokens=1)


async def test_extending_counts_against_the_cap(path):
    key = create_key(path, "team", usd_total=1.0)
    async with KeyStore(path) as store:
        held = await store.reserve(digest(key), usd=0.0, tokens=1)
        await store.extend(held, usd=0.8)
        with pytest.raises(Problem) as caught:
            await store.extend(held, usd=0.3)
        assert caught.value.status == 402
        store.settle(held, usd=0.5, tokens=1)
        await store.flush()
        assert spent(path) == 5 * 10**11


async def test_unknown_and_revoked_keys(path):
    key = create_key(path, "team")
    async with KeyStore(path) as store:
        await store.check(digest(key))
        assert (await refused(store, "gd-nonsense", usd=0, tokens=1)).status == 401
        revoke_key(path, "team")
        problem = await refused(store, key, usd=0, tokens=1)  # at once where money is concerned
        assert problem.status == 401 and "revoked" in problem.message
    with pytest.raises(UnknownName, match="there are: team"):
        revoke_key(path, "nobody")


async def test_a_cancelled_reservation_is_freed(path):
    key = create_key(path, "team", usd_total=1.0)
    async with KeyStore(path) as store:
        task = asyncio.create_task(store.reserve(digest(key), usd=1.0, tokens=1))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await store.flush()
        await store.flush()  # the settlement was queued while the first flush was answered
        await store.reserve(digest(key), usd=1.0, tokens=1)


async def test_a_full_disk_refuses_requests_and_keeps_settlements(path, monkeypatch):
    key = create_key(path, "team", usd_total=1.0)
    async with KeyStore(path) as store:
        held = await store.reserve(digest(key), usd=0.5, tokens=1)
        apply = store._apply

        def full(conn, ops):
            apply(conn, ops) if not ops else None
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(store, "_apply", full)
        assert (await refused(store, key, usd=0.1, tokens=1)).status == 503
        store.settle(held, usd=0.2, tokens=1)
        assert (await refused(store, key, usd=0.1, tokens=1)).status == 503
        monkeypatch.setattr(store, "_apply", apply)
        await store.flush()
        assert spent(path) == 2 * 10**11


def test_the_file_holds_no_key(path):
    key = create_key(path, "team")
    assert key.startswith("gd-") and len(key) >= 40
    assert all(key.encode() not in p.read_bytes() for p in path.parent.iterdir())
    assert (path.stat().st_mode & 0o077) == 0


def test_bad_keys_are_refused(path):
    create_key(path, "team")
    with pytest.raises(ConfigError, match="exists already"):
        create_key(path, "team")
    with pytest.raises(ConfigError, match="usd_day"):
        create_key(path, "other", usd_day=-1)
    with pytest.raises(ConfigError, match="rpm"):
        create_key(path, "other", rpm=0)
    with pytest.raises(ConfigError, match="no key store"):
        list_keys(path.with_name("absent.sqlite"))
    junk = path.with_name("junk.sqlite")
    junk.write_bytes(b"not a database, and long enough to look at" * 40)
    with pytest.raises(ConfigError, match="cannot be used as a key store"):
        create_key(junk, "team")


@pytest.mark.property
@settings(max_examples=25, deadline=None)
@given(
    cap=st.integers(0, 1000),
    calls=st.lists(st.tuples(st.integers(0, 300), st.floats(0, 1)), max_size=40),
)
def test_spent_never_exceeds_the_cap(tmp_path_factory, cap, calls):
    path = tmp_path_factory.mktemp("keys") / "k.sqlite"
    key = create_key(path, "team", usd_total=cap / 1000)

    async def run() -> None:
        async with KeyStore(path) as store:

            async def one(worst: int, used: float) -> float:
                try:
                    held = await store.reserve(digest(key), usd=worst / 1000, tokens=1)
                except Problem:
                    return 0.0
                await asyncio.sleep(0)
                store.settle(held, usd=worst / 1000 * used, tokens=1)
                return worst / 1000 * used

            booked = await asyncio.gather(*(one(*c) for c in calls))
            await store.flush()
            assert spent(path) <= cap * 10**9
            assert spent(path) / 1e12 == pytest.approx(sum(booked), abs=1e-9)

    asyncio.run(run())
