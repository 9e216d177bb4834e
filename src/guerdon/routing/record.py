"""One routed trajectory as one line of JSON: who was asked what, what came back, what it cost, and why.

The trace on the screen, the report, the server's extension field and replay all read this record.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from guerdon.errors import DataError
from guerdon.rewards import ExactMatch, TokenF1
from guerdon.types import Trajectory, policy_text

__all__ = ["SCHEMA", "RouteRecord", "RouteStep", "append_records", "read_records", "record_of", "trace_lines"]

SCHEMA = "guerdon.route/1"


class RouteStep(BaseModel):
    """One route action.

    ``propensity`` is the probability with which the policy wrote the member's name, ``None`` where its tokens
    are unknown. ``usd`` is what was paid, ``input_price`` and ``output_price`` are USD per million tokens.
    """

    model_config = ConfigDict(extra="allow")

    round: int
    thought: str = ""
    member: str
    answered_by: str
    model: str | None = None
    query: str
    reply: str | None
    shown: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0
    input_price: float = 0.0
    output_price: float = 0.0
    price_date: str | None = None
    latency_s: float = 0.0
    outcome: str = "ok"
    error: str | None = None
    cached: bool = False
    propensity: float | None = None


class RouteRecord(BaseModel):
    """One trajectory. Unknown fields of a newer minor version are kept."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    format: str = SCHEMA
    task_id: str
    question: str
    golds: list[str] | None = None
    members: dict[str, dict[str, Any]] = {}
    steps: list[RouteStep] = []
    last_thought: str = ""
    answer: str | None = None
    em: float | None = None
    f1: float | None = None
    stop: str
    error: str | None = None
    calls: int = 0
    usd: float = 0.0
    raw_cost: float = 0.0
    pool_input_tokens: int = 0
    pool_output_tokens: int = 0
    policy_input_tokens: int = 0
    policy_output_tokens: int = 0
    policy_seconds: float = 0.0
    transcript: str = ""


def record_of(trajectory: Trajectory, *, transcript: bool = True) -> RouteRecord:
    """The record of a trajectory that a routing environment (or a baseline) made."""
    info = trajectory.info
    turns = [t for t in trajectory.turns if t.speaker == "policy"]
    steps = []
    for call in info.get("calls", ()):
        reply = call.reply
        steps.append(
            RouteStep(
                round=call.round,
                thought=call.thought,
                member=reply.member,
                answered_by=reply.answered_by,
                model=reply.model,
                query=call.query,
                reply=reply.text,
                shown=call.shown.strip(),
                input_tokens=reply.input_tokens,
                output_tokens=reply.output_tokens,
                usd=reply.usd,
                input_price=reply.input_price,
                output_price=reply.output_price,
                price_date=reply.price_date,
                latency_s=reply.latency_s,
                outcome=reply.outcome.value,
                error=reply.error,
                cached=reply.cached,
                propensity=_propensity(turns[call.round], call.asked) if call.round < len(turns) else None,
            )
        )
    golds = trajectory.task.reference
    known = golds is not None and golds != []
    return RouteRecord(
        task_id=trajectory.task.id,
        question=trajectory.task.question,
        golds=[str(g) for g in ([golds] if isinstance(golds, str) else golds)] if known else None,
        members={
            m.name: {"descriptor": m.descriptor, "input_price": m.input_price, "output_price": m.output_price}
            for m in info.get("roster", ())
        },
        steps=steps,
        last_thought=_last_thought(policy_text(trajectory)),
        answer=info.get("answer"),
        em=ExactMatch()([trajectory])[0].value if known else None,
        f1=TokenF1()([trajectory])[0].value if known else None,
        stop=trajectory.stop.value,
        error=info.get("error"),
        calls=int(info.get("routes", 0)),
        usd=trajectory.usage.usd,
        raw_cost=float(info.get("raw_cost", 0.0)),
        pool_input_tokens=trajectory.usage.input_tokens,
        pool_output_tokens=trajectory.usage.output_tokens,
        policy_input_tokens=trajectory.policy_usage.input_tokens,
        policy_output_tokens=trajectory.policy_usage.output_tokens,
        policy_seconds=trajectory.policy_usage.seconds,
        transcript="".join(t.text for t in trajectory.turns) if transcript else "",
    )


def _last_thought(text: str) -> str:
    start = text.rfind("<think>")
    return "" if start < 0 else text[start + 7 :].partition("</think>")[0].strip()


def _propensity(turn: Any, name: str) -> float | None:
    """Probability of the tokens that overlap the name in its search block."""
    if turn.logprobs is None or turn.token_ends is None:
        return None
    start = turn.text.find(name, max(turn.text.find("<search>"), 0)) if name else -1
    if start < 0:
        return None
    total, begin = 0.0, 0
    for end, logprob in zip(turn.token_ends, turn.logprobs, strict=True):
        if end > start and begin < start + len(name):
            total += logprob
        begin = end
    return math.exp(total)


def append_records(path: str | os.PathLike[str], records: list[RouteRecord]) -> None:
    """Append records, one line each, in one write."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(r.model_dump_json() + "\n" for r in records)
    with target.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()


def read_records(path: str | os.PathLike[str]) -> Iterator[RouteRecord]:
    """Read records back; a torn last line (a crash while writing) is left out.

    Raises:
        DataError: another schema, or a whole line that is no record; the line is named.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
        schema = raw.get("format", "") if isinstance(raw, dict) else ""
        if str(schema).partition(".")[0] + "." != "guerdon." or str(schema).split("/")[-1].split(".")[0] != "1":
            raise DataError(f"{path}, line {number}: schema {schema!r} is not {SCHEMA}")
        try:
            yield RouteRecord(**raw)
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(f"{path}, line {number}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def trace_lines(record: RouteRecord) -> list[str]:
    """The record for a person: thoughts, calls, replies and costs, a line each."""
    out = [f"question  {record.question}"]
    for step in record.steps:
        if step.thought:
            out.append(f"think     {step.thought}")
        chance = "" if step.propensity is None else f"  (p = {step.propensity:.2f})"
        out.append(f"ask       {step.member}: {step.query}{chance}")
        said = step.reply if step.outcome == "ok" else f"[{step.outcome}] {step.error or ''}"
        by = "" if step.answered_by == step.member else f" by {step.answered_by}"
        out.append(f"reply     {said}{by}  ({step.output_tokens} tokens, ${step.usd:.8f}, {step.latency_s * 1000:.0f} ms)")
    if record.last_thought:
        out.append(f"think     {record.last_thought}")
    out.append(f"answer    {record.answer if record.answer is not None else f'none ({record.stop})'}")
    out.append(f"cost      ${record.usd:.8f} for {record.calls} calls; {record.policy_output_tokens} tokens of the router itself")
    return out
