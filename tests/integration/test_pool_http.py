"""The pool against an endpoint on loopback that misbehaves in every way an endpoint can."""

import asyncio
import email.utils
import json
import logging
import random
import socket
import ssl
import time

import pytest
from aiohttp import web

from guerdon.routing.breaker import BreakerPolicy
from guerdon.routing.cache import ReplyCache
from guerdon.routing.http_client import HttpBackend, _connections, session_of
from guerdon.routing.ledger import Ledger
from guerdon.routing.member import Member, Outcome, Reply
from guerdon.routing.pool import Pool
from guerdon.routing.retry import RetryPolicy
from guerdon.routing.secrets import Secret

pytestmark = pytest.mark.integration

KEY = "planted-key-0123456789"
WORDS = ["Paris", " is", " the", " capital."]
USAGE = {"prompt_tokens": 10, "completion_tokens": 50, "total_tokens": 60}
USD = (10 * 1.0 + 50 * 2.0) / 1e6


def completion(model, text="Paris", **change):
    body = {
        "id": "x", "object": "chat.completion", "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": USAGE,
    }  # fmt: skip
    return {k: v for k, v in {**body, **change}.items() if v is not ...}


class Upstream:
    """The model's name says what happens."""

    def __init__(self):
        self.seen, self.headers, self.peers, self.count = [], [], set(), {}
        self.dropped = asyncio.Event()
        self.random = random.Random(0)

    async def answer(self, request):
        body = await request.json()
        model = body["model"]
        self.seen.append(body)
        self.headers.append({k.lower(): v for k, v in request.headers.items()})
        self.peers.add(request.transport.get_extra_info("peername"))
        n = self.count[model] = self.count.get(model, 0) + 1
        try:
            if body.get("stream"):
                return await self.stream(request, model, n)
            return await getattr(self, model.replace("-", "_"))(request, model, n)
        except (asyncio.CancelledError, ConnectionResetError):
            self.dropped.set()
            raise

    async def good(self, request, model, n):
        return web.json_response(completion(model))

    async def hang(self, request, model, n):
        await asyncio.sleep(30)

    async def html(self, request, model, n):
        return web.Response(text="<html>Bad gateway</html>", content_type="text/html")

    async def text(self, request, model, n):
        return web.Response(text=json.dumps(completion(model)), content_type="text/plain")

    async def junk(self, request, model, n):
        return web.Response(body=b'{"choices": [', content_type="application/json")

    async def blank(self, request, model, n):
        return web.Response(body=b"", content_type="application/json")

    async def array(self, request, model, n):
        return web.json_response([1, 2])

    async def no_choice(self, request, model, n):
        return web.json_response(completion(model, choices=[]))

    async def no_message(self, request, model, n):
        return web.json_response(completion(model, choices=[{"text": "old"}]))

    async def number(self, request, model, n):
        return web.json_response(completion(model, 42))

    async def null(self, request, model, n):
        return web.json_response(completion(model, None))

    async def parts(self, request, model, n):
        return web.json_response(completion(model, [{"type": "text", "text": "Pa"}, {"type": "text", "text": "ris"}]))

    async def no_usage(self, request, model, n):
        return web.json_response(completion(model, "x" * 40, usage=...))

    async def odd_usage(self, request, model, n):
        return web.json_response(completion(model, "x" * 40, usage={"prompt_tokens": "7", "completion_tokens": -1}))

    async def other_model(self, request, model, n):
        return web.json_response(completion("big"))

    async def limited(self, request, model, n):
        if n == 1:
            return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"retry-after": "7"})
        return await self.good(request, model, n)

    async def limited_date(self, request, model, n):
        if n == 1:
            date = email.utils.formatdate(time.time() + 20, usegmt=True)
            return web.json_response({"error": "slow down"}, status=429, headers={"retry-after": date})
        return await self.good(request, model, n)

    async def recovers(self, request, model, n):
        return web.Response(status=503, text="busy") if n < 3 else await self.good(request, model, n)

    async def down(self, request, model, n):
        return web.json_response({"error": {"message": f"stack trace, key {KEY}, Bearer abcdefgh12345"}}, status=500)

    async def refused(self, request, model, n):
        got = request.headers.get("authorization", "")
        return web.json_response(
            {"error": {"message": f"bad key: {got} {request.headers.get('x-team', '')}"}}, status=401
        )

    async def missing(self, request, model, n):
        return web.json_response({"detail": "no such model"}, status=404)

    async def moved(self, request, model, n):
        return web.Response(status=307, headers={"location": "/v1/elsewhere"})

    async def soft_error(self, request, model, n):
        return web.json_response({"error": {"message": "quota", "code": 429}})

    async def echo_key(self, request, model, n):
        return web.json_response(completion(model, f"your key is {request.headers['authorization']}"))

    async def flaky(self, request, model, n):
        return web.Response(status=500) if self.random.random() < 0.3 else await self.good(request, model, n)

    async def truncated(self, request, model, n):
        response = web.StreamResponse(headers={"content-length": "1000", "content-type": "application/json"})
        await response.prepare(request)
        await response.write(b'{"choices": [')
        request.transport.close()
        return response

    async def cookie(self, request, model, n):
        response = web.json_response(completion(model, request.headers.get("cookie", "none")))
        response.set_cookie("session", "abc")
        return response

    async def slow(self, request, model, n):
        await asyncio.sleep(0.05)
        return await self.good(request, model, n)

    async def stream(self, request, model, n):
        if model == "limited" and n == 1:
            return web.json_response({"error": "slow down"}, status=429, headers={"retry-after": "3"})
        if model in ("html", "good-json"):
            return await (self.html if model == "html" else self.good)(request, model, n)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)

        async def send(**event):
            await response.write(b"data: " + json.dumps({"model": model, **event}).encode() + b"\r\n\r\n")

        if model == "late-error":
            await send(choices=[{"delta": {"content": "Par"}}])
            await send(error={"message": "overloaded"})
            return response
        if model == "odd":
            await send(choices=["what"])
            return response
        await response.write(b": ping\n\n")
        await send(choices=[{"delta": {"role": "assistant", "content": ""}}])
        for k, word in enumerate(WORDS):
            if model == "breaks" and k == 2:
                request.transport.abort()
                return response
            if model == "stalls" and k == 2:
                await asyncio.sleep(30)
            await send(choices=[{"delta": {"content": word}}])
        if model == "ends-early":
            return response
        await send(choices=[{"delta": {}, "finish_reason": "stop"}])
        if model != "no-usage":
            await send(choices=[], usage=USAGE)
        await response.write(b"data: [DO")
        await response.write(b"NE]\n\n")
        return response


