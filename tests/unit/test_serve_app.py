"""The ASGI application by itself: routes, reservations, failures and streams, over a pool that is a stand-in."""

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guerdon.errors import CheckpointError, ConfigError, DataError, UnknownName
from guerdon.routing.member import Member, Outcome, Reply
from guerdon.serve.app import create_app
from guerdon.serve.keys import KeyStore, create_key, list_keys
from guerdon.serve.metrics import Metrics
from guerdon.serve.routes import FixedMember, MultiRound, SingleRound, load_served
from guerdon.serve.server import is_loopback, require_keys
from guerdon.serve.settings import Settings
from guerdon.serve.tally import TallyLedger
from guerdon.types import Usage

HI = [{"role": "user", "content": "Which city is the capital of France?"}]
GOOD = {"model": "a", "messages": HI, "max_tokens": 10}


def reply(member="a", text="Paris", **change) -> Reply:
    values = {
        "member": member, "answered_by": member, "model": "m", "text": text, "input_tokens": 20, "output_tokens": 5,
        "usage_estimated": False, "usd": 0.00003, "input_price": 1.0, "output_price": 2.0, "price_date": "2026-01-01",
        "latency_s": 0.1, "attempts": 1, "cached": False, "outcome": Outcome.OK, "error": None,
    }  # fmt: skip
    return Reply(**{**values, **change})


class FakePool(Mapping):
    """Members whose calls do what the test says."""

    def __init__(self, *names: str, call: Any = None) -> None:
        self.members = {
            n: Member(name=n, descriptor=f"about {n}", input_price=1.0, output_price=2.0) for n in names or ("a", "b")
        }
        self.calls: list[tuple[str, dict]] = []
        self.behave = call
        self.ledger = TallyLedger()

    def __getitem__(self, name):
        return self.members[name]

    def __iter__(self):
        return iter(self.members)

    def __len__(self):
        return len(self.members)

    def resolve(self, text):
        return next((n for n in self.members if n.lower() == text.strip().lower()), None)

    def worst_case_usd(self, name, messages, max_tokens):
        return (sum(len(m["content"]) for m in messages) + 2 * max_tokens) / 1e6

    async def call(self, name, messages, **options):
        self.calls.append((name, {"messages": messages, **options}))
        got = reply(name) if self.behave is None else self.behave(name)
        got = await got if asyncio.iscoroutine(got) else got
        self.ledger.book(got)
        return got

    async def stream(self, name, messages, **options):
        got = await self.call(name, messages, **options)
        for word in (got.text or "").split():
            yield word
        yield got

    @property
    def breakers(self):
        return dict.fromkeys(self.members, "closed")

    async def aclose(self):
        pass


@dataclass
class Got:
    status: int
    headers: dict[str, str]
    body: bytes
    pieces: list[bytes]

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def events(self):
        return [json.loads(line[6:]) for line in self.body.split(b"\n\n") if line.startswith(b"data: {")]


