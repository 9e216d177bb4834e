"""What every ASGI application here does with a request: find its key, read its body within limits, answer it."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from guerdon.errors import ConfigError
from guerdon.serve.problems import Problem

__all__ = ["CLIENT_CLOSED", "JSON", "Headers", "Receive", "Scope", "Send", "bearer", "lifespan", "read_body", "respond"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")
CLIENT_CLOSED = 499
"""What access logs call a request whose client went away."""


async def lifespan(
    startup: Callable[[], Awaitable[None]], shutdown: Callable[[], Awaitable[None]], receive: Receive, send: Send
) -> None:
    """ASGI's lifespan protocol: a set-up that cannot be used is reported as a failed start."""
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            try:
                await startup()
            except ConfigError as error:
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
            await send({"type": "lifespan.startup.complete"})
        else:
            await shutdown()
            await send({"type": "lifespan.shutdown.complete"})
            return


def bearer(headers: Mapping[bytes, bytes], *, basic: bool = False) -> bytes:
    """The API key of a request.

    Args:
        headers: lower-case names to values.
        basic: take the password of basic authentication too, for clients that can only be given a URL
            (``http://key:gd-...@host/``).

    Raises:
        Problem: 401.
    """
    scheme, _, rest = headers.get(b"authorization", b"").partition(b" ")
    key = rest.strip() if scheme.lower() == b"bearer" else b""
    if basic and scheme.lower() == b"basic":
        try:
            key = base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            key = b""
    if not key:
        raise Problem(401, "missing_api_key", "no API key: send the header 'Authorization: Bearer <key>'")
    return key


async def read_body(
    headers: Mapping[bytes, bytes], receive: Receive, *, limit: int, seconds: float, advice: str
) -> bytes:
    """The whole body.

    Args:
        headers: lower-case names to values.
        receive: ASGI's.
        limit: most bytes.
        seconds: time for what does not come with the head.
        advice: what to do about a body that is too large.

    Raises:
        Problem: 413 over the limit, 408 out of time, 499 where the client went away.
    """
    too_large = Problem(413, "body_too_large", f"the body may have at most {limit} bytes; {advice}")
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length[:20]) > limit:
        raise too_large
    message = await _next(receive)
    body: bytes = message.get("body", b"")
    if len(body) > limit:
        raise too_large
    if not message.get("more_body"):
        return body
    pieces, size = [body], len(body)
    try:
        async with asyncio.timeout(seconds):
            while message.get("more_body"):
                message = await _next(receive)
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                if size > limit:
                    raise too_large
    except TimeoutError:
        raise Problem(408, "body_timeout", f"the body did not arrive within {seconds:g} s") from None
    return b"".join(pieces)


async def _next(receive: Receive) -> MutableMapping[str, Any]:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Problem(CLIENT_CLOSED, "client_closed", "the client went away")
    return message


async def respond(send: Send, status: int, body: bytes, headers: Headers) -> None:
    """A whole response."""
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
