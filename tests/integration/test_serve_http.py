"""The running server: official OpenAI client, real sockets, a fake upstream that misbehaves on demand."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest

from guerdon.serve.keys import create_key, list_keys

pytestmark = pytest.mark.integration

CLI = (
    "import typer; from guerdon.cli.serve import keys_app, serve_command; app = typer.Typer();"
    "app.command('serve')(serve_command); app.add_typer(keys_app, name='keys'); app()"
)
HI = [{"role": "user", "content": "Which city is the capital of France?"}]
WORDS = ["Paris", " is", " the", " capital", "."]


class Upstream:
    """An OpenAI-like endpoint; the model name says how it behaves."""

    def __init__(self) -> None:
        self.seen: list[dict] = []
        self.dropped = threading.Event()
        self.release = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    async def _serve(self) -> None:
        from aiohttp import web

        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        self._ready.set()
        await asyncio.Event().wait()

    async def _answer(self, request):
        from aiohttp import web

        body = await request.json()
        self.seen.append(body)
        model = body["model"]
        if model == "error":
            return web.json_response({"error": {"message": "secret upstream words"}}, status=500)
        if model == "limited":
            return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"retry-after": "7"})
        if model == "html":
            return web.Response(text="<html>Bad gateway</html>", content_type="text/html")
        if model == "empty":
            return web.json_response(self._completion(body, None))
        try:
            if model == "hang":
                await asyncio.sleep(60)
            if model == "slow":
                await asyncio.sleep(0.4)
            if body.get("stream"):
                return await self._stream(request, body)
        except (asyncio.CancelledError, ConnectionResetError):
            self.dropped.set()
            raise
        return web.json_response(self._completion(body, "".join(WORDS)))

    def _completion(self, body, text):
        return {
            "id": "x", "object": "chat.completion", "created": 1, "model": body["model"],
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 50, "total_tokens": 60},
        }  # fmt: skip

    async def _stream(self, request, body):
        from aiohttp import web

        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        base = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}

        async def send(**more) -> None:
            await response.write(b"data: " + json.dumps({**base, **more}).encode() + b"\n\n")

        for i, word in enumerate(WORDS):
            if body["model"] == "drip" and i == 2:
                await asyncio.to_thread(self.release.wait, 15)
            if body["model"] == "breaks" and i == 2:
                request.transport.abort()
                return response
            await send(choices=[{"index": 0, "delta": {"content": word}, "finish_reason": None}])
        await send(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
        await send(choices=[], usage={"prompt_tokens": 10, "completion_tokens": 50, "total_tokens": 60})
        await response.write(b"data: [DONE]\n\n")
        return response


# Twins behave alike and have circuit breakers of their own.
TWINS = ("error2", "limited2", "html2", "hang2")
MODELS = (*TWINS, "good", "slow", "error", "limited", "html", "empty", "hang", "drip", "breaks")


def pool_yaml(port: int) -> str:
    rows = [
        f"  - name: {m}\n    descriptor: behaves like {m}\n    input_price: 1.0\n    output_price: 2.0\n"
        f"    endpoint: {{base_url: 'http://127.0.0.1:{port}/v1', model: {m.removesuffix('2')}}}\n"
        f"    timeout_s: {0.5 if 'hang' in m else 20}\n"
        f"    max_concurrency: 64\n"
        for m in MODELS
    ]
    return "members:\n" + "".join(rows)


@contextlib.contextmanager
def serving(tmp_path, upstream, *options):
    pool = tmp_path / "pool.yaml"
    pool.write_text(pool_yaml(upstream.port))
    command = [sys.executable, "-c", CLI, "serve", "--router", "member:good", "--name", "front", "--pool", str(pool)]
    with (tmp_path / "log").open("wb") as log:
        child = subprocess.Popen([*command, "--port", "0", *options], stdout=subprocess.PIPE, stderr=log)
        try:
            line = child.stdout.readline()
            assert line, (tmp_path / "log").read_text()
            child.url = json.loads(line)["url"]
            yield child
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(10)
            finally:
                child.kill()


@pytest.fixture(scope="module")
def upstream():
    return Upstream()


@pytest.fixture(scope="module")
def server(tmp_path_factory, upstream):
    tmp_path = tmp_path_factory.mktemp("serve")
    key = create_key(tmp_path / "keys.sqlite", "team", usd_total=1000)
    with serving(tmp_path, upstream, "--keys", str(tmp_path / "keys.sqlite"), "--max-body", "20000") as child:
        child.key, child.folder = key, tmp_path
        yield child


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url, api_key=server.key, max_retries=0, timeout=20)


def http(url, *, body=None, headers=(), method=None):
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=dict(headers), method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, dict(reply.headers), reply.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def spent(folder) -> float:
    """Money booked so far; settlements are written a moment after the reply."""
    for _ in range(100):
        (info,) = list_keys(folder / "keys.sqlite")
        if info.reserved == 0:
            return info.spent_total
        time.sleep(0.02)
    raise AssertionError("a reservation was never settled")


COST = (10 * 1.0 + 50 * 2.0) / 1e6


# ---- the official client, unchanged ----


def test_plain(client, server):
    before = spent(server.folder)
    raw = client.chat.completions.with_raw_response.create(model="front", messages=HI, max_tokens=60)
    reply = raw.parse()
    assert reply.choices[0].message.content == "Paris is the capital."
    assert reply.choices[0].finish_reason == "stop" and reply.model == "front"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (10, 50, 60)
    route = reply.model_extra["guerdon"]
    assert route["member"] == "good" and route["usd"] == pytest.approx(COST) and route["calls"] == 1
    assert route["trace"][0]["outcome"] == "ok" and route["trace"][0]["output_price"] == 2.0
    assert raw.headers["x-guerdon-reason"] == route["reason"] == "always good"
    assert raw.headers["x-guerdon-member"] == "good" and raw.headers["x-guerdon-calls"] == "1"
    assert float(raw.headers["x-guerdon-cost-usd"]) == pytest.approx(COST)
    assert float(raw.headers["x-guerdon-overhead-ms"]) >= 0
    assert raw.headers["x-request-id"] == route["request_id"]
    assert spent(server.folder) - before == pytest.approx(COST)


def test_streaming(client, server):
    before = spent(server.folder)
    stream = client.chat.completions.create(
        model="good", messages=HI, max_tokens=60, stream=True, stream_options={"include_usage": True}
    )
    assert stream.response.headers["x-guerdon-reason"] == "addressed directly"
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Paris is the capital."
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) == len(WORDS)  # piece by piece
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-2].model_extra["guerdon"]["usd"] == pytest.approx(COST)
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 60
    assert all(c.usage is None for c in chunks[:-1]) and len({c.id for c in chunks}) == 1
    assert spent(server.folder) - before == pytest.approx(COST)


def test_streaming_without_usage(client):
    chunks = list(client.chat.completions.create(model="good", messages=HI, stream=True))
    assert all(c.usage is None and c.choices for c in chunks)


def test_stop_strings(client):
    reply = client.chat.completions.create(model="good", messages=HI, stop=[" the"])
    assert reply.choices[0].message.content == "Paris is" and reply.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(model="good", messages=HI, stop=" cap", stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Paris is the"


def test_models(client):
    assert [m.id for m in client.models.list()] == ["front", *MODELS]
    assert client.models.retrieve("good").model_extra["guerdon"]["input_price"] == 1.0
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_errors_have_the_clients_own_classes(client, server):
    with pytest.raises(openai.NotFoundError, match="did you mean good"):
        client.chat.completions.create(model="goood", messages=HI)
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="good", messages=HI, n=3)
    assert bad.value.param == "n" and bad.value.code == "unsupported_parameter"
    stranger = openai.OpenAI(base_url=server.url, api_key="gd-wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.chat.completions.create(model="good", messages=HI)


# ---- an upstream that misbehaves ----


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "status", "code"),
    [
        ("error", 502, "upstream_error"),
        ("limited", 503, "upstream_rate_limited"),
        ("html", 502, "upstream_bad_reply"),
        ("hang", 504, "upstream_timeout"),
    ],
)
def test_upstream_failures(client, model, status, code, stream):
    deadline = 3 if model == "limited" else 15  # too short for the pool to wait as long as the endpoint asks
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(
            model=f"{model}2" if stream else model, messages=HI, stream=stream, extra_body={"timeout": deadline}
        )
    assert caught.value.status_code == status and caught.value.code == code
    assert model in caught.value.message and "secret upstream words" not in str(caught.value)
    if model == "limited":
        assert caught.value.response.headers["retry-after"] == "7"


def test_an_empty_reply_is_an_error_and_is_paid(client, server):
    before = spent(server.folder)
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="empty", messages=HI)
    assert caught.value.status_code == 502
    assert spent(server.folder) - before == pytest.approx(COST)


def test_a_stream_that_breaks_off_ends_with_an_error(client, server):
    before = spent(server.folder)
    got = []
    with pytest.raises(openai.APIError):
        stream = client.chat.completions.create(model="breaks", messages=HI, stream=True, max_tokens=60)
        got.extend(chunk.choices[0].delta.content or "" for chunk in stream)
    assert "".join(got) == "Paris is"
    assert spent(server.folder) > before


def test_a_deadline_is_kept(client):
    started = time.monotonic()
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="slow", messages=HI, extra_headers={"x-guerdon-deadline-ms": "100"})
    assert caught.value.status_code == 504 and time.monotonic() - started < 0.39


def test_hanging_up_cancels_the_upstream_call_and_is_booked(client, server, upstream):
    upstream.release.clear()
    upstream.dropped.clear()
    before = spent(server.folder)
    stream = client.chat.completions.create(model="drip", messages=HI, stream=True, max_tokens=60)
    assert [next(stream).choices[0].delta.content for _ in range(3)] == ["", "Paris", " is"]
    stream.close()
    assert upstream.dropped.wait(5)
    assert before < spent(server.folder) <= before + (200 * 1.0 + 60 * 2.0) / 1e6


# ---- caps ----


def test_max_cost_is_checked_before_paying(client, upstream):
    calls = len(upstream.seen)
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="good", messages=HI, max_tokens=1000, extra_body={"max_cost_usd": 0.001})
    assert caught.value.status_code == 402 and caught.value.param == "max_cost_usd"
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="good", messages=HI, extra_headers={"x-guerdon-max-calls": "0"})
    assert caught.value.status_code == 402
    assert len(upstream.seen) == calls
    client.chat.completions.create(model="good", messages=HI, max_tokens=100, extra_body={"max_cost_usd": 0.001})


def test_two_hundred_parallel_requests_stay_under_the_cap(server, upstream):
    path = server.folder / "keys.sqlite"
    cap = 0.01
    key = create_key(path, "capped", usd_total=cap)
    calls = len(upstream.seen)

    async def run():
        import aiohttp

        body = {"model": "slow", "messages": HI, "max_tokens": 100}
        headers = {"authorization": f"Bearer {key}"}
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session:

            async def one():
                async with session.post(f"{server.url}/chat/completions", json=body) as reply:
                    return reply.status, (await reply.json()).get("guerdon", {}).get("usd", 0.0)

            return await asyncio.gather(*(one() for _ in range(200)))

    results = asyncio.run(run())
    good = [usd for status, usd in results if status == 200]
    assert {status for status, _ in results} == {200, 402}
    assert len(good) == len(upstream.seen) - calls  # nothing was paid for that was refused
    assert 0 < sum(good) <= cap
    time.sleep(0.2)
    info = next(k for k in list_keys(path) if k.name == "capped")
    assert info.spent_total == pytest.approx(sum(good)) and info.reserved == 0
    with contextlib.closing(__import__("sqlite3").connect(path)) as conn, conn:
        conn.execute("DELETE FROM keys WHERE name = 'capped'")


def test_rate_limit(tmp_path, upstream):
    key = create_key(tmp_path / "keys.sqlite", "team", rpm=2)
    with serving(tmp_path, upstream, "--keys", str(tmp_path / "keys.sqlite")) as child:
        client = openai.OpenAI(base_url=child.url, api_key=key, max_retries=0)
        for _ in range(2):
            client.chat.completions.create(model="good", messages=HI)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="good", messages=HI)
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30


# ---- HTTP ----


def test_malformed_requests(server):
    root = server.url.removesuffix("/v1")
    auth = {"authorization": f"Bearer {server.key}"}
    json_type = {**auth, "content-type": "application/json"}
    chat = f"{server.url}/chat/completions"
    good = {"model": "good", "messages": HI}
    cases = [
        (404, "unknown_path", f"{root}/v2/nothing", None, auth, None),
        (405, "method_not_allowed", chat, None, auth, None),
        (405, "method_not_allowed", f"{server.url}/models", b"", auth, "POST"),
        (401, "missing_api_key", chat, good, {"content-type": "application/json"}, None),
        (401, "invalid_api_key", chat, good, {**json_type, "authorization": "Bearer nonsense"}, None),
        (401, "missing_api_key", f"{server.url}/models", None, {}, None),
        (401, "missing_api_key", f"{root}/metrics", None, {}, None),
        (
            415,
            "unsupported_media_type",
            chat,
            b"a=b",
            {**auth, "content-type": "application/x-www-form-urlencoded"},
            None,
        ),
        (400, "invalid_json", chat, b"{", json_type, None),
        (400, "invalid_json", chat, b"", json_type, "POST"),
        (400, "invalid_body", chat, b"[]", json_type, None),
        (400, "missing_required_parameter", chat, {"model": "good"}, json_type, None),
        (413, "body_too_large", chat, {**good, "user": "x" * 30_000}, json_type, None),
        (431, "headers_too_large", chat, good, {**json_type, "x-long": "x" * 40_000}, None),
    ]
    for status, code, url, body, headers, method in cases:
        got, reply_headers, text = http(url, body=body, headers=headers, method=method)
        assert got == status, (url, code, text)
        error = json.loads(text)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["code"] == code
        assert reply_headers["content-type"] == "application/json"
        if status == 405:
            assert "POST" in reply_headers["allow"] or "GET" in reply_headers["allow"]


def raw(server, data: bytes, *, half_close=False) -> bytes:
    host, port = re.match(r"http://(.+):(\d+)/", server.url + "/").groups()
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(data)
        out = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(65536):
                out += piece
                if half_close:
                    break
        return out


def test_what_is_not_http_gets_an_openai_error(server):
    reply = raw(server, b"\x16\x03\x01 not http at all\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 400") and b'"code":"invalid_http"' in reply
    endless = raw(server, b"GET /healthz HTTP/1.1\r\nx: " + b"a" * 200_000)
    assert endless.startswith(b"HTTP/1.1 431")


def test_a_chunked_body_is_bounded_too(server):
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {server.key}\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    reply = raw(server, head.encode() + b"4e20\r\n" + b" " * 20_000 + b"\r\n" + b"4e20\r\n" + b" " * 20_000 + b"\r\n")
    assert b"HTTP/1.1 413" in reply


def test_health_and_metrics(client, server):
    root = server.url.removesuffix("/v1")
    status, _, body = http(f"{root}/healthz")
    assert (status, json.loads(body)) == (200, {"status": "ok"})
    client.chat.completions.create(model="front", messages=HI)
    text = http(f"{root}/metrics", headers={"authorization": f"Bearer {server.key}"})[2].decode()
    parser = pytest.importorskip("prometheus_client.parser")
    families = {f.name: f for f in parser.text_string_to_metric_families(text)}
    requests = {tuple(s.labels.values()): s.value for s in families["guerdon_requests"].samples}
    assert requests["chat", "front", "200"] >= 1
    tokens = {tuple(s.labels.values()): s.value for s in families["guerdon_tokens"].samples}
    usd = {s.labels["member"]: s.value for s in families["guerdon_usd"].samples}
    assert tokens["good", "input"] % 10 == 0 and usd["good"] == pytest.approx(tokens["good", "input"] / 10 * COST)
    count = next(s for s in families["guerdon_request_seconds"].samples if s.name.endswith("_count"))
    assert count.value == sum(v for k, v in requests.items() if k[0] == "chat")
    assert {"closed", "half_open", "open"} == {s.labels["state"] for s in families["guerdon_breaker_state"].samples}
    assert families["guerdon_in_flight"].samples[0].value == 0


def test_neither_keys_nor_texts_are_logged(tmp_path, upstream):
    key = create_key(tmp_path / "keys.sqlite", "team")
    with serving(tmp_path, upstream, "--keys", str(tmp_path / "keys.sqlite"), "--access-log") as child:
        client = openai.OpenAI(base_url=child.url, api_key=key, max_retries=0)
        client.chat.completions.create(model="good", messages=HI)
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(model="error", messages=HI)
    log = (tmp_path / "log").read_text()
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert [(line["model"], line["status"]) for line in lines] == [("good", 200), ("error", 502)]
    assert lines[0]["usd"] == pytest.approx(COST)
    for secret in (key, "capital", "Paris", "secret upstream words"):
        assert secret not in log


# ---- life and death ----


def test_sigterm_finishes_a_running_stream_and_refuses_new_requests(tmp_path, upstream):
    upstream.release.clear()
    with serving(tmp_path, upstream) as child:
        client = openai.OpenAI(base_url=child.url, api_key="none", max_retries=0)
        root = child.url.removesuffix("/v1")
        stream = client.chat.completions.create(model="drip", messages=HI, stream=True)
        assert next(stream).choices[0].delta.role == "assistant"
        child.send_signal(signal.SIGTERM)
        time.sleep(0.4)
        assert http(f"{root}/healthz")[0] == 503
        status, headers, body = http(f"{child.url}/chat/completions", body={"model": "good", "messages": HI},
                                     headers={"content-type": "application/json"})  # fmt: skip
        assert status == 503 and json.loads(body)["error"]["code"] == "shutting_down"
        assert {k.lower() for k in headers} >= {"retry-after"}
        upstream.release.set()
        assert "".join(c.choices[0].delta.content or "" for c in stream) == "Paris is the capital."
        assert child.wait(10) == 0


def test_a_second_signal_stops_at_once(tmp_path, upstream):
    upstream.release.clear()
    with serving(tmp_path, upstream) as child:
        client = openai.OpenAI(base_url=child.url, api_key="none", max_retries=0)
        stream = client.chat.completions.create(model="drip", messages=HI, stream=True)
        next(stream)
        child.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        child.wait(5)
    upstream.release.set()


def test_several_workers_share_cap_and_counters(tmp_path, upstream):
    key = create_key(tmp_path / "keys.sqlite", "team", usd_total=30 * COST + 1e-9)
    with serving(tmp_path, upstream, "--keys", str(tmp_path / "keys.sqlite"), "--workers", "2") as child:
        root = child.url.removesuffix("/v1")
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        until = time.monotonic() + 20
        while http(f"{root}/healthz")[0] != 200:
            assert time.monotonic() < until
        body = {"model": "good", "messages": HI, "max_tokens": 50}

        async def run():
            import aiohttp

            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:

                async def one():
                    async with session.post(f"{child.url}/chat/completions", json=body, headers=headers) as reply:
                        return reply.status, (await reply.json()).get("guerdon", {}).get("usd", 0.0)

                return await asyncio.gather(*(one() for _ in range(100)))

        results = asyncio.run(run())
        good = sum(status == 200 for status, _ in results)
        assert 0 < sum(usd for _, usd in results) <= 30 * COST + 1e-9 and good < 100
        time.sleep(2.2)
        text = http(f"{root}/metrics", headers=headers)[2].decode()
        counted = re.findall(r'guerdon_requests_total\{route="chat",model="good",status="200"\} (\d+)', text)
        assert [int(c) for c in counted] == [good]


def test_startup_refuses_what_would_be_unsafe_or_wrong(tmp_path, upstream):
    pool = tmp_path / "pool.yaml"
    pool.write_text(pool_yaml(upstream.port))

    def fails(*options) -> str:
        base = [sys.executable, "-c", CLI, "serve", "--pool", str(pool), "--port", "0"]
        done = subprocess.run([*base, *options], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "--keys" in fails("--router", "member:good", "--host", "0.0.0.0")
    assert "did you mean good" in fails("--router", "member:goood")
    assert "does not exist" in fails("--router", "member:good", "--keys", str(tmp_path / "absent.sqlite"))
    assert "nowhere" in fails("--router", str(tmp_path / "nowhere"))
    junk = tmp_path / "junk.sqlite"
    junk.write_bytes(b"no database" * 200)
    assert "key store" in fails("--router", "member:good", "--keys", str(junk))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot listen" in fails("--router", "member:good", "--port", str(taken.getsockname()[1]))


def test_key_commands(tmp_path):
    store = str(tmp_path / "keys.sqlite")

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "-c", CLI, "keys", *arguments, "--keys", store],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    code, key, _ = run("create", "team", "--usd-day", "5", "--rpm", "60")
    assert code == 0 and key.startswith("gd-")
    code, text, _ = run("list", "--json")
    assert json.loads(text)[0]["usd_day"] == 5.0 and key.strip() not in text
    assert run("revoke", "team")[0] == 0
    assert "revoked" in run("list")[1]
    code, _, error = run("revoke", "nobody")
    assert code == 2 and "team" in error


def test_memory_stays_flat(server, client):
    """A smoke test: a leak of a kilobyte a request would show as 2 MB."""

    def rss() -> float:
        with open(f"/proc/{server.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    if not os.path.exists(f"/proc/{server.pid}/statm"):
        pytest.skip("needs /proc")

    async def load(n: int) -> None:
        import aiohttp

        body = {"model": "good", "messages": HI, "max_tokens": 60}
        headers = {"authorization": f"Bearer {server.key}"}
        async with aiohttp.ClientSession(headers=headers) as session:

            async def some() -> None:
                for _ in range(n // 20):
                    async with session.post(f"{server.url}/chat/completions", json=body) as reply:
                        await reply.read()

            await asyncio.gather(*(some() for _ in range(20)))

    asyncio.run(load(1000))
    before = rss()
    asyncio.run(load(2000))
    assert rss() - before < 2.0
