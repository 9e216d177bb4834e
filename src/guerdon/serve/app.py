"""The server: a bare ASGI application that speaks OpenAI's chat protocol.

``POST /v1/chat/completions`` (plain and streamed), ``GET /v1/models``, ``GET /v1/models/{name}``,
``GET /healthz`` and ``GET /metrics``. There is no framework on the hot path: a request is parsed once,
checked once, and answered with one serialisation.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import sys
import time
import traceback
from collections.abc import MutableMapping, Sequence
from typing import Any

from guerdon.errors import ConfigError, nearest
from guerdon.routing.pool import Pool
from guerdon.serve import wire
from guerdon.serve.http import CLIENT_CLOSED, JSON, Headers, Receive, Scope, Send, bearer, lifespan, read_body, respond
from guerdon.serve.keys import KeyStore, Reservation, digest
from guerdon.serve.metrics import CONTENT_TYPE, Metrics
from guerdon.serve.problems import Problem, payload
from guerdon.serve.request import ChatRequest, parse_chat
from guerdon.serve.routes import Answer, FixedMember, Plan, Served, token_estimate
from guerdon.serve.settings import Settings
from guerdon.serve.stops import StopCutter, cut_at
from guerdon.types import Usage

__all__ = ["App", "create_app"]

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class _Call:
    """One chat request on its way through the server."""

    __slots__ = (
        "answer", "begun", "gone", "id", "key", "last_event", "model", "plan", "request", "reservation", "started",
        "status", "t0",
    )  # fmt: skip

    def __init__(self, id: str) -> None:
        self.id = id
        self.t0 = time.perf_counter()
        self.status = 0
        self.begun = False  # from here on money may have been spent
        self.started = False  # response headers were sent
        self.gone = False  # the client went away
        self.last_event = 0.0
        self.model = "-"
        self.key = ""
        self.request: ChatRequest | None = None
        self.plan: Plan | None = None
        self.reservation: Reservation | None = None
        self.answer: Answer | None = None


def create_app(
    routes: Served | Sequence[Served],
    pool: Pool,
    keys: KeyStore | None = None,
    settings: Settings | None = None,
    *,
    metrics: Metrics | None = None,
) -> App:
    """Make the application.

    Args:
        routes: what is served, each under its name; every member of the pool is served besides.
        pool: the members. Closed with the application.
        keys: who may use it; ``None`` lets everybody in.
        settings: limits.
        metrics: counters, shared between worker processes where a folder was given.

    Raises:
        ConfigError: two things are served under one name.
    """
    return App([routes] if not isinstance(routes, Sequence) else routes, pool, keys, settings or Settings(), metrics)


class App:
    """See :func:`create_app`."""

    def __init__(
        self,
        routes: Sequence[Served],
        pool: Pool,
        keys: KeyStore | None,
        settings: Settings,
        metrics: Metrics | None = None,
    ) -> None:
        self.pool = pool
        self.keys = keys
        self.settings = settings
        self.metrics = metrics or Metrics()
        self.table: dict[str, Served] = {}
        for served in routes:
            if served.name in self.table:
                raise ConfigError(f"{served.name!r} is served twice; give one of them another name")
            self.table[served.name] = served
        for name in pool:
            served = self.table.setdefault(name, FixedMember(pool, name))
            if getattr(served, "member", None) != name:
                raise ConfigError(f"router name {name!r} is also a member of the pool; choose another --name")
        self.draining = False
        self.in_flight = 0
        self._prefix = secrets.token_hex(6)
        self._count = 0
        self._started = int(time.time())
        self._sharing: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry point."""
        if scope["type"] == "http":
            if scope["path"] == "/v1/chat/completions" and scope["method"] == "POST":
                await self._chat(scope, receive, send)
            else:
                await self._other(scope, send)
        elif scope["type"] == "lifespan":
            await lifespan(self.startup, self.shutdown, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})

    # ---- life ----

    async def startup(self) -> None:
        """Open the key store."""
        if self.keys is not None:
            self.keys.start()
        if self.metrics.folder is not None:
            self._sharing = asyncio.get_running_loop().create_task(self._share())

    async def shutdown(self) -> None:
        """Book what is open and close pool and key store."""
        if self._sharing is not None:
            self._sharing.cancel()
        for served in self.table.values():
            await served.aclose()
        await self.pool.aclose()
        if self.keys is not None:
            await self.keys.aclose()

    async def _share(self) -> None:
        while True:
            self._gauge()
            self.metrics.share()
            await asyncio.sleep(1.0)

    # ---- everything but chat ----

    async def _other(self, scope: Scope, send: Send) -> None:
        headers: Headers = [(b"x-request-id", self._next_id().encode())]
        path = scope["path"]
        try:
            known = path in ("/v1/chat/completions", "/v1/models", "/healthz", "/metrics") or path.startswith(
                "/v1/models/"
            )
            if not known:
                raise Problem(
                    404,
                    "unknown_path",
                    "no such path; there are /v1/chat/completions, /v1/models, /healthz and /metrics",
                    type="invalid_request_error",
                )
            allowed = b"POST" if path == "/v1/chat/completions" else b"GET, HEAD"
            if scope["method"].encode() not in allowed.split(b", "):
                headers.append((b"allow", allowed))
                raise Problem(405, "method_not_allowed", f"{path} takes {allowed.decode()}, got {scope['method']}")
            if path == "/healthz":
                ready = not self.draining
                status, body, kind = 200 if ready else 503, {"status": "ok" if ready else "draining"}, JSON
                await respond(send, status, wire.dumps(body), [*headers, kind])
                return
            await self._authenticate(dict(scope["headers"]))
            if path == "/metrics":
                await respond(send, 200, self._metrics_text(), [*headers, (b"content-type", CONTENT_TYPE)])
            elif path == "/v1/models":
                models = [self._describe(served) for served in self.table.values()]
                await respond(send, 200, wire.dumps({"object": "list", "data": models}), [*headers, JSON])
            else:
                served = self._lookup(path.removeprefix("/v1/models/"))
                await respond(send, 200, wire.dumps(self._describe(served)), [*headers, JSON])
        except Problem as problem:
            await respond(send, problem.status, wire.dumps(payload(problem)), [*headers, JSON, *problem.headers()])

    def _describe(self, served: Served) -> dict[str, Any]:
        out: dict[str, Any] = {
            "id": served.name,
            "object": "model",
            "created": self._started,
            "owned_by": served.owner,
        }
        member = self.pool.get(served.name)
        if member is not None:
            out["guerdon"] = {
                "descriptor": member.descriptor,
                "input_price": member.input_price,
                "output_price": member.output_price,
                "price_date": member.price_date,
            }
        return out

    def _metrics_text(self) -> bytes:
        self._gauge()
        return self.metrics.text()

    def _gauge(self) -> None:
        """Take over what is counted elsewhere: requests under way, the pool's breakers and its ledger."""
        self.metrics.put("guerdon_in_flight", (), self.in_flight)
        for name, state in self.pool.breakers.items():
            self.metrics.breaker(name, state)
        # A policy may ask for names that no member has; they must not become labels.
        used = self.pool.ledger.by_member()
        for name in self.pool:
            self.metrics.member(name, used.get(name, Usage()))

    def _lookup(self, name: str) -> Served:
        served = self.table.get(name)
        if served is None:
            resolved = self.pool.resolve(name)
            served = self.table.get(resolved) if resolved is not None else None
        if served is None:
            close = nearest(name[:100], self.table) or f"; there are: {', '.join(list(self.table)[:20])}"
            raise Problem(
                404,
                "model_not_found",
                f"the model {name[:100]!r} does not exist{close}",
                type="invalid_request_error",
                param="model",
            )
        return served

    async def _authenticate(self, headers: MutableMapping[bytes, bytes]) -> str:
        if self.keys is None:
            return ""
        key_digest = digest(bearer(headers))
        await self.keys.check(key_digest)
        return key_digest

    def _next_id(self) -> str:
        self._count += 1
        return f"{self._prefix}{self._count:08x}"

    # ---- chat ----

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = _Call(self._next_id())
        watcher: asyncio.Task[None] | None = None
        self.in_flight += 1
        try:
            await self._admit(call, scope, receive)
            task = asyncio.current_task()
            assert task is not None
            watcher = asyncio.get_running_loop().create_task(_watch(receive, call, task))
            await self._work(call, send)
        except Problem as problem:
            await self._fail(call, problem, send)
        except asyncio.CancelledError:
            if not call.gone:
                raise
            # Our own watcher cancelled us, and nobody is left to answer.
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()
            call.status = CLIENT_CLOSED
            self.metrics.add("guerdon_disconnects_total", ())
        except Exception as error:  # noqa: BLE001 - a bug: the client gets an OpenAI error, the log where it was
            _report(call, error)
            await self._fail(call, Problem(500, "internal_error", f"internal error; request id {call.id}"), send)
        finally:
            if watcher is not None:
                watcher.cancel()
            self._book(call)
            self.in_flight -= 1

    async def _admit(self, call: _Call, scope: Scope, receive: Receive) -> None:
        """Everything that can be refused before anything is planned: from cheap to dear."""
        if self.draining:
            raise Problem(503, "shutting_down", "the server is shutting down; retry elsewhere", retry_after=1)
        if self.in_flight > self.settings.max_in_flight:
            raise Problem(503, "overloaded", f"more than {self.settings.max_in_flight} requests at once", retry_after=1)
        headers = dict(scope["headers"])
        if self.keys is not None:
            call.key = await self._authenticate(headers)
        kind = headers.get(b"content-type")
        if kind is not None and kind.partition(b";")[0].strip().lower() != b"application/json":
            raise Problem(415, "unsupported_media_type", "the content type must be application/json")
        settings = self.settings
        body = await read_body(
            headers, receive, limit=settings.max_body_bytes, seconds=settings.read_s, advice="shorten the messages"
        )
        try:
            parsed = wire.loads(body)
        except ValueError:
            raise Problem(400, "invalid_json", "the body is not valid JSON in UTF-8") from None
        request = parse_chat(parsed, headers, time.monotonic())
        request.max_cost_usd = _tighter(request.max_cost_usd, settings.max_cost_usd)
        request.max_calls = _tighter(request.max_calls, settings.max_calls)
        if settings.deadline_s is not None:
            request.deadline = _tighter(request.deadline, time.monotonic() + settings.deadline_s)
        call.request = request

    async def _work(self, call: _Call, send: Send) -> None:
        """Plan, reserve, answer. The deadline covers all of it."""
        request = call.request
        assert request is not None
        served = self._lookup(request.model)
        call.model = served.name
        if request.deadline is None:
            await self._run(call, request, served, send)
            return
        try:
            async with asyncio.timeout(request.deadline - time.monotonic()):
                await self._run(call, request, served, send)
        except TimeoutError:
            raise Problem(504, "deadline_exceeded", "no complete answer within the deadline of this request") from None

    async def _run(self, call: _Call, request: ChatRequest, served: Served, send: Send) -> None:
        if self.keys is not None and served.heavy:
            # Planning costs time, so a key that is over its limits must not get that far.
            call.reservation = await self.keys.reserve(call.key, usd=0.0, tokens=token_estimate(request))
        call.plan = plan = await served.plan(request)
        if request.max_cost_usd is not None and plan.usd > request.max_cost_usd:
            raise Problem(
                402,
                "max_cost_exceeded",
                f"the answer could cost up to ${plan.usd:.6f}, more than max_cost_usd ${request.max_cost_usd:.6f}; "
                "lower max_tokens or raise max_cost_usd",
                param="max_cost_usd",
            )
        if plan.member is not None and request.max_calls == 0:
            raise Problem(402, "max_calls_exceeded", "answering takes one call, but max_calls is 0", param="max_calls")
        if self.keys is not None:
            if call.reservation is None:
                call.reservation = await self.keys.reserve(call.key, usd=plan.usd, tokens=plan.tokens)
            else:
                await self.keys.extend(call.reservation, usd=plan.usd)
        call.begun = True
        if request.stream:
            await self._stream(call, request, served, plan, send)
            return
        call.answer = answer = await served.answer(request, plan)
        if answer.problem is not None:
            raise answer.problem
        text, finish = answer.text, answer.finish_reason
        if request.stop:
            text = cut_at(text, request.stop)
            finish = finish if len(text) == len(answer.text) else "stop"
        body = wire.completion(
            id=f"chatcmpl-{call.id}",
            created=int(time.time()),
            model=call.model,
            text=text,
            finish_reason=finish,
            input_tokens=answer.input_tokens,
            output_tokens=answer.output_tokens,
            extension=_extension(call, answer),
        )
        call.status = 200
        call.started = True
        await respond(send, 200, body, [JSON, *_headers(call)])

    async def _stream(self, call: _Call, request: ChatRequest, served: Served, plan: Plan, send: Send) -> None:
        chunks = wire.Chunks(f"chatcmpl-{call.id}", int(time.time()), call.model, request.include_usage)
        cutter = StopCutter(request.stop)
        call.last_event = time.monotonic()
        beating = asyncio.get_running_loop().create_task(self._heartbeat(call, chunks, send))
        try:
            async with contextlib.aclosing(served.stream(request, plan)) as items:
                async for item in items:
                    if isinstance(item, str):
                        piece = cutter.feed(item) if request.stop else item
                        if piece:
                            await self._event(call, chunks, chunks.text(piece), send)
                    else:
                        call.answer = item
        finally:
            beating.cancel()
        answer = call.answer
        if answer is None:
            raise Problem(502, "incomplete_stream", "the answer broke off")
        if answer.problem is not None:
            raise answer.problem
        finish = "stop" if cutter.done else answer.finish_reason
        last = [chunks.text(rest)] if (rest := cutter.rest()) else []
        last.append(chunks.finish(finish, _extension(call, answer)))
        if request.include_usage:
            last.append(chunks.usage(answer.input_tokens, answer.output_tokens))
        last.append(wire.DONE)
        await self._event(call, chunks, b"".join(last), send, more=False)

    async def _event(self, call: _Call, chunks: wire.Chunks, data: bytes, send: Send, *, more: bool = True) -> None:
        call.last_event = time.monotonic()
        if not call.started:
            call.started = True
            call.status = 200
            await send({"type": "http.response.start", "status": 200, "headers": [*_STREAM_HEADERS, *_headers(call)]})
            data = chunks.role() + data
        await send({"type": "http.response.body", "body": data, "more_body": more})

    async def _heartbeat(self, call: _Call, chunks: wire.Chunks, send: Send) -> None:
        every = self.settings.heartbeat_s
        while True:
            wait = call.last_event + every - time.monotonic()
            if wait <= 0:
                await self._event(call, chunks, wire.HEARTBEAT, send)
                wait = every
            await asyncio.sleep(wait)

    async def _fail(self, call: _Call, problem: Problem, send: Send) -> None:
        body = payload(problem)
        call.status = problem.status
        if problem.status == CLIENT_CLOSED:
            return
        if call.started:  # the status line is gone: say it inside the stream, and close without [DONE]
            await send({"type": "http.response.body", "body": wire.event(body), "more_body": False})
            return
        headers = [JSON, *_headers(call), *problem.headers()]
        if problem.status in (408, 413):
            headers.append((b"connection", b"close"))  # the rest of the body is not worth reading
        if call.answer is not None:
            body["guerdon"] = _extension(call, call.answer)
        call.started = True
        await respond(send, problem.status, wire.dumps(body), headers)

    def _book(self, call: _Call) -> None:
        """Settle the money and count the request, whatever came of it."""
        answer, plan, reservation = call.answer, call.plan, call.reservation
        if answer is not None:
            usd, tokens = answer.usd, answer.input_tokens + answer.output_tokens
        elif call.begun and plan is not None:
            usd, tokens = plan.usd if plan.spent is None else plan.spent, plan.tokens
        else:
            usd, tokens = 0.0, 0
        if reservation is not None and self.keys is not None:
            self.keys.settle(reservation, usd=usd, tokens=tokens)
        seconds = time.perf_counter() - call.t0
        metrics = self.metrics
        metrics.add("guerdon_requests_total", ("chat", call.model, str(call.status)))
        metrics.observe("guerdon_request_seconds", ("chat",), seconds)
        if answer is not None:
            metrics.observe("guerdon_overhead_seconds", ("chat",), max(0.0, seconds - answer.waited_s))
        if self.settings.access_log:
            _log(call, seconds, usd)


