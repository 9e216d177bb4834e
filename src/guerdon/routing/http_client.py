"""A lean client for OpenAI-compatible chat endpoints, on aiohttp.

One connection pool per event loop serves every member; no client is made per request, nothing is retried
here, and keys are looked up when they are sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from guerdon.errors import PoolError
from guerdon.routing.member import BackendError, Outcome, PoolConfigError, RawReply
from guerdon.routing.retry import parse_retry_after
from guerdon.routing.secrets import Secret, expand, scrub, variables
from guerdon.types import Message

__all__ = ["HttpBackend", "session_of"]

_LIMIT = 16 * 2**20
_CONNECT_S = 10.0

loads: Callable[[bytes], Any]
_fast_dumps: Callable[[Any], bytes] | None
try:
    import orjson

    _fast_dumps, loads = orjson.dumps, orjson.loads
except ImportError:
    _fast_dumps, loads = None, json.loads


def dumps(value: Any) -> bytes:
    """JSON as bytes."""
    if _fast_dumps is not None:
        # orjson refuses half of a surrogate pair, which a tokenizer can produce.
        with contextlib.suppress(TypeError):
            return _fast_dumps(value)
    return json.dumps(value).encode()


class _Connections:
    """The session of one event loop, and who uses it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.users: set[int] = set()
        # Concurrency is limited per member by the pool, not per process here. Cookies of one endpoint are
        # no business of another.
        connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=300, keepalive_timeout=30)
        self.session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())


_connections: list[_Connections] = []


def _connections_of(loop: asyncio.AbstractEventLoop) -> _Connections:
    for found in _connections:
        if found.loop is loop and not found.session.closed:
            return found
    # A list, and swept here: a session holds its loop alive, so a weak mapping would never let go.
    _connections[:] = [c for c in _connections if not c.loop.is_closed() and not c.session.closed]
    made = _Connections(loop)
    _connections.append(made)
    return made


def session_of(user: object) -> aiohttp.ClientSession:
    """The running loop's one session, made on first use and closed when its last user lets go of it."""
    shared = _connections_of(asyncio.get_running_loop())
    if id(user) not in shared.users:
        shared.users.add(id(user))
        weakref.finalize(user, shared.users.discard, id(user))
    return shared.session


async def _let_go(user: object) -> None:
    loop = asyncio.get_running_loop()
    for shared in [c for c in _connections if c.loop is loop]:
        shared.users.discard(id(user))
        if not shared.users:
            _connections.remove(shared)
            await shared.session.close()