@pytest.fixture
async def upstream():
    up = Upstream()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", up.answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    up.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    yield up
    await runner.cleanup()


class Sleeps:
    def __init__(self):
        self.seconds = []

    async def __call__(self, seconds):
        self.seconds.append(seconds)
        await asyncio.sleep(0)


def make(url, *models, timeout_s=5.0, sleep=None, pool=None, **options):
    members = []
    for model in models:
        entry = Member(
            model, input_price=1.0, output_price=2.0, price_date="2026-01-15", timeout_s=timeout_s, max_concurrency=64,
            served_prices={"big": (10.0, 20.0)},
        )  # fmt: skip
        members.append((entry, HttpBackend(url, model, **options)))
    return Pool(members, sleep=sleep or Sleeps(), **(pool or {}))


async def ask(upstream, model, **options):
    async with make(upstream.url, model, **options) as pool:
        reply = await pool.call(model, "capital of France?" + " " * 22, trajectory_id="t")
        booked = pool.ledger.of_trajectory("t")
    assert (booked.calls, booked.usd) == (1, reply.usd)
    assert "\n" not in (reply.error or "")
    return reply


async def test_the_request_is_what_endpoints_expect(upstream):
    async with make(upstream.url + "/", "good", headers={"x-team": "blue"}, extra_body={"top_p": None, "n": 1}) as pool:
        reply = await pool.call(
            "good", [{"role": "system", "content": "s"}, {"role": "user", "content": "ü\ud800"}], seed=4
        )
    assert reply.ok and reply.usd == USD and reply.finish_reason == "stop" and reply.attempts == 1
    (body,) = upstream.seen
    assert body.pop("messages")[0] == {"role": "system", "content": "s"}
    assert body == {"model": "good", "max_tokens": 512, "temperature": 0.0, "seed": 4, "n": 1}
    assert upstream.headers[0]["x-team"] == "blue" and "authorization" not in upstream.headers[0]
    other = HttpBackend("https://x/openai/v1?api-version=1", "m", max_tokens_field="max_completion_tokens")
    assert str(other.url) == "https://x/openai/v1/chat/completions?api-version=1"
    assert str(HttpBackend("https://x/v1/chat/completions", "m").url) == "https://x/v1/chat/completions"