def _extension(call: _Call, answer: Answer) -> dict[str, Any]:
    overhead = time.perf_counter() - call.t0 - answer.waited_s
    return {
        "request_id": call.id,
        "reason": answer.reason,
        "member": answer.member,
        "usd": answer.usd,
        "calls": answer.calls,
        "overhead_ms": round(overhead * 1000, 3),
        "trace": answer.trace,
    }


def _headers(call: _Call) -> Headers:
    """Request id always; route, money and overhead as far as they are known yet."""
    out: Headers = [(b"x-request-id", call.id.encode())]
    answer, plan = call.answer, call.plan
    if answer is not None:
        overhead = time.perf_counter() - call.t0 - answer.waited_s
        out += [
            (b"x-guerdon-reason", _ascii(answer.reason)),
            (b"x-guerdon-member", _ascii(answer.member or "-")),
            (b"x-guerdon-cost-usd", b"%.9f" % answer.usd),
            (b"x-guerdon-calls", b"%d" % answer.calls),
            (b"x-guerdon-overhead-ms", b"%.3f" % (overhead * 1000)),
        ]
    elif plan is not None:
        out += [(b"x-guerdon-reason", _ascii(plan.reason)), (b"x-guerdon-member", _ascii(plan.member or "-"))]
    return out


def _ascii(text: str) -> bytes:
    """A header value: one line of printable ASCII, at most 200 bytes."""
    if text.isascii() and text.isprintable() and len(text) <= 200:
        return text.encode("ascii")
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text[:200]).encode("ascii")


def _tighter(a: Any, b: Any) -> Any:
    """The smaller of two limits, either of which may be absent."""
    if a is None:
        return b
    return a if b is None else min(a, b)


async def _watch(receive: Receive, call: _Call, task: asyncio.Task[Any]) -> None:
    """Cancel the request's task when the client hangs up before the answer is complete."""
    while (await receive())["type"] != "http.disconnect":
        pass
    call.gone = True
    task.cancel()


def _report(call: _Call, error: Exception) -> None:
    """Where an unforeseen error arose; not what it says, which may hold the client's words."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    print(f"guerdon: request {call.id} met a bug: {type(error).__name__}\n{frames}", file=sys.stderr, flush=True)


def _log(call: _Call, seconds: float, usd: float) -> None:
    line = {
        "time": round(time.time(), 3),
        "id": call.id,
        "model": call.model,
        "status": call.status,
        "seconds": round(seconds, 6),
        "usd": usd,
        "member": call.answer.member if call.answer else None,
        "reason": call.plan.reason if call.plan else None,
        "stream": call.request.stream if call.request else None,
    }
    with contextlib.suppress(OSError):
        print(json.dumps(line), file=sys.stderr, flush=True)
