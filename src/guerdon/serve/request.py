"""A chat request, read once from its JSON body and headers and checked field by field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from guerdon.serve.problems import Problem, bad_field
from guerdon.types import Message

__all__ = ["ChatRequest", "parse_chat", "question_of"]

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MAX_TOKENS = 10_000_000

# Fields that would change the answer and that a pool of plain text models cannot honour. They are
# refused unless they hold a value that changes nothing: dropping them in silence would be a lie.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
}


@dataclass(slots=True)
class ChatRequest:
    """What a client asked for.

    Attributes:
        model: name of what shall answer: a router or a member.
        messages: role and text, in order.
        max_tokens, temperature, top_p, seed: of the reply; ``None`` leaves them to the member.
        stop: the answer ends before the first of these.
        max_cost_usd: most that this request may cost, in USD.
        max_calls: most calls of pool members.
        deadline: point on the monotonic clock after which no answer is wanted.
    """

    model: str
    messages: list[Message]
    stream: bool = False
    include_usage: bool = False
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_cost_usd: float | None = None
    max_calls: int | None = None
    deadline: float | None = None


def question_of(messages: list[Message]) -> str:
    """Text of the last user message; of the last message where no user spoke."""
    for message in reversed(messages):
        if message["role"] == "user":
            return message["content"]
    return messages[-1]["content"]


def parse_chat(body: Any, headers: Mapping[bytes, bytes], now: float) -> ChatRequest:
    """Check a parsed JSON body.

    Args:
        body: what the JSON parser returned.
        headers: lower-case header names to values.
        now: the monotonic clock, from which a deadline counts.

    Raises:
        Problem: 400, naming the field.
    """
    if type(body) is not dict:
        raise Problem(400, "invalid_body", f"the body must be a JSON object, got {_kind(body)}")
    model = body.get("model")
    if type(model) is not str or not model:
        raise _missing(body, "model", "a string: the name of a router or a pool member; GET /v1/models lists them")
    out = ChatRequest(model, _messages(body))
    for name, neutral in _NEUTRAL.items():
        if name in body and not _is_neutral(body[name], neutral):
            raise bad_field(name, f"{name} is not supported here; leave it out", "unsupported_parameter")
    stream = body.get("stream")
    if stream is not None:
        out.stream = _boolean("stream", stream)
    options = body.get("stream_options")
    if options is not None:
        if not out.stream:
            raise bad_field("stream_options", "stream_options is only allowed with stream=true")
        if type(options) is not dict:
            raise bad_field("stream_options", f"stream_options must be an object, got {_kind(options)}")
        if options.get("include_usage") is not None:
            out.include_usage = _boolean("stream_options.include_usage", options["include_usage"])
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name) is not None:
            value = _integer(name, body[name], 1, _MAX_TOKENS)
            out.max_tokens = value if out.max_tokens is None else min(out.max_tokens, value)
    if body.get("temperature") is not None:
        out.temperature = _number("temperature", body["temperature"], 0, 2)
    if body.get("top_p") is not None:
        out.top_p = _number("top_p", body["top_p"], 0, 1)
        if out.top_p == 0:
            raise bad_field("top_p", "top_p must be above 0 and at most 1, got 0")
    if body.get("seed") is not None:
        out.seed = _integer("seed", body["seed"], -(2**63), 2**63 - 1)
    if body.get("stop") is not None:
        out.stop = _stop(body["stop"])
    _limits(out, body, headers, now)
    return out


def _messages(body: dict[str, Any]) -> list[Message]:
    raw = body.get("messages")
    if type(raw) is not list or not raw:
        raise _missing(body, "messages", "a non-empty list of {role, content} objects")
    out: list[Message] = []
    for i, message in enumerate(raw):
        if type(message) is not dict:
            raise bad_field(f"messages[{i}]", f"messages[{i}] must be an object, got {_kind(message)}")
        given = message.get("role")
        role = _ROLES.get(given) if type(given) is str else None
        if role is None:
            raise bad_field(f"messages[{i}].role", f"messages[{i}].role must be one of {', '.join(_ROLES)}")
        content = message.get("content")
        if type(content) is not str:
            content = _parts(i, content)
        out.append({"role": role, "content": content})
    return out


def _parts(i: int, content: Any) -> str:
    where = f"messages[{i}].content"
    if type(content) is not list or not content:
        raise bad_field(where, f"{where} must be a string or a non-empty list of text parts, got {_kind(content)}")
    texts = []
    for j, part in enumerate(content):
        if type(part) is not dict or part.get("type") != "text" or type(part.get("text")) is not str:
            raise bad_field(f"{where}[{j}]", f"{where}[{j}] must be a text part; the pool takes text only")
        texts.append(part["text"])
    return "\n".join(texts)


def _limits(out: ChatRequest, body: dict[str, Any], headers: Mapping[bytes, bytes], now: float) -> None:
    """Read the caps from body fields and headers; where both are given the tighter one counts."""
    if body.get("max_cost_usd") is not None:
        out.max_cost_usd = _number("max_cost_usd", body["max_cost_usd"], 0, math.inf)
    if body.get("max_calls") is not None:
        out.max_calls = _integer("max_calls", body["max_calls"], 0, 10**6)
    seconds = math.inf
    if body.get("timeout") is not None:
        seconds = _number("timeout", body["timeout"], 0, math.inf)
    if b"x-guerdon-max-cost-usd" in headers:
        cost = _header(headers, b"x-guerdon-max-cost-usd")
        out.max_cost_usd = cost if out.max_cost_usd is None else min(out.max_cost_usd, cost)
    if b"x-guerdon-max-calls" in headers:
        calls = int(_header(headers, b"x-guerdon-max-calls"))
        out.max_calls = calls if out.max_calls is None else min(out.max_calls, calls)
    if b"x-guerdon-deadline-ms" in headers:
        seconds = min(seconds, _header(headers, b"x-guerdon-deadline-ms") / 1000)
    if seconds < math.inf:
        out.deadline = now + seconds


def _header(headers: Mapping[bytes, bytes], name: bytes) -> float:
    text = headers[name].decode("latin-1")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise bad_field(name.decode(), f"header {name.decode()} must be a number >= 0, got {text[:40]!r}")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if type(value) is str else value
    if type(stops) is not list or len(stops) > 4 or not all(type(s) is str and s for s in stops):
        raise bad_field("stop", "stop must be a non-empty string or a list of at most 4 of them")
    return tuple(stops)


def _missing(body: dict[str, Any], name: str, wanted: str) -> Problem:
    if body.get(name) is None:
        return bad_field(name, f"{name} is missing; it must be {wanted}", "missing_required_parameter")
    return bad_field(name, f"{name} must be {wanted}, got {_kind(body[name])}")


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    # Equality alone would let True pass for 1 and False for 0.
    return any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral)


def _boolean(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise bad_field(name, f"{name} must be true or false, got {_kind(value)}")
    return value


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise bad_field(name, f"{name} must be an integer from {low} to {high}, got {_kind(value)}")
    return value


def _number(name: str, value: Any, low: float, high: float) -> float:
    # Integers may be too large for a float; comparing them is safe, converting them is not.
    if type(value) not in (int, float) or not low <= value <= min(high, 1e300):
        upper = f" and at most {high:g}" if high < math.inf else ""
        raise bad_field(name, f"{name} must be a number of at least {low:g}{upper}, got {_kind(value)}")
    return float(value)


def _kind(value: Any) -> str:
    """Describe a value without repeating what the client wrote, except for short numbers."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        text = repr(value)
        return text if len(text) <= 24 else "a number out of range"
    if isinstance(value, str):
        return "an empty string" if not value else "a string"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "an object"