@pytest.mark.parametrize(
    ("model", "outcome", "attempts", "usd", "says"),
    [
        ("html", Outcome.BAD_REPLY, 1, 0, "an HTML page"),
        ("text", Outcome.BAD_REPLY, 1, USD, "content type 'text/plain"),
        ("junk", Outcome.BAD_REPLY, 1, 0, "not JSON"),
        ("blank", Outcome.BAD_REPLY, 1, 0, "an empty body"),
        ("array", Outcome.BAD_REPLY, 1, 0, "a JSON list"),
        ("no-choice", Outcome.BAD_REPLY, 1, USD, "no choice"),
        ("no-message", Outcome.BAD_REPLY, 1, USD, "no message"),
        ("number", Outcome.BAD_REPLY, 1, USD, "int, not text"),
        ("truncated", Outcome.BAD_REPLY, 1, 0, "broke off"),
        ("null", Outcome.EMPTY, 1, USD, "without text"),
        ("down", Outcome.SERVER_ERROR, 3, 0, "HTTP 500"),
        ("soft-error", Outcome.RATE_LIMITED, 3, 0, "quota"),
        ("refused", Outcome.CLIENT_ERROR, 1, 0, "HTTP 401"),
        ("missing", Outcome.CLIENT_ERROR, 1, 0, "HTTP 404: no such model"),
        ("moved", Outcome.CLIENT_ERROR, 1, 0, "HTTP 307"),
    ],
)
async def test_what_cannot_be_used_is_a_failure_and_is_billed_as_what_it_is(
    upstream, model, outcome, attempts, usd, says
):
    reply = await ask(upstream, model)
    assert (reply.outcome, reply.attempts, reply.text) == (outcome, attempts, None)
    assert reply.usd == pytest.approx(usd) and says in reply.error and upstream.count[model] == attempts


async def test_replies_of_other_shapes_are_understood(upstream):
    assert (await ask(upstream, "parts")).text == "Paris"
    for model in ("no-usage", "odd-usage"):
        reply = await ask(upstream, model)
        assert reply.ok and (reply.input_tokens, reply.output_tokens, reply.usage_estimated) == (10, 10, True)
    other = await ask(upstream, "other-model")
    assert other.model == "big" and other.model_mismatch and other.usd == pytest.approx(10 * USD)


async def test_retries_wait_as_long_as_they_are_asked_to(upstream):
    for model, low, high in (("limited", 7, 7.5), ("limited-date", 18, 21)):
        sleep = Sleeps()
        reply = await ask(upstream, model, sleep=sleep)
        assert reply.ok and reply.attempts == 2 and reply.usd == USD
        assert len(sleep.seconds) == 1 and low <= sleep.seconds[0] <= high
    reply = await ask(upstream, "recovers")
    assert reply.ok and reply.attempts == 3


async def test_a_hanging_endpoint_costs_its_time_limit_and_its_input(upstream):
    began = time.monotonic()
    reply = await ask(upstream, "hang", timeout_s=0.15, pool={"retry": RetryPolicy(attempts=2)})
    assert reply.outcome is Outcome.TIMEOUT and reply.attempts == 2 and time.monotonic() - began < 3
    assert (reply.input_tokens, reply.output_tokens, reply.usage_estimated) == (20, 0, True)
    assert reply.usd == pytest.approx(20e-6)


