"""A lean client for OpenAI-compatible chat endpoints, on aiohttp.

One connection pool per event loop serves every member; no client is made per request, nothing is retried
here, and the keys are looked up when they are sent.
"""

from __future__ import annotations

import asyncio
import json
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from guerdon.errors import PoolError
from guerdon.routing.member import BackendError, Outcome, RawReply
from guerdon.routing.retry import parse_retry_after
from guerdon.routing.secrets import Secret, scrub
from guerdon.types import Message

__all__ = ["HttpBackend", "shared_session"]

_LIMIT = 16 * 2**20
_sessions: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, aiohttp.ClientSession] = weakref.WeakKeyDictionary()
_users: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, int] = weakref.WeakKeyDictionary()

dumps: Callable[[Any], bytes]
loads: Callable[[bytes | str], Any]
try:
    import orjson

    dumps, loads = orjson.dumps, orjson.loads
except ImportError:
    loads = json.loads

    def dumps(value: Any) -> bytes:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def shared_session() -> aiohttp.ClientSession:
    """The running loop's one session, made on first use."""
    loop = asyncio.get_running_loop()
    session = _sessions.get(loop)
    if session is None or session.closed:
        # Concurrency is limited per member by the pool, not per process here.
        connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=300, keepalive_timeout=60)
        session = aiohttp.ClientSession(connector=connector, auto_decompress=True, trust_env=False)
        _sessions[loop] = session
    return session


async def close_shared_session() -> None:
    """Close the running loop's session, if there is one."""
    session = _sessions.pop(asyncio.get_running_loop(), None)
    if session is not None and not session.closed:
        await session.close()