async def ask(app, body=GOOD, *, path="/v1/chat/completions", method="POST", headers=(), hang_up=None) -> Got:
    """Send one request; ``hang_up`` is an event after which the client is gone."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent: list[dict] = []
    incoming = [{"type": "http.request", "body": data, "more_body": False}]

    async def receive():
        if incoming:
            return incoming.pop()
        await (hang_up.wait() if hang_up else asyncio.Event().wait())
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    raw = {"content-type": "application/json", **dict(headers)}
    scope = {
        "type": "http", "path": path, "method": method,
        "headers": [(k.lower().encode(), v.encode()) for k, v in raw.items()],
    }  # fmt: skip
    await app(scope, receive, send)
    starts = [m for m in sent if m["type"] == "http.response.start"]
    assert len(starts) <= 1
    pieces = [m.get("body", b"") for m in sent if m["type"] == "http.response.body"]
    if starts:
        assert not sent[-1].get("more_body")  # every response is complete
    head = {k.decode(): v.decode() for k, v in starts[0]["headers"]} if starts else {}
    return Got(starts[0]["status"] if starts else 0, head, b"".join(pieces), pieces)


def app_of(pool=None, *served, keys=None, **limits):
    pool = pool or FakePool()
    return create_app(list(served), pool, keys, Settings(**limits))


# ---- a fixed member ----


async def test_the_request_reaches_the_member_as_it_was_meant():
    pool = FakePool()
    body = {**GOOD, "temperature": 0.3, "top_p": 0.9, "seed": 4}
    got = await ask(app_of(pool), body, headers={"x-guerdon-deadline-ms": "5000"})
    assert got.status == 200
    ((name, options),) = pool.calls
    assert name == "a" and options["messages"] == HI
    assert (options["max_tokens"], options["temperature"], options["top_p"], options["seed"]) == (10, 0.3, 0.9, 4)
    assert 0 < options["deadline"] - time.monotonic() < 5


async def test_names_are_resolved_and_unknown_ones_suggest_the_nearest():
    app = app_of(FakePool("Small-7B", "Large-70B"))
    assert (await ask(app, {**GOOD, "model": "small-7b"})).json["model"] == "Small-7B"
    got = await ask(app, {**GOOD, "model": "Smal-7B"})
    assert (
        got.status == 404 and got.json["error"]["code"] == "model_not_found" and got.json["error"]["param"] == "model"
    )
    assert "did you mean Small-7B" in got.json["error"]["message"]


async def test_a_fallback_is_named():
    pool = FakePool(call=lambda name: reply("a", answered_by="b"))
    got = await ask(app_of(pool))
    assert got.headers["x-guerdon-member"] == "b" and "a failed, b answered instead" in got.headers["x-guerdon-reason"]


async def test_a_reply_as_long_as_allowed_was_cut():
    pool = FakePool(call=lambda name: reply(output_tokens=10))
    assert (await ask(app_of(pool))).json["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("outcome", [o for o in Outcome if o is not Outcome.OK])
@pytest.mark.parametrize("stream", [False, True])
async def test_every_outcome_has_an_error(outcome, stream):
    pool = FakePool(call=lambda name: reply(text=None, outcome=outcome, error="secret upstream words"))
    got = await ask(app_of(pool), {**GOOD, "stream": stream})
    assert got.status in (402, 404, 502, 503, 504) and set(got.json["error"]) == {"message", "type", "param", "code"}
    assert b"secret" not in got.body
    assert got.json["guerdon"]["usd"] == 0.00003 and float(got.headers["x-guerdon-cost-usd"]) == 0.00003
    assert ("retry-after" in got.headers) == (got.status == 503)


async def test_header_values_stay_one_line():
    class Evil:
        def route(self, question):
            return "a", "because\r\nx-evil: 1 and ünïcode" + "x" * 500

    got = await ask(app_of(None, SingleRound(FakePool(), Evil(), "r")), {**GOOD, "model": "r"})
    assert got.status == 200 and len(got.headers["x-guerdon-reason"]) <= 200
    assert "\n" not in got.headers["x-guerdon-reason"] and "x-evil" not in got.headers


# ---- routers ----


async def test_a_single_round_router_says_why():
    class Router:
        def route(self, question):
            assert question == HI[0]["content"]
            return "b", "nearest of 5 neighbours"

    pool = FakePool()
    app = app_of(pool, SingleRound(pool, Router(), "knn"))
    got = await ask(app, {**GOOD, "model": "knn"})
    assert got.json["guerdon"]["member"] == "b" and got.json["guerdon"]["reason"] == "nearest of 5 neighbours"
    assert pool.calls[0][0] == "b"


async def test_a_slow_router_does_not_hold_up_others():
    class Router:
        def route(self, question):
            time.sleep(0.3)
            return "b", "slow"

    pool = FakePool()
    app = app_of(pool, SingleRound(pool, Router(), "r"))
    slow = asyncio.create_task(ask(app, {**GOOD, "model": "r"}))
    await asyncio.sleep(0.02)
    started = time.perf_counter()
    assert (await ask(app)).status == 200
    assert time.perf_counter() - started < 0.2
    assert (await slow).status == 200


@pytest.mark.parametrize("broken", [lambda q: 1 / 0, lambda q: ("nobody", "x")])
async def test_a_broken_router_is_a_500_not_another_member(broken):
    class Router:
        route = staticmethod(broken)

    pool = FakePool()
    got = await ask(app_of(pool, SingleRound(pool, Router(), "r")), {**GOOD, "model": "r"})
    assert got.status == 500 and got.json["error"]["code"] == "router_failed" and pool.calls == []


@dataclass
class Routed:
    text: str | None
    reason: str
    usage: Usage
    policy_usage: Usage
    record: dict


class FakeR1:
    """Calls two members for 0.01 USD each, from a task of its own, then answers or fails."""

    def __init__(self, text="Paris", wait=0.0, error=None):
        self.text, self.wait, self.error = text, wait, error
        self.pool = FakePool(call=lambda name: reply(name, usd=0.01, input_tokens=7, output_tokens=3))
        self.asked = {}

    async def answer(self, question, *, max_cost_usd, max_calls, deadline):
        self.asked = {"question": question, "max_cost_usd": max_cost_usd, "max_calls": max_calls, "deadline": deadline}
        replies = await asyncio.gather(*(self.pool.call(name, question) for name in ("b", "a")))
        await asyncio.sleep(self.wait)
        if self.error:
            raise self.error
        steps = [{"member": r.member, "answered_by": r.answered_by, "usd": r.usd, "error": "secret"} for r in replies]
        used, own = Usage(2, 14, 6, 0.02, 0.1), Usage(0, 100, 30, 0.0, 0.2)
        return Routed(self.text, "asked b, a in 2 calls", used, own, {"steps": steps})


async def test_router_r1_gets_the_caps_and_returns_its_trace():
    router = FakeR1()
    app = app_of(router.pool, MultiRound(router.pool, router, "r1", max_cost_usd=0.5), max_calls=4)
    got = await ask(app, {**GOOD, "model": "r1", "max_cost_usd": 0.05, "max_calls": 9})
    assert router.asked == {"question": HI[0]["content"], "max_cost_usd": 0.05, "max_calls": 4, "deadline": None}
    route = got.json["guerdon"]
    assert route["calls"] == 2 and route["usd"] == 0.02 and route["reason"] == "asked b, a in 2 calls"
    assert [s["answered_by"] for s in route["trace"]] == ["b", "a"] and b"secret" not in got.body
    assert got.json["choices"][0]["message"]["content"] == "Paris"
    assert got.json["usage"] == {"prompt_tokens": 114, "completion_tokens": 36, "total_tokens": 150}
    text = (await ask(app, path="/metrics", method="GET")).body.decode()
    assert (
        'guerdon_usd_total{member="a"} 0.01\n' in text
        and 'guerdon_tokens_total{member="b",direction="output"} 3\n' in text
    )
    await ask(app, {**GOOD, "model": "r1"})
    assert router.asked["max_cost_usd"] == 0.5


async def test_a_silent_stream_beats_and_then_shows_the_final_answer_only():
    router = FakeR1(wait=0.35)
    app = app_of(router.pool, MultiRound(router.pool, router, "r1"), heartbeat_s=0.1)
    got = await ask(app, {**GOOD, "model": "r1", "stream": True})
    assert got.body.count(b": still working\n\n") >= 2
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in got.events) == "Paris"
    assert got.events[-1]["guerdon"]["calls"] == 2 and got.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"text": ""}, 502),
        ({"error": RuntimeError("boom")}, 500),
        ({"error": DataError("the question is too long")}, 400),
    ],
)
async def test_a_failing_router_r1_is_never_an_empty_200_and_pays_for_its_calls(change, status, tmp_path):
    key = create_key(tmp_path / "k", "team", usd_total=1.0)
    router = FakeR1(**change)
    async with KeyStore(tmp_path / "k") as store:
        app = app_of(router.pool, MultiRound(router.pool, router, "r1", max_cost_usd=0.1), keys=store)
        got = await ask(app, {**GOOD, "model": "r1"}, headers={"authorization": f"Bearer {key}"})
        assert got.status == status and b"boom" not in got.body
        await store.flush()
        assert list_keys(tmp_path / "k")[0].spent_total == pytest.approx(0.02)


async def test_hanging_up_on_a_router_r1_books_what_it_had_spent(tmp_path):
    key = create_key(tmp_path / "k", "team", usd_total=1.0)
    router, gone = FakeR1(wait=30), asyncio.Event()
    async with KeyStore(tmp_path / "k") as store:
        app = app_of(router.pool, MultiRound(router.pool, router, "r1", max_cost_usd=0.1), keys=store)
        task = asyncio.create_task(
            ask(app, {**GOOD, "model": "r1"}, headers={"authorization": f"Bearer {key}"}, hang_up=gone)
        )
        await asyncio.sleep(0.1)  # both calls are over by now, the answer is not
        gone.set()
        await asyncio.wait_for(task, 5)
        await store.flush()
        assert list_keys(tmp_path / "k")[0].spent_total == pytest.approx(0.02)


async def test_an_error_after_the_first_byte_is_said_inside_the_stream():
    router = FakeR1(wait=0.2, error=RuntimeError("boom"))
    app = app_of(router.pool, MultiRound(router.pool, router, "r1"), heartbeat_s=0.05)
    got = await ask(app, {**GOOD, "model": "r1", "stream": True})
    assert got.status == 200 and got.events[-1]["error"]["code"] == "router_failed"
    assert b"[DONE]" not in got.body


def test_saved_routers_and_rules_are_loaded(tmp_path):
    import numpy as np

    from guerdon.routing.bench.matrix import ScoreMatrix
    from guerdon.routing.routers import TfidfRidge

    queries = tuple(f"{kind} number {i}" for i in range(8) for kind in ("capital city", "prime sum"))
    scores = np.array([[1.0, 0.0], [0.0, 1.0]] * 8)
    matrix = ScoreMatrix(queries, ("a", "b"), scores, np.full((16, 2), 1e-4))
    path = TfidfRidge(min_count=1).fit(matrix).save(tmp_path / "ridge.npz")
    served = load_served(str(path), FakePool())
    assert served.name == "ridge"
    got = asyncio.run(ask(app_of(served.pool, served), {**GOOD, "model": "ridge"}))
    assert got.json["guerdon"]["member"] == "a" and "predicted quality" in got.headers["x-guerdon-reason"]
    with pytest.raises(ConfigError, match="does not have: b"):
        load_served(str(path), FakePool("a", "c"))

    cheapest = load_served("cheapest", FakePool(), name="front")
    got = asyncio.run(ask(app_of(cheapest.pool, cheapest), {**GOOD, "model": "front"}))
    assert (got.json["guerdon"]["member"], got.json["guerdon"]["reason"]) == ("a", "cheapest member")

    (tmp_path / "junk.npz").write_bytes(b"PK\x03\x04 no router")
    with pytest.raises(DataError, match="no saved router"):
        load_served(str(tmp_path / "junk.npz"), FakePool())
    with pytest.raises(CheckpointError, match="no trained router"):
        load_served(str(tmp_path), FakePool())
    with pytest.raises(ConfigError, match="no such file or folder"):
        load_served(str(tmp_path / "nowhere"), FakePool())


# ---- money ----


async def test_money_is_reserved_before_and_settled_after(tmp_path):
    key = create_key(tmp_path / "k", "team", usd_total=1.0)
    seen = []

    async def call():
        seen.append(list_keys(tmp_path / "k")[0].reserved)
        return reply()

    pool = FakePool(call=lambda name: call())
    async with KeyStore(tmp_path / "k") as store:
        assert (await ask(app_of(pool, keys=store), headers={"authorization": f"Bearer {key}"})).status == 200
        await store.flush()
        info = list_keys(tmp_path / "k")[0]
    assert seen == [pytest.approx((36 + 2 * 10) / 1e6)]
    assert info.reserved == 0 and info.spent_total == pytest.approx(0.00003)


async def test_over_the_cap_is_a_402_before_anything_is_paid(tmp_path):
    key = create_key(tmp_path / "k", "team", usd_total=0.00005)
    pool = FakePool()

    class Router:
        def route(self, question):
            return "a", "x"

    async with KeyStore(tmp_path / "k") as store:
        app = app_of(pool, SingleRound(pool, Router(), "r"), keys=store)
        for model in ("a", "r"):
            got = await ask(app, {**GOOD, "model": model}, headers={"authorization": f"Bearer {key}"})
            assert got.status == 402 and got.json["error"]["code"] == "budget_exceeded"
        await store.flush()
        assert pool.calls == [] and list_keys(tmp_path / "k")[0].spent_total == 0


async def test_a_client_that_hangs_up_cancels_the_call_and_pays_for_it(tmp_path):
    key = create_key(tmp_path / "k", "team", usd_total=1.0)
    cancelled, gone = asyncio.Event(), asyncio.Event()

    async def call():
        gone.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    pool = FakePool(call=lambda name: call())
    async with KeyStore(tmp_path / "k") as store:
        app = app_of(pool, keys=store)
        got = await asyncio.wait_for(ask(app, headers={"authorization": f"Bearer {key}"}, hang_up=gone), 5)
        assert got.status == 0 and cancelled.is_set() and app.in_flight == 0
        await store.flush()
        assert list_keys(tmp_path / "k")[0].spent_total == pytest.approx((36 // 3 + 4 + 2 * 10) / 1e6)
    assert app.metrics.counters["guerdon_disconnects_total"][()] == 1


async def test_a_deadline_is_a_504():
    pool = FakePool(call=lambda name: asyncio.sleep(30))
    started = time.perf_counter()
    got = await ask(app_of(pool, deadline_s=0.1), {**GOOD, "timeout": 5})
    assert got.status == 504 and got.json["error"]["code"] == "deadline_exceeded" and time.perf_counter() - started < 2


async def test_the_servers_own_cost_cap_cannot_be_raised():
    pool = FakePool()
    got = await ask(app_of(pool, max_cost_usd=0.00001), {**GOOD, "max_cost_usd": 5})
    assert got.status == 402 and pool.calls == []
    assert (await ask(app_of(pool), {**GOOD, "max_cost_usd": 0})).status == 402


# ---- the rest ----


async def test_too_many_at_once_and_draining_are_503():
    release = asyncio.Event()

    async def call():
        await release.wait()
        return reply()

    app = app_of(FakePool(call=lambda name: call()), max_in_flight=2)
    running = [asyncio.create_task(ask(app)) for _ in range(2)]
    await asyncio.sleep(0.01)
    got = await ask(app)
    assert got.status == 503 and got.json["error"]["code"] == "overloaded" and got.headers["retry-after"] == "1"
    app.draining = True
    got = await ask(app)
    assert got.status == 503 and got.json["error"]["code"] == "shutting_down"
    assert (await ask(app, path="/healthz", method="GET")).status == 503
    release.set()
    assert [(await r).status for r in running] == [200, 200] and app.in_flight == 0


async def test_every_response_has_a_request_id():
    app = app_of()
    for path, method in (
        ("/v1/chat/completions", "POST"),
        ("/v1/models", "GET"),
        ("/nowhere", "GET"),
        ("/healthz", "PUT"),
    ):
        assert (await ask(app, path=path, method=method)).headers["x-request-id"]


def test_names_must_not_clash():
    pool = FakePool()
    with pytest.raises(ConfigError, match="also a member"):
        app_of(pool, FixedMember(pool, "a", "b"))
    with pytest.raises(ConfigError, match="served twice"):
        app_of(pool, FixedMember(pool, "a", "r"), FixedMember(pool, "b", "r"))
    with pytest.raises(UnknownName, match="no member"):
        FixedMember(pool, "nobody")


def test_keys_are_required_beyond_loopback():
    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.8.8.8"):
        require_keys(host, None)
    for host in ("0.0.0.0", "::", "10.0.0.3", "example.org", ""):
        assert not is_loopback(host)
        with pytest.raises(ConfigError, match="--keys"):
            require_keys(host, None)
        require_keys(host, object())


@pytest.mark.parametrize(
    "wrong", [{"max_body_bytes": 0}, {"deadline_s": float("nan")}, {"heartbeat_s": 0}, {"max_cost_usd": -1}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Settings(**wrong)


def test_metrics_of_several_workers_are_added(tmp_path):
    one, other = Metrics(tmp_path), Metrics(tmp_path)
    other.member('a"\n', Usage(1, 3, 4, 0.5))
    other.observe("guerdon_request_seconds", ("chat",), 0.2)
    other.share()
    (path,) = tmp_path.glob("*.json")
    path.rename(tmp_path / "1.json")
    one.member('a"\n', Usage(1, 1, 1, 0.25))
    one.observe("guerdon_request_seconds", ("chat",), 1000.0)
    text = one.text().decode()
    assert 'guerdon_tokens_total{member="a\\"\\n",direction="input"} 4\n' in text
    assert 'guerdon_usd_total{member="a\\"\\n"} 0.75\n' in text
    assert 'guerdon_request_seconds_bucket{route="chat",le="0.25"} 1\n' in text
    assert 'guerdon_request_seconds_bucket{route="chat",le="+Inf"} 2\n' in text
    assert 'guerdon_request_seconds_sum{route="chat"} 1000.2\n' in text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        "model",
        "messages",
        "stream",
        "stream_options",
        "max_tokens",
        "temperature",
        "stop",
        "max_cost_usd",
        "max_calls",
        "timeout",
        "n",
    ]
)


@pytest.mark.property
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40) | JSON | st.dictionaries(FIELDS, JSON).map(lambda d: {**GOOD, **d}))
def test_no_body_makes_the_server_fail(body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    got = asyncio.run(ask(app_of(), data))
    assert got.status in (200, 400, 402, 404, 504)
    if got.status != 200:
        assert set(got.json["error"]) == {"message", "type", "param", "code"}