class HttpBackend:
    """One model behind ``POST {base_url}/chat/completions``.

    Args:
        base_url: up to and including the version, for example ``http://127.0.0.1:8000/v1``; a query string
            is kept.
        model: name that the endpoint knows.
        api_key: where its key is found; ``None`` sends none.
        headers: sent with every request; ``${NAME}`` in a value stands for an environment variable.
        extra_body: merged into every request's JSON; a value of ``None`` leaves a field out.
        max_tokens_field: how the endpoint calls the limit on a reply's tokens.

    Raises:
        PoolConfigError: the URL is none or holds a password, or no model is named.
    """

    bills_failures = True

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: Secret | None = None,
        headers: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        max_tokens_field: str = "max_tokens",
    ) -> None:
        try:
            parts = urlsplit(base_url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            valid = False
        if not valid:
            raise PoolConfigError(f"base_url {base_url!r} is not an http(s) address such as http://127.0.0.1:8000/v1")
        if parts.username is not None or parts.password is not None:
            raise PoolConfigError("base_url holds a user name or password; name a variable in api_key_env instead")
        if not model:
            raise PoolConfigError(f"the endpoint {base_url} needs a model name")
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        self.url = URL(parts._replace(path=f"{path}/chat/completions").geturl(), encoded=True)
        self.host = parts.netloc
        self.model: str | None = model
        self._key = api_key
        self._headers = {"content-type": "application/json", "accept": "application/json", **(headers or {})}
        self._templates = [k for k, v in self._headers.items() if variables(v)]
        self._extra = dict(extra_body or {})
        self._limit_field = max_tokens_field
        tail = f"#{json.dumps(self._extra, sort_keys=True)}" if self._extra else ""
        self.identity: str | None = f"{self.url}#{model}{tail}"

    def __repr__(self) -> str:
        return f"HttpBackend({self.url}, model={self.model!r})"

    def check(self) -> None:
        """Look up every key.

        Raises:
            PoolError: an environment variable is not set, named.
        """
        self._sent_headers()

    async def aclose(self) -> None:
        """Let go of the shared connections; the last one to do so closes them."""
        await _let_go(self)

    def _request(
        self, messages: Sequence[Message], max_tokens: int, temperature: float, top_p: float, seed: int | None
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(m) for m in messages],
            self._limit_field: max_tokens,
            "temperature": temperature,
            "top_p": top_p,
        }
        if seed is not None:
            body["seed"] = seed
        if not self._extra:
            return body
        return {k: v for k, v in (body | self._extra).items() if v is not None}

    def _sent_headers(self) -> dict[str, str]:
        if self._key is None and not self._templates:
            return self._headers
        headers = dict(self._headers)
        for name in self._templates:
            headers[name] = expand(headers[name])
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key.reveal()}"
        return headers

    def _secrets(self) -> list[str]:
        found = []
        named = [Secret(v) for t in self._templates for v in variables(self._headers[t])]
        for secret in [*([self._key] if self._key else []), *named]:
            # One that is gone by now was not sent either.
            with contextlib.suppress(PoolError):
                found.append(secret.reveal())
        return found

    def _clean(self, value: Any) -> str:
        """One short line of what an endpoint said; it may echo the headers that it was sent."""
        given = [v for k, v in self._headers.items() if k not in ("content-type", "accept") and len(v) >= 8]
        return scrub(" ".join(str(value).split()), self._secrets() + given)[:300]

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        timeout: float,
    ) -> RawReply:
        """One request; see :class:`guerdon.routing.member.Backend`."""
        body = dumps(self._request(messages, max_tokens, temperature, top_p, seed))
        headers = self._sent_headers()
        try:
            async with (
                asyncio.timeout(timeout),
                session_of(self).post(
                    self.url, data=body, headers=headers, timeout=_connecting(timeout), allow_redirects=False
                ) as response,
            ):
                raw = await _body(response)
                self._check_status(response, raw)
                return self._parse(response, raw)
        except aiohttp.ClientConnectionError as error:
            raise self._unreachable(error, timeout) from None
        except TimeoutError:
            raise _given_up(timeout) from None
        except aiohttp.ClientPayloadError as error:
            raise BackendError(Outcome.BAD_REPLY, f"the reply broke off: {self._clean(error)}") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise self._unreachable(error, timeout) from None

    async def stream(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        timeout: float,
    ) -> AsyncGenerator[str | RawReply, None]:
        """One streamed request; ``timeout`` bounds the wait for each piece."""
        request = self._request(messages, max_tokens, temperature, top_p, seed)
        body = dumps(request | {"stream": True, "stream_options": {"include_usage": True}})
        headers = self._sent_headers()
        events = _Events(self)
        try:
            limits = _connecting(timeout, sock_read=timeout)
            async with session_of(self).post(
                self.url, data=body, headers=headers, timeout=limits, allow_redirects=False
            ) as response:
                if response.status >= 300 or response.content_type != "text/event-stream":
                    raw = await _body(response)
                    self._check_status(response, raw)
                    whole = self._parse(response, raw)
                    if whole.text:
                        yield whole.text
                    yield whole
                    return
                async for chunk in response.content.iter_any():
                    for piece in events.feed(chunk):
                        yield piece
                    if events.done:
                        break
                if events.done:
                    # Read to the end, which is usually there, so that the connection can be used again.
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(0.2):
                            await response.content.read(1)
        except (aiohttp.SocketTimeoutError, TimeoutError) as error:
            if isinstance(error, aiohttp.ConnectionTimeoutError):
                raise self._unreachable(error, timeout) from None
            raise _given_up(timeout) from None
        except aiohttp.ClientPayloadError as error:
            raise BackendError(Outcome.BAD_REPLY, f"the stream broke off: {self._clean(error)}") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise self._unreachable(error, timeout) from None
        if not events.done and events.finish is None:
            raise BackendError(Outcome.BAD_REPLY, "the stream broke off")
        yield events.reply()

    def _unreachable(self, error: Exception, timeout: float) -> BackendError:
        if isinstance(error, aiohttp.SocketTimeoutError):
            return _given_up(timeout)
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return BackendError(
                Outcome.CONNECTION,
                f"cannot reach {self.host}: no connection within {min(0.9 * timeout, _CONNECT_S):g} s",
            )
        return BackendError(
            Outcome.CONNECTION, f"cannot reach {self.host}: {self._clean(error) or type(error).__name__}"
        )

    def _check_status(self, response: aiohttp.ClientResponse, raw: bytes) -> None:
        status = response.status
        if 200 <= status < 300:
            return
        said = self._clean(_error_message(raw))
        message = f"HTTP {status}{f': {said}' if said else ''}"
        raise BackendError(
            _outcome_of(status), message, retry_after=parse_retry_after(response.headers.get("retry-after"))
        )

    def _parse(self, response: aiohttp.ClientResponse, raw: bytes) -> RawReply:
        value = self._json(raw)
        self._check_error(value)
        usage = value.get("usage")
        model = _name(value.get("model"))
        given, made = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
        # Without a text and without a count there is nothing to estimate from.
        billed = None if made is None else RawReply(None, given, made, model)

        def bad(why: str) -> BackendError:
            return BackendError(Outcome.BAD_REPLY, why, billed=billed)

        kind = response.headers.get("content-type", "")
        if kind and "json" not in kind.lower():
            raise bad(f"the endpoint answered with content type {kind[:80]!r}, not application/json")
        choices = value.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise bad("the reply has no choice")
        message = choices[0].get("message")
        if not isinstance(message, dict):
            raise bad("the reply's choice has no message")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(str(p.get("text") or "") for p in content if isinstance(p, dict))
        if content is not None and not isinstance(content, str):
            raise bad(f"the reply's content is {type(content).__name__}, not text")
        text = self._without_keys(content) if content else content
        return RawReply(text, given, made, model, _name(choices[0].get("finish_reason")))

    def _without_keys(self, text: str) -> str:
        for secret in self._secrets() if self._key is not None or self._templates else ():
            text = text.replace(secret, "***")
        return text

    def _check_error(self, value: Mapping[str, Any]) -> None:
        error = value.get("error")
        if not error:
            return
        code = error.get("code") if isinstance(error, dict) else None
        outcome = _outcome_of(code) if isinstance(code, int) and code >= 400 else Outcome.SERVER_ERROR
        message = error.get("message") if isinstance(error, dict) else error
        raise BackendError(outcome, f"the endpoint reports an error: {self._clean(message or error)}")

    def _json(self, raw: bytes) -> dict[str, Any]:
        try:
            value = loads(raw)
        except (ValueError, RecursionError):
            start = raw[:60].decode("utf-8", "replace").strip()
            kind = "an HTML page" if start[:1] == "<" else "something that is not JSON" if start else "an empty body"
            raise BackendError(Outcome.BAD_REPLY, f"the endpoint sent {kind}") from None
        if not isinstance(value, dict):
            raise BackendError(Outcome.BAD_REPLY, f"the endpoint sent a JSON {type(value).__name__}, not an object")
        return value


