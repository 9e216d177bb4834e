"""One routed trajectory as one line of JSON: who was asked what, what came back, what it cost, and why.

The trace on the screen, the report, the server's extension field and replay all read this record.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from guerdon.errors import DataError
from guerdon.rewards import ExactMatch, Reward, TokenF1
from guerdon.routing.lines import LineWriter, read_lines
from guerdon.types import Trajectory, Turn, policy_text

__all__ = ["SCHEMA", "RouteRecord", "RouteStep", "append_records", "read_records", "record_of", "trace_lines"]

SCHEMA = "guerdon.route/1"
"""Name and version of the format. A newer minor version (``/1.2``) only adds fields; readers keep those."""

log = logging.getLogger("guerdon.record")


class RouteStep(BaseModel):
    """One route action.

    Attributes:
        round: which policy turn asked, from 0.
        thought: the policy's last thought before it.
        asked: the name as the policy wrote it.
        member: who was asked; another spelling of ``asked``, or the same where nobody has that name.
        answered_by: whose reply it is; another member after a fallback.
        model: what the endpoint said it was; ``model_mismatch`` where that is not what was asked for.
        query: what was asked.
        reply: what came back; ``None`` on failure.
        shown: what the policy saw of it.
        input_tokens, output_tokens: billed tokens; ``usage_estimated`` where the endpoint did not count them.
        usd: what was paid.
        input_price, output_price, price_date: USD per million tokens, and as of when.
        latency_s, attempts, cached, outcome, error: as in :class:`~guerdon.routing.member.Reply`.
        propensity: probability with which the policy wrote the member's name: the product over the tokens that
            overlap it. ``None`` where its tokens or their log-probabilities are unknown.
    """

    model_config = ConfigDict(extra="allow")

    round: int
    thought: str = ""
    asked: str = ""
    member: str
    answered_by: str
    model: str | None = None
    model_mismatch: bool = False
    query: str
    reply: str | None
    shown: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    usage_estimated: bool = False
    usd: float = 0.0
    input_price: float = 0.0
    output_price: float = 0.0
    price_date: str | None = None
    latency_s: float = 0.0
    attempts: int = 0
    outcome: str = "ok"
    error: str | None = None
    cached: bool = False
    propensity: float | None = None


class RouteRecord(BaseModel):
    """One trajectory. Unknown fields of a newer minor version are kept.

    Attributes:
        schema_: ``schema`` in the file; see :data:`SCHEMA`.
        task_id, question, golds: the task; ``golds`` is ``None`` where none are known.
        pool: fingerprint of the pool; see :meth:`guerdon.routing.pool.Pool.fingerprint`.
        version: the user's own name for this state of pool and prompts.
        parameters: how members were asked (token limit, temperature, wrapper prompt, ...).
        members: descriptor and prices of each member, as the policy saw them.
        steps: route actions in order.
        answer, em, f1: the final answer and its scores against ``golds``.
        stop, error: why it ended.
        calls, usd, raw_cost, pool_input_tokens, pool_output_tokens: totals over the pool.
        policy_input_tokens, policy_output_tokens, policy_seconds: the router's own use.
        transcript: text of all turns.
    """

    model_config = ConfigDict(extra="allow")

    schema_: str = Field(default=SCHEMA, validation_alias=AliasChoices("schema", "schema_"))
    task_id: str
    question: str
    golds: list[str] | None = None
    pool: str | None = None
    version: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    members: dict[str, dict[str, Any]] = Field(default_factory=dict)
    steps: list[RouteStep] = Field(default_factory=list)
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

    @model_serializer(mode="wrap")
    def _named(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        out = handler(self)
        return {"schema": out.pop("schema_"), **out}


def record_of(
    trajectory: Trajectory,
    *,
    transcript: bool = True,
    pool: str | None = None,
    version: str = "",
    parameters: Mapping[str, Any] | None = None,
) -> RouteRecord:
    """The record of a trajectory that a routing environment (or a baseline) made.

    Args:
        trajectory: with ``info`` as :class:`~guerdon.routing.env.RoutingEpisode` reports it.
        transcript: keep the text of all turns.
        pool, version, parameters: see :class:`RouteRecord`.
    """
    info = trajectory.info
    turns = [t for t in trajectory.turns if t.speaker == "policy"]
    steps = []
    for call in info.get("calls", ()):
        reply = call.reply
        steps.append(
            RouteStep(
                round=call.round,
                thought=call.thought,
                asked=call.asked,
                member=reply.member,
                answered_by=reply.answered_by,
                model=reply.model,
                model_mismatch=reply.model_mismatch,
                query=call.query,
                reply=reply.text,
                shown=call.shown.strip(),
                input_tokens=reply.input_tokens,
                output_tokens=reply.output_tokens,
                usage_estimated=reply.usage_estimated,
                usd=reply.usd,
                input_price=reply.input_price,
                output_price=reply.output_price,
                price_date=reply.price_date,
                latency_s=reply.latency_s,
                attempts=reply.attempts,
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
        pool=pool,
        version=version,
        parameters=dict(parameters or {}),
        members={
            m.name: {"descriptor": m.descriptor, "input_price": m.input_price, "output_price": m.output_price}
            for m in info.get("roster", ())
        },
        steps=steps,
        last_thought=_last_thought(policy_text(trajectory)),
        answer=info.get("answer"),
        em=_score(ExactMatch(), trajectory) if known else None,
        f1=_score(TokenF1(), trajectory) if known else None,
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


def _score(reward: Reward, trajectory: Trajectory) -> float:
    answer = trajectory.info.get("answer")
    if answer is not None and "<answer>" not in policy_text(trajectory):
        # A baseline writes no tags.
        return reward.text(completion=f"<answer>{answer}</answer>", reference=trajectory.task.reference).value
    return reward([trajectory])[0].value


def _last_thought(text: str) -> str:
    start = text.rfind("<think>")
    return "" if start < 0 else text[start + 7 :].partition("</think>")[0].strip()


def _propensity(turn: Turn, name: str) -> float | None:
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


def append_records(path: str | os.PathLike[str], records: Iterable[RouteRecord]) -> None:
    """Append records, each as one line in one write.

    Raises:
        DataError: not all could be written, for example because no space is left; those before are whole.
    """
    try:
        writer = LineWriter(path)
        try:
            for record in records:
                writer.write(record.model_dump_json().encode() + b"\n")
        finally:
            writer.close()
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error


_FORMAT = re.compile(r"guerdon\.route/1(\.\d+)?")


def read_records(path: str | os.PathLike[str]) -> Iterator[RouteRecord]:
    """Read records back; lines that a crash tore off are left out, and counted in a warning.

    Raises:
        DataError: the file is absent, holds another schema, or a whole line is no record; the line is named.
    """
    torn = []
    for number, raw in read_lines(path):
        if raw is None:
            torn.append(number)
            continue
        schema = raw.get("schema")
        if not isinstance(schema, str) or _FORMAT.fullmatch(schema) is None:
            raise DataError(f"{path}, line {number}: schema {schema!r} cannot be read; this version reads {SCHEMA}")
        try:
            yield RouteRecord(**raw)
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(f"{path}, line {number}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if torn:
        log.warning("%s: %d torn lines left out, the first is line %d", path, len(torn), torn[0])


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
        out.append(
            f"reply     {said}{by}  ({step.output_tokens} tokens, ${step.usd:.8f}, {step.latency_s * 1000:.0f} ms)"
        )
    if record.last_thought:
        out.append(f"think     {record.last_thought}")
    out.append(f"answer    {record.answer if record.answer is not None else f'none ({record.stop})'}")
    own = f"{record.policy_output_tokens} tokens of the router itself"
    out.append(f"cost      ${record.usd:.8f} for {record.calls} calls; {own}")
    return out
