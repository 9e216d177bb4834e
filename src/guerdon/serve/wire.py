"""Bytes on the wire: JSON (orjson when installed), OpenAI's response and chunk objects, server-sent events."""

from __future__ import annotations

import json
from typing import Any

try:
    import orjson
except ImportError:  # the standard library is slower, and enough
    orjson = None  # type: ignore[assignment]

__all__ = ["DONE", "HEARTBEAT", "Chunks", "completion", "dumps", "event", "loads", "usage"]

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": still working\n\n"


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def loads(body: bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: the bytes are not UTF-8 JSON (NaN, infinities and lone surrogates included).
    """
    if orjson is not None:
        return orjson.loads(body)
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse)
        # Lone surrogates parse here but can be sent nowhere.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def dumps(value: Any) -> bytes:
    """Serialise to compact UTF-8 JSON."""
    if orjson is not None:
        return orjson.dumps(value)
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def usage(input_tokens: int, output_tokens: int) -> dict[str, int]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": input_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": input_tokens + output_tokens,
    }


def completion(
    *,
    id: str,
    created: int,
    model: str,
    text: str,
    finish_reason: str,
    input_tokens: int,
    output_tokens: int,
    extension: dict[str, Any],
) -> bytes:
    """The body of a plain chat completion."""
    return dumps(
        {
            "id": id,
            "object": "chat.completion",
            "created": created,
            "model": model,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text, "refusal": None},
                    "logprobs": None,
                    "finish_reason": finish_reason,
                }
            ],
            "usage": usage(input_tokens, output_tokens),
            "system_fingerprint": None,
            "guerdon": extension,
        }
    )


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(value) + b"\n\n"


class Chunks:
    """The events of one streamed chat completion.

    What all chunks share is serialised once.

    Args:
        id: of the completion.
        created: seconds since the epoch.
        model: as the client knows it.
        include_usage: give every chunk a ``usage`` field, null until the last.
    """

    def __init__(self, id: str, created: int, model: str, include_usage: bool) -> None:
        shared: dict[str, Any] = {
            "id": id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
            "system_fingerprint": None,
        }
        if include_usage:
            shared["usage"] = None
        self._shared = shared
        self._head = b"data: " + dumps(shared)[:-1] + b',"choices":[{"index":0,"delta":'
        self._tail = b',"logprobs":null,"finish_reason":null}]}\n\n'

    def role(self) -> bytes:
        """The first event: who speaks."""
        return self._head + b'{"role":"assistant","content":"","refusal":null}' + self._tail

    def text(self, piece: str) -> bytes:
        """A piece of the answer."""
        return self._head + b'{"content":' + dumps(piece) + b"}" + self._tail

    def finish(self, reason: str, extension: dict[str, Any]) -> bytes:
        """The end of the answer, with the route trace."""
        choice = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": reason}
        return event({**self._shared, "choices": [choice], "guerdon": extension})

    def usage(self, input_tokens: int, output_tokens: int) -> bytes:
        """The usage chunk: no choices."""
        return event({**self._shared, "choices": [], "usage": usage(input_tokens, output_tokens)})