class _Events:
    """Reads server-sent events as they come in, whatever the boundaries of the chunks."""

    def __init__(self, backend: HttpBackend) -> None:
        self._backend = backend
        self._rest = b""
        self._text: list[str] = []
        self._usage: Any = None
        self.model: str | None = None
        self.finish: str | None = None
        self.done = False

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The new pieces of text, each as soon as it is read: what follows it may be an error."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > _LIMIT:
            raise BackendError(Outcome.BAD_REPLY, f"an event of the stream is larger than {_LIMIT} bytes")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                self.done = True
                return
            if data:
                yield from self._event(self._backend._json(data))

    def _event(self, event: dict[str, Any]) -> Iterator[str]:
        self._backend._check_error(event)
        self.model = _name(event.get("model")) or self.model
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices") or ():
            if not isinstance(choice, dict):
                raise BackendError(Outcome.BAD_REPLY, "an event of the stream has a choice that is no object")
            self.finish = _name(choice.get("finish_reason")) or self.finish
            delta = choice.get("delta")
            piece = delta.get("content") if isinstance(delta, dict) else None
            if isinstance(piece, str) and piece:
                piece = self._backend._without_keys(piece)
                self._text.append(piece)
                yield piece

    def reply(self) -> RawReply:
        """What came, with the usage of the last event."""
        usage = self._usage
        given, made = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
        text = self._backend._without_keys("".join(self._text))
        return RawReply(text or None, given, made, self.model, self.finish)


async def _body(response: aiohttp.ClientResponse) -> bytes:
    chunks, size = [], 0
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        size += len(chunk)
        if size > _LIMIT:
            raise BackendError(Outcome.BAD_REPLY, f"the reply is larger than {_LIMIT} bytes")
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _connecting(timeout: float, sock_read: float | None = None) -> aiohttp.ClientTimeout:
    # Less than the whole, so that "never connected" (free) and "never answered" (paid) can be told apart.
    return aiohttp.ClientTimeout(total=None, sock_connect=min(0.9 * timeout, _CONNECT_S), sock_read=sock_read)


def _given_up(timeout: float) -> BackendError:
    # The endpoint has the question and goes on working on it: the input is paid, and counted by us.
    return BackendError(Outcome.TIMEOUT, f"no reply within {timeout:g} s", billed=RawReply(None))


def _outcome_of(status: int) -> Outcome:
    if status == 429:
        return Outcome.RATE_LIMITED
    if status in (408, 504):
        return Outcome.TIMEOUT
    return Outcome.SERVER_ERROR if status >= 500 else Outcome.CLIENT_ERROR


def _count(usage: Any, key: str) -> int | None:
    value = usage.get(key) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _error_message(raw: bytes) -> str:
    try:
        value = loads(raw)
    except (ValueError, RecursionError):
        return "" if raw.lstrip()[:1] == b"<" else raw[:200].decode("utf-8", "replace")
    if isinstance(value, dict):
        error = value.get("error", value.get("detail", value.get("message", "")))
        return str(error.get("message", "")) if isinstance(error, dict) else str(error)
    return ""