async def test_an_endpoint_that_is_not_there(upstream):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with make(f"http://127.0.0.1:{port}/v1", "good", timeout_s=2) as pool:
        reply = await pool.call("good", "x")
    assert reply.outcome is Outcome.CONNECTION and reply.attempts == 3 and reply.usd == 0
    assert f"cannot reach 127.0.0.1:{port}" in reply.error
    async with make("http://no-such-host.invalid/v1", "good", timeout_s=5) as pool:
        reply = await pool.call("good", "x")
    assert reply.outcome in (Outcome.CONNECTION, Outcome.TIMEOUT) and "no-such-host.invalid" in (
        reply.error or "no-such-host.invalid"
    )


async def test_thirty_per_cent_errors_are_ridden_out(upstream):
    async with make(upstream.url, "flaky", pool={"retry": RetryPolicy(attempts=5), "breaker": None}) as pool:
        replies = await asyncio.gather(*(pool.call("flaky", f"q{k}") for k in range(200)))
        assert sum(r.ok for r in replies) >= 197  # 0.3 ** 5 is 0.24 %
        assert sum(r.attempts for r in replies) == upstream.count["flaky"]
        assert pool.ledger.total.usd == pytest.approx(sum(r.ok for r in replies) * USD)


async def test_a_dead_member_is_left_alone(upstream):
    async with make(upstream.url, "down", pool={"retry": RetryPolicy(attempts=1), "breaker": BreakerPolicy()}) as pool:
        outcomes = [(await pool.call("down", "x")).outcome for _ in range(20)]
        assert outcomes == [Outcome.SERVER_ERROR] * 5 + [Outcome.BREAKER_OPEN] * 15
        assert upstream.count["down"] == 5 and pool.breakers == {"down": "open"}


# ---- connections ----


async def test_all_members_share_one_session_and_its_connections(upstream, monkeypatch):
    made = []
    monkeypatch.setattr(ssl, "create_default_context", lambda *a, **k: made.append(1))
    pool = make(upstream.url, "good", "slow", "no-usage")
    other = make(upstream.url, "good")
    for _ in range(5):
        for name in pool:
            assert (await pool.call(name, "x")).ok
        assert (await other.call("good", "x")).ok
    assert len(upstream.peers) == 1 and made == []  # one connection, kept alive
    sessions = {session_of(pool.backend(n)) for n in pool} | {session_of(other.backend("good"))}
    assert len(sessions) == 1
    await pool.aclose()
    assert (await other.call("good", "x")).ok and not next(iter(sessions)).closed  # still in use
    await other.aclose()
    await other.aclose()
    assert next(iter(sessions)).closed


def test_sessions_of_finished_loops_are_let_go():
    async def touch():
        session_of(Ledger())
        await next(c for c in _connections if c.loop is asyncio.get_running_loop()).session.close()

    for _ in range(5):
        asyncio.run(touch())
    assert len([c for c in _connections if c.loop.is_closed()]) <= 1


async def test_cookies_of_an_endpoint_are_not_kept(upstream):
    async with make(upstream.url, "cookie") as pool:
        assert [(await pool.call("cookie", "x")).text for _ in range(2)] == ["none", "none"]


async def test_many_calls_at_once(upstream):
    async with make(upstream.url, "slow") as pool:
        began = time.monotonic()
        replies = await asyncio.gather(*(pool.call("slow", "x") for _ in range(64)))
        assert all(r.ok for r in replies) and time.monotonic() - began < 64 * 0.05 / 2


# ---- streams ----


async def stream(upstream, model, **options):
    async with make(upstream.url, model, **options) as pool:
        *pieces, reply = [p async for p in pool.stream(model, "x" * 40, trajectory_id="t")]
        assert pool.ledger.of_trajectory("t").usd == reply.usd and len(pool.ledger) == 1
    assert isinstance(reply, Reply)
    return pieces, reply


