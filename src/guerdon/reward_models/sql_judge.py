"""A language model as a judge of SQL that does not return the gold result: how near is it?

Source: Pourreza et al. 2025, "Reasoning-SQL" (arXiv 2503.23157), whose rubric it states in words of our own; the paper
leaves judge and scale open. Here the scale is 0 to 10 in whole numbers, or 0 to 1 with decimals.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from guerdon.errors import ConfigError, DataError
from guerdon.reward_models.judge import Judge
from guerdon.rewards.base import OnError, Reward
from guerdon.rewards.sql_base import candidate_of, read_item
from guerdon.types import Score, Trajectory

__all__ = ["SQL_RUBRIC", "SqlJudge", "parse_sql_score"]

SQL_RUBRIC = """A SQL query was written to answer a question about a database. Its result differs from that of the \
reference query. Grade how near it is.

Look at six things:
1. Tables and joins: are the right ones used, joined on the right columns?
2. Filters: are the conditions those that the question asks for?
3. Aggregation and grouping: the right functions over the right groups?
4. Select list: the right columns, in the right order?
5. Logic: how close is it to the reference as a whole?
6. Economy: is there nothing superfluous?

Database:
{schema}

Question:
{question}

Reference query:
{gold}

Query to grade:
{candidate}

Reply with a whole number from 0 (nothing is right) to 10 (a slip away from right) and nothing else, as \
<answer>number</answer>."""
"""What the judge is asked; places ``schema``, ``question``, ``gold`` and ``candidate``."""

_NUMBER = re.compile(r"<answer>\s*(-?\d{1,9}(?:\.\d{1,30})?)\s*</answer>", re.IGNORECASE)
_ALONE = re.compile(r"\s*(-?\d{1,9}(?:\.\d{1,30})?)\s*\Z")


def parse_sql_score(reply: str, *, scale: int = 10) -> float | None:
    """The score in a judge's reply, in [0, 1]; None where there is none.

    A number in the last ``<answer>`` tag counts, or a number that is the whole reply. Whole numbers are on the scale 0
    to ``scale`` and are divided by it; numbers with a decimal point are on the scale 0 to 1. What lies outside is
    clipped.

    Args:
        reply: of the judge.
        scale: highest whole number.
    """
    found = _NUMBER.findall(reply)
    alone = _ALONE.match(reply)
    if not found and alone is None:
        return None
    text = found[-1] if found else alone.group(1)  # type: ignore[union-attr]
    value = float(text) if "." in text else float(text) / scale
    return min(1.0, max(0.0, value))


class SqlJudge(Reward):
    """A judge's score of a candidate query, in [0, 1].

    Args:
        generate: prompts to replies, as :class:`~guerdon.reward_models.Judge` takes it; use temperature 0.
        template: see :data:`SQL_RUBRIC`.
        scale: highest whole number of the rubric's scale.
        on_error: what a failed judgement or an unreadable reply means; 0.0 as the description has it (a
            re-implementation of the paper uses 0.2). Each is counted in ``failures`` and in ``judge.failures``.
        options: further arguments of :class:`~guerdon.reward_models.Judge`.

    The task's reference holds ``sql``, ``schema`` and ``question`` (the prompt stands in for the latter). A response
    without a query gives 0 without asking. Use it inside :func:`~guerdon.rewards.reasoning_sql`, which asks only where
    execution does not match.
    """

    range = (0.0, 1.0)
    gives = frozenset({"outcome"})

    def __init__(
        self,
        generate: Callable[..., Any],
        template: str = SQL_RUBRIC,
        *,
        scale: int = 10,
        name: str | None = None,
        on_error: OnError = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(name=name or "judge", on_error=on_error)
        if scale < 1:
            raise ConfigError(f"scale must be at least 1, got {scale}")
        if "{candidate}" not in template:
            raise ConfigError("the template must have a place {candidate} (and usually {gold}, {schema}, {question})")
        self.judge = Judge(generate, template, lambda reply: parse_sql_score(reply, scale=scale), **options)

    async def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Judge a batch at once."""
        out: list[Score] = []
        asked: dict[int, dict[str, str]] = {}
        for k, trajectory in enumerate(trajectories):
            sql = candidate_of(trajectory)
            out.append(Score(0.0))
            if not sql.strip():
                continue
            try:
                item = read_item(trajectory.task)
            except DataError as error:
                out[k] = Score.invalid(str(error))
                continue
            asked[k] = {
                "schema": _schema_text(item),
                "question": str(item.get("question") or trajectory.task.question),
                "gold": item["sql"],
                "candidate": sql,
            }
        verdicts = await self.judge.ask(list(asked.values())) if asked else []
        for k, verdict in zip(asked, verdicts, strict=True):
            task = trajectories[k].task.id
            out[k] = (
                Score.invalid(f"judge {self.name!r} has no verdict on task {task!r}: {verdict.error}")
                if verdict.error
                else Score(float(verdict.value))
            )
        return out


def _schema_text(item: Mapping[str, Any]) -> str:
    schema = item.get("schema")
    if isinstance(schema, Mapping):
        schema = "\n".join(f"{table}({', '.join(names)})" for table, names in schema.items())
    hint = item.get("hint") or item.get("evidence")
    return f"{schema or '(not given)'}" + (f"\n\nHint: {hint}" if hint else "")