class HttpBackend:
    """One model behind ``POST {base_url}/chat/completions``.

    Args:
        base_url: up to and including the version, for example ``http://127.0.0.1:8000/v1``.
        model: name that the endpoint knows.
        api_key: where its key is found; ``None`` sends none.
        headers: sent with every request.
        extra_body: merged into every request's JSON.

    Raises:
        PoolError: the URL is none.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: Secret | None = None,
        headers: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise PoolError(f"base_url {base_url!r} is not an http(s) address")
        if not model:
            raise PoolError(f"the endpoint {base_url} needs a model name")
        self.url = f"{base_url.rstrip('/')}/chat/completions"
        self.model: str | None = model
        self.identity = f"{self.url}#{model}"
        self._key = api_key
        self._headers = dict(headers or {})
        self._extra = dict(extra_body or {})

    def _request(self, messages: Sequence[Message], max_tokens: int, temperature: float, top_p: float, seed: int | None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(m) for m in messages],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
        }
        if seed is not None:
            body["seed"] = seed
        return body | self._extra

    def _sent_headers(self) -> dict[str, str]:
        headers = {"content-type": "application/json", "accept": "application/json", **self._headers}
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key.reveal()}"
        return headers

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
        try:
            async with asyncio.timeout(timeout):
                async with shared_session().post(
                    self.url, data=body, headers=self._sent_headers(), timeout=_NO_TIMEOUT, allow_redirects=False
                ) as response:
                    raw = await self._body(response)
                    self._check_status(response, raw)
                    return self._parse(response, raw)
        except TimeoutError:
            raise BackendError(Outcome.TIMEOUT, f"no reply within {timeout:g} s") from None
        except aiohttp.ClientPayloadError as error:
            raise BackendError(Outcome.BAD_REPLY, f"the reply broke off: {self._clean(error)}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise BackendError(Outcome.CONNECTION, f"cannot reach {urlsplit(self.url).netloc}: {self._clean(error)}") from None

    async def stream(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        timeout: float,
    ) -> AsyncIterator[str | RawReply]:
        """One streamed request; ``timeout`` bounds the wait for each piece."""
        request = self._request(messages, max_tokens, temperature, top_p, seed)
        body = dumps(request | {"stream": True, "stream_options": {"include_usage": True}})
        model: str | None = None
        finish: str | None = None
        usage: Mapping[str, Any] = {}
        text: list[str] = []
        try:
            limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
            async with shared_session().post(
                self.url, data=body, headers=self._sent_headers(), timeout=limits, allow_redirects=False
            ) as response:
                if response.status >= 300:
                    self._check_status(response, await self._body(response))
                if "text/event-stream" not in response.headers.get("content-type", ""):
                    whole = self._parse(response, await self._body(response))
                    if whole.text:
                        yield whole.text
                    yield whole
                    return
                done = False
                async for line in response.content:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        done = True
                        break
                    event = self._json(data)
                    if event.get("error"):
                        raise BackendError(Outcome.SERVER_ERROR, f"error in the stream: {self._clean(event['error'])}")
                    model = event.get("model") or model
                    usage = event.get("usage") or usage
                    for choice in event.get("choices") or ():
                        finish = choice.get("finish_reason") or finish
                        piece = (choice.get("delta") or {}).get("content")
                        if piece:
                            text.append(piece)
                            yield piece
                if not done and finish is None:
                    raise BackendError(Outcome.BAD_REPLY, "the stream broke off")
        except TimeoutError:
            raise BackendError(Outcome.TIMEOUT, f"nothing came for {timeout:g} s") from None
        except aiohttp.ClientPayloadError as error:
            raise BackendError(Outcome.BAD_REPLY, f"the stream broke off: {self._clean(error)}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise BackendError(Outcome.CONNECTION, f"cannot reach {urlsplit(self.url).netloc}: {self._clean(error)}") from None
        yield RawReply("".join(text) or None, _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"), model, finish)

    async def aclose(self) -> None:
        """The session is shared; the pool closes it."""

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        raw = await response.content.read(_LIMIT + 1) if response.content_length is None else await response.read()
        if response.content_length is None:
            while not response.content.at_eof() and len(raw) <= _LIMIT:
                raw += await response.content.read(_LIMIT + 1 - len(raw))
        if len(raw) > _LIMIT:
            raise BackendError(Outcome.BAD_REPLY, f"the reply is larger than {_LIMIT} bytes")
        return raw

    def _check_status(self, response: aiohttp.ClientResponse, raw: bytes) -> None:
        status = response.status
        if status < 300:
            return
        wait = parse_retry_after(response.headers.get("retry-after"))
        said = self._clean(_error_message(raw))
        message = f"HTTP {status}{f': {said}' if said else ''}"
        if status == 429:
            raise BackendError(Outcome.RATE_LIMITED, message, retry_after=wait)
        if status == 408 or status == 504:
            raise BackendError(Outcome.TIMEOUT, message, retry_after=wait)
        if status >= 500:
            raise BackendError(Outcome.SERVER_ERROR, message, retry_after=wait)
        raise BackendError(Outcome.CLIENT_ERROR, message)

    def _parse(self, response: aiohttp.ClientResponse, raw: bytes) -> RawReply:
        value = self._json(raw)
        if value.get("error"):
            raise BackendError(Outcome.SERVER_ERROR, f"error with status {response.status}: {self._clean(value['error'])}")
        usage = value.get("usage") or {}
        billed = RawReply(None, _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"), _name(value.get("model")))
        choices = value.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise BackendError(Outcome.BAD_REPLY, "the reply has no choice", billed=billed)
        message = choices[0].get("message")
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            content = "".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
        if content is not None and not isinstance(content, str):
            raise BackendError(Outcome.BAD_REPLY, f"the reply's content is {type(content).__name__}, not text", billed=billed)
        return RawReply(content, billed.input_tokens, billed.output_tokens, billed.model, choices[0].get("finish_reason"))

    def _json(self, raw: bytes) -> dict[str, Any]:
        try:
            value = loads(raw)
        except (ValueError, RecursionError):
            start = raw[:60].decode("utf-8", "replace").strip()
            kind = "an HTML page" if start[:1] == "<" else "something that is not JSON"
            raise BackendError(Outcome.BAD_REPLY, f"the endpoint sent {kind}") from None
        if not isinstance(value, dict):
            raise BackendError(Outcome.BAD_REPLY, f"the endpoint sent a JSON {type(value).__name__}, not an object")
        return value

    def _clean(self, value: Any) -> str:
        if isinstance(value, dict):
            value = value.get("message") or value
        keys = []
        if self._key is not None:
            try:
                keys = [self._key.reveal()]
            except PoolError:
                keys = []
        # An endpoint may echo any header that it was sent.
        keys += [v for v in self._headers.values() if len(v) >= 8]
        return scrub(" ".join(str(value).split()), keys)[:300]


_NO_TIMEOUT = aiohttp.ClientTimeout(total=None)


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
        error = value.get("error", value.get("detail", ""))
        return str(error.get("message", "")) if isinstance(error, dict) else str(error)
    return ""
