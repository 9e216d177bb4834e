"""Rewards over HTTP: a bare ASGI application in front of scoring processes.

``POST /v1/score`` (our own batches), ``POST /get_reward`` (OpenRLHF's remote reward), ``GET /healthz`` and
``GET /metrics``; see :mod:`guerdon.serve.reward_wire` for what is sent and answered. Other trainers call ``/v1/score``
from a function of theirs, as :func:`guerdon.integrations.verl_remote` does for verl, whose own ``remote`` reward manager
is Ray and no HTTP (as of version 0.8.0.dev).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import secrets
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from guerdon.errors import ConfigError
from guerdon.serve import wire
from guerdon.serve.http import CLIENT_CLOSED, JSON, Headers, Receive, Scope, Send, bearer, lifespan, read_body, respond
from guerdon.serve.keys import KeyStore, Reservation, digest
from guerdon.serve.metrics import CONTENT_TYPE, Labels, Metrics
from guerdon.serve.problems import Problem, payload
from guerdon.serve.reward_wire import openrlhf_answer, openrlhf_records, score_answer, score_records
from guerdon.serve.scorers import Scorers

__all__ = ["RewardSettings", "RewardsApp"]

_ROUTES = {"/v1/score": "score", "/get_reward": "openrlhf"}


@dataclass(frozen=True, slots=True)
class RewardSettings:
    """Limits of a reward server.

    Args:
        workers: scoring processes: as many batches are scored at once, the others wait.
        max_body_bytes: largest request body.
        max_head_bytes: largest request line with headers.
        max_batch: records per request.
        max_in_flight: requests scored or waiting at once; more get 503.
        timeout_s: seconds per request, waiting included; then its scoring is ended and the answer is 504.
        read_s: a body that has not arrived after so long is refused.
        drain_s: how long a shutdown waits for running requests.
        strip: ends of a policy's turn, taken off OpenRLHF's queries.
        access_log: write one JSON line per request to stderr: never texts, never keys.

    Raises:
        ConfigError: a limit out of range.
    """

    workers: int = 1
    max_body_bytes: int = 64 * 2**20
    max_head_bytes: int = 32 * 2**10
    max_batch: int = 4096
    max_in_flight: int = 256
    timeout_s: float = 120.0
    read_s: float = 30.0
    drain_s: float = 30.0
    strip: tuple[str, ...] = ()
    access_log: bool = False

    def __post_init__(self) -> None:
        for name in ("workers", "max_body_bytes", "max_head_bytes", "max_batch", "max_in_flight"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("timeout_s", "read_s", "drain_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a finite number above 0, got {value}")


class RewardMetrics(Metrics):
    """What a reward server counts."""

    series: ClassVar[Mapping[str, tuple[str, str, Labels]]] = {
        "guerdon_reward_requests_total": ("counter", "Requests by route and HTTP status.", ("route", "status")),
        "guerdon_rewards_total": ("counter", "Records by outcome: valid, or failed (no honest score).", ("outcome",)),
        "guerdon_reward_disconnects_total": ("counter", "Requests whose client went away before the answer.", ()),
        "guerdon_reward_restarts_total": ("counter", "Scoring processes replaced: out of time, or crashed.", ()),
        "guerdon_reward_in_flight": ("gauge", "Requests being scored or waiting.", ()),
        "guerdon_reward_scorers": ("gauge", "Scoring processes that live.", ()),
    }
    timings: ClassVar[Mapping[str, tuple[str, Labels]]] = {
        "guerdon_reward_request_seconds": ("Time from request to answer.", ("route",)),
    }


class RewardsApp:
    """The application.

    Args:
        spec: the reward, as YAML spells it; see :func:`guerdon.training.job.make_reward`.
        keys: who may use it; ``None`` lets everybody in. A key's limit of requests per minute holds; money and tokens are
            not spent here.
        settings: limits.
    """

    def __init__(self, spec: Any, keys: KeyStore | None = None, settings: RewardSettings | None = None) -> None:
        self.keys = keys
        self.settings = settings or RewardSettings()
        self.metrics = RewardMetrics()
        for outcome in ("valid", "failed"):  # there from the start, so that a rate can be taken
            self.metrics.add("guerdon_rewards_total", (outcome,), 0.0)
        self.metrics.add("guerdon_reward_restarts_total", (), 0.0)
        self.scorers = Scorers(
            spec, self.settings.workers, on_restart=lambda: self.metrics.add("guerdon_reward_restarts_total", ())
        )
        self.draining = False
        self.in_flight = 0
        self._prefix = secrets.token_hex(6)
        self._count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry point."""
        if scope["type"] == "http":
            if scope["method"] == "POST" and scope["path"] in _ROUTES:
                await self._score(_ROUTES[scope["path"]], scope, receive, send)
            else:
                await self._other(scope, send)
        elif scope["type"] == "lifespan":
            await lifespan(self.startup, self.shutdown, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})

    async def startup(self) -> None:
        """Open the key store and start the scoring processes.

        Raises:
            ConfigError: the reward or the key store cannot be used.
        """
        if self.keys is not None:
            self.keys.start()
        await self.scorers.start()

    async def shutdown(self) -> None:
        """End the scoring processes and close the key store."""
        await self.scorers.aclose()
        if self.keys is not None:
            await self.keys.aclose()

    # ---- everything but scoring ----

    async def _other(self, scope: Scope, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        headers: Headers = [(b"x-request-id", self._next_id().encode())]
        try:
            if path not in (*_ROUTES, "/healthz", "/metrics"):
                raise Problem(
                    404, "unknown_path", "no such path; there are /v1/score, /get_reward, /healthz and /metrics",
                    type="invalid_request_error",
                )  # fmt: skip
            allowed = "POST" if path in _ROUTES else "GET, HEAD"
            if method not in allowed.split(", "):
                headers.append((b"allow", allowed.encode()))
                raise Problem(405, "method_not_allowed", f"{path} takes {allowed}, got {method[:20]}")
            if path == "/healthz":
                state = "draining" if self.draining else "ok" if self.scorers.alive else "no scorers"
                await respond(send, 200 if state == "ok" else 503, wire.dumps({"status": state}), [*headers, JSON])
                return
            await self._authenticate(dict(scope["headers"]))
            self.metrics.put("guerdon_reward_in_flight", (), self.in_flight)
            self.metrics.put("guerdon_reward_scorers", (), self.scorers.alive)
            await respond(send, 200, self.metrics.text(), [*headers, (b"content-type", CONTENT_TYPE)])
        except Problem as problem:
            await respond(send, problem.status, wire.dumps(payload(problem)), [*headers, JSON, *problem.headers()])

    async def _authenticate(self, headers: Mapping[bytes, bytes]) -> str:
        if self.keys is None:
            return ""
        # OpenRLHF can be given nothing but a URL, so a key in it (basic authentication) has to do.
        key = digest(bearer(headers, basic=True))
        await self.keys.check(key)
        return key

    def _next_id(self) -> str:
        self._count += 1
        return f"{self._prefix}{self._count:08x}"

    # ---- scoring ----

    async def _score(self, route: str, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        id = self._next_id()
        headers: Headers = [(b"x-request-id", id.encode())]
        status, records = CLIENT_CLOSED, 0
        watcher: asyncio.Task[None] | None = None
        gone = asyncio.Event()
        reservation: Reservation | None = None
        self.in_flight += 1
        try:
            key = await self._admit(scope)
            if self.keys is not None:
                reservation = await self.keys.reserve(key, usd=0.0, tokens=0)
            batch = await self._read(route, scope, receive)
            records = len(batch)
            task = asyncio.current_task()
            assert task is not None
            watcher = asyncio.get_running_loop().create_task(_watch(receive, gone, task))
            rows = await self.scorers.score(batch, started + self.settings.timeout_s) if batch else []
            self._count_rows(rows)
            answer = openrlhf_answer(rows) if route == "openrlhf" else score_answer(rows, id)
            status = 200
            await respond(send, 200, wire.dumps(answer), [*headers, JSON])
        except Problem as problem:
            status = problem.status
            await self._fail(problem, headers, send)
        except asyncio.CancelledError:
            if not gone.is_set():
                raise
            # Our own watcher cancelled us, and nobody is left to answer.
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()
            self.metrics.add("guerdon_reward_disconnects_total", ())
        except Exception as error:  # noqa: BLE001 - a bug: the client gets an error, the log where it was
            frames = "".join(traceback.format_tb(error.__traceback__))
            print(f"guerdon: request {id} met a bug: {type(error).__name__}\n{frames}", file=sys.stderr, flush=True)
            status = 500
            await self._fail(Problem(500, "internal_error", f"internal error; request id {id}"), headers, send)
        finally:
            if watcher is not None:
                watcher.cancel()
            if reservation is not None and self.keys is not None:
                self.keys.settle(reservation, usd=0.0, tokens=0)
            self.in_flight -= 1
            self._book(route, id, status, records, time.monotonic() - started)

    async def _admit(self, scope: Scope) -> str:
        """What can be refused before the body is read."""
        if self.draining:
            raise Problem(503, "shutting_down", "the server is shutting down; retry elsewhere", retry_after=1)
        if self.in_flight > self.settings.max_in_flight:
            raise Problem(503, "overloaded", f"more than {self.settings.max_in_flight} requests at once", retry_after=1)
        headers = dict(scope["headers"])
        key = await self._authenticate(headers)
        kind = headers.get(b"content-type")
        if kind is not None and kind.partition(b";")[0].strip().lower() != b"application/json":
            raise Problem(415, "unsupported_media_type", "the content type must be application/json")
        return key

    async def _read(self, route: str, scope: Scope, receive: Receive) -> list[dict[str, Any]]:
        settings = self.settings
        body = await read_body(
            dict(scope["headers"]), receive, limit=settings.max_body_bytes, seconds=settings.read_s,
            advice="send fewer records at once",
        )  # fmt: skip
        try:
            parsed = wire.loads(body)
        except ValueError:
            raise Problem(400, "invalid_json", "the body is not valid JSON in UTF-8") from None
        if route == "openrlhf":
            return openrlhf_records(parsed, settings.max_batch, settings.strip)
        return score_records(parsed, settings.max_batch)

    def _count_rows(self, rows: list[dict[str, Any]]) -> None:
        valid = sum(bool(row["valid"]) for row in rows)
        self.metrics.add("guerdon_rewards_total", ("valid",), valid)
        self.metrics.add("guerdon_rewards_total", ("failed",), len(rows) - valid)

    async def _fail(self, problem: Problem, headers: Headers, send: Send) -> None:
        if problem.status == CLIENT_CLOSED:
            return
        headers = [*headers, JSON, *problem.headers()]
        if problem.status in (408, 413):
            headers.append((b"connection", b"close"))  # the rest of the body is not worth reading
        await respond(send, problem.status, wire.dumps(payload(problem)), headers)

    def _book(self, route: str, id: str, status: int, records: int, seconds: float) -> None:
        self.metrics.add("guerdon_reward_requests_total", (route, str(status)))
        self.metrics.observe("guerdon_reward_request_seconds", (route,), seconds)
        if not self.settings.access_log:
            return
        line = {
            "time": round(time.time(), 3), "id": id, "route": route, "status": status, "records": records,
            "seconds": round(seconds, 6),
        }  # fmt: skip
        with contextlib.suppress(OSError):
            print(json.dumps(line), file=sys.stderr, flush=True)


async def _watch(receive: Receive, gone: asyncio.Event, task: asyncio.Task[Any]) -> None:
    """Cancel the request's task when the client hangs up before the answer."""
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()
    task.cancel()
