"""The two ways in which the reward server is asked, read and answered.

``POST /v1/score``: ``{"records": [...]}``, each record as ``guerdon score`` reads it. Every record has a row in the answer;
one without an honest score has ``"value": null`` and a reason.

``POST /get_reward``: what OpenRLHF sends to ``--reward.remote_url``: ``{"query": [...], "prompts": [...], "labels": [...]}``
for ``{"rewards": [...], "scores": [...], "extra_logs": {name: [...]}}`` (as of version 0.11.0:
``openrlhf/utils/agent.py``, ``openrlhf/cli/serve_rm.py``). It has no place for a missing reward, so one failure is an
error of the whole request; OpenRLHF then asks again, and at last goes on without a reward for the sample. Where it
shards over several servers some are asked for nothing, which is answered with nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from guerdon.errors import RewardError, nearest
from guerdon.rewards.conversation import after_prompt
from guerdon.serve.problems import Problem, bad_field

__all__ = ["openrlhf_answer", "openrlhf_records", "score_answer", "score_records"]

Record = dict[str, Any]


def score_records(body: Any, most: int) -> list[Record]:
    """Records of a ``/v1/score`` request.

    Raises:
        Problem: 400 that names the field, 413 for more than ``most`` records.
    """
    _object(body)
    for name in body:
        if name != "records":
            raise bad_field(name[:100], f"unknown field {name[:100]!r}{nearest(name[:100], ['records'])}")
    records = _list(
        body, "records", "a list of objects with completion, and reference, prompt and id where there are such"
    )
    _bounded(records, "records", most)
    for k, record in enumerate(records):
        if type(record) is not dict:
            raise bad_field(f"records[{k}]", f"records[{k}] must be an object")
    return records


def score_answer(rows: Sequence[Mapping[str, Any]], request_id: str) -> dict[str, Any]:
    """The body of a ``/v1/score`` answer."""
    valid = sum(bool(row["valid"]) for row in rows)
    return {"scores": list(rows), "valid": valid, "failed": len(rows) - valid, "request_id": request_id}


def openrlhf_records(body: Any, most: int, strip: Sequence[str]) -> list[Record]:
    """Records of an OpenRLHF request.

    Args:
        body: parsed.
        most: queries.
        strip: ends of the policy's turn, see :func:`~guerdon.rewards.conversation.after_prompt`.

    Raises:
        Problem: 400 that names the field, 413 for too many queries.
    """
    _object(body)
    queries = _list(body, "query", "a list of strings: each a prompt with what the policy wrote behind it")
    prompts = _list(body, "prompts", "a list of strings, as many as there are queries")
    labels = body.get("labels")
    if labels is None:
        labels = [None] * len(queries)
    if type(labels) is not list:
        raise bad_field("labels", "labels must be a list, as long as query, or absent")
    _bounded(queries, "query", most)
    for name, values in (("prompts", prompts), ("labels", labels)):
        if len(values) != len(queries):
            raise bad_field(name, f"{name} has {len(values)} entries for {len(queries)} queries")
    out: list[Record] = []
    for k, (query, prompt, label) in enumerate(zip(queries, prompts, labels, strict=True)):
        for name, value in (("query", query), ("prompts", prompt)):
            if type(value) is not str:
                raise bad_field(f"{name}[{k}]", f"{name}[{k}] must be a string")
        try:
            completion = after_prompt(query, prompt, strip)
        except RewardError as error:
            raise bad_field(f"query[{k}]", f"query[{k}]: {error}") from None
        out.append({"id": f"query {k}", "prompt": prompt, "completion": completion, "reference": label})
    return out


def openrlhf_answer(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The body of an OpenRLHF answer; parts that not all rows have are left out.

    Raises:
        Problem: 422 where a row has no value.
    """
    bad = next((row for row in rows if not row["valid"]), None)
    if bad is not None:
        raise Problem(422, "reward_failed", f"{bad['id']}: {bad['reason']}")
    values = [float(row["value"]) for row in rows]
    shared = set(rows[0]["parts"]).intersection(*(row["parts"] for row in rows)) if rows else set()
    logs = {name: [float(row["parts"][name]) for row in rows] for name in sorted(shared)}
    return {"rewards": values, "scores": values, "extra_logs": logs}


def _object(body: Any) -> None:
    if type(body) is not dict:
        raise Problem(400, "invalid_body", "the body must be a JSON object")


def _list(body: Mapping[str, Any], name: str, wanted: str) -> list[Any]:
    value = body.get(name)
    if value is None:
        raise bad_field(name, f"{name} is missing; it must be {wanted}", "missing_required_parameter")
    if type(value) is not list:
        raise bad_field(name, f"{name} must be {wanted}")
    return value


def _bounded(items: Sequence[Any], name: str, most: int) -> None:
    if len(items) > most:
        raise Problem(413, "batch_too_large", f"{name} has {len(items)} entries, at most {most} are taken at once; "
                      "send several requests", param=name)  # fmt: skip