async def test_a_stream_ends_with_its_usage(upstream):
    pieces, reply = await stream(upstream, "good")
    assert pieces == WORDS and reply.ok and reply.text == "".join(WORDS) and reply.usd == USD
    assert reply.finish_reason == "stop" and upstream.seen[0]["stream_options"] == {"include_usage": True}
    pieces, reply = await stream(upstream, "no-usage")
    assert reply.ok and reply.usage_estimated and (reply.input_tokens, reply.output_tokens) == (10, 6)
    pieces, reply = await stream(upstream, "good-json")  # an endpoint that does not stream
    assert pieces == ["Paris"] and reply.usd == USD


async def test_streams_keep_their_connection(upstream):
    async with make(upstream.url, "good") as pool:
        for _ in range(4):
            assert [p async for p in pool.stream("good", "x")][-1].ok
    assert len(upstream.peers) == 1


@pytest.mark.parametrize(
    ("model", "outcome", "text", "says"),
    [
        ("breaks", Outcome.BAD_REPLY, "Paris is", "broke off"),
        ("ends-early", Outcome.BAD_REPLY, "Paris is the capital.", "broke off"),
        ("stalls", Outcome.TIMEOUT, "Paris is", "no reply within"),
        ("late-error", Outcome.SERVER_ERROR, "Par", "overloaded"),
        ("odd", Outcome.BAD_REPLY, None, "no object"),
        ("html", Outcome.BAD_REPLY, None, "an HTML page"),
    ],
)
async def test_a_stream_that_goes_wrong(upstream, model, outcome, text, says):
    pieces, reply = await stream(upstream, model, timeout_s=0.3)
    assert ("".join(pieces) or None) == text == reply.text and reply.outcome is outcome and says in reply.error
    assert (reply.usd > 0) is bool(text) and upstream.count[model] == 1


async def test_a_stream_is_retried_before_its_first_word(upstream):
    sleep = Sleeps()
    pieces, reply = await stream(upstream, "limited", sleep=sleep)
    assert pieces == WORDS and reply.attempts == 2 and 3 <= sleep.seconds[0] <= 3.5


async def test_closing_a_stream_hangs_up_and_is_booked(upstream):
    async with make(upstream.url, "stalls") as pool:
        pieces = pool.stream("stalls", "x" * 40)
        assert [await anext(pieces), await anext(pieces)] == WORDS[:2]
        await pieces.aclose()
        await asyncio.wait_for(upstream.dropped.wait(), 2)
        (entry,) = pool.ledger
        assert entry.outcome == "cancelled" and (entry.input_tokens, entry.output_tokens) == (10, 2)


# ---- keys ----


async def test_a_planted_key_is_in_no_output(upstream, monkeypatch, tmp_path, caplog, capfd):
    monkeypatch.setenv("PLANTED", KEY)
    options = {"api_key": Secret("PLANTED"), "headers": {"x-team": "team ${PLANTED}"}}
    models = ("good", "down", "refused", "echo-key", "html", "hang")
    pool = make(
        upstream.url, *models, timeout_s=0.2, **options,
        pool={"ledger": Ledger(tmp_path / "ledger.jsonl"), "cache": ReplyCache(tmp_path / "cache.sqlite")},
    )  # fmt: skip
    caplog.set_level(logging.DEBUG)
    replies = [await pool.call(m, "x") for m in models]
    replies += [[p async for p in pool.stream(m, "x")][-1] for m in models]
    replies.append(await make("http://127.0.0.1:9/v1", "good", **options).call("good", "x"))
    shown = [repr(pool), pool.fingerprint(), *(repr(pool.backend(m)) + str(vars(pool.backend(m))) for m in models)]
    await pool.aclose()
    assert upstream.headers[0]["authorization"] == f"Bearer {KEY}" and upstream.headers[0]["x-team"] == f"team {KEY}"
    out = capfd.readouterr()
    files = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()).decode("utf-8", "replace")
    everything = " ".join([*map(repr, replies), *shown, caplog.text, out.out, out.err, files])
    assert KEY not in everything and "abcdefgh12345" not in everything
    assert "HTTP 401" in everything and "your key is Bearer ***" in files
