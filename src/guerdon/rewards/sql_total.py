"""The total of Reasoning-SQL, and what it is made of: a conditional term and a weighted sum with named terms.

Source: Pourreza et al. 2025, "Reasoning-SQL" (arXiv 2503.23157). Chosen here: no bonus of partial rewards where execution
is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from guerdon.errors import ConfigError
from guerdon.rewards.base import OnError, Reward
from guerdon.rewards.plain import RewardBatch
from guerdon.rewards.sql import ExecutionMatch, NgramOverlap, SchemaOverlap, SQLFormat, SQLSyntax
from guerdon.rewards.sql_base import candidate_of, columns
from guerdon.rewards.sql_execution import SQLExecutor
from guerdon.types import Score, StopReason, Task, Trajectory, Turn

__all__ = ["OnlyIf", "WeightedSum", "reasoning_sql"]


class OnlyIf(Reward):
    """A reward that is asked for only where another one is 0, and is 0 elsewhere.

    Args:
        reward: for example a judge; it is called with those trajectories alone. Give it ``on_error=0.0`` where a
            failed judgement should count as 0 (its ``failures`` count it).
        when_zero: the condition.
        skip: trajectories for which the value is 0 without asking, for example those without a query.
    """

    def __init__(
        self,
        reward: Reward,
        when_zero: Reward,
        *,
        skip: Callable[[Trajectory], bool] | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name or reward.name, on_error=on_error)
        self.reward, self.when_zero, self.skip = reward, when_zero, skip
        self.range = (min(0.0, reward.range[0]), max(0.0, reward.range[1]))

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Ask for the condition first."""
        conditions = self.when_zero.assess(trajectories)[0]
        out = [Score(0.0) if c.valid else Score.invalid(c.reason or "the condition is invalid") for c in conditions]
        skip = self.skip or (lambda t: False)
        wanted = [k for k, c in enumerate(conditions) if c.valid and c.value == 0 and not skip(trajectories[k])]
        if wanted:
            for k, score in zip(wanted, self.reward.assess([trajectories[k] for k in wanted])[0], strict=True):
                out[k] = score
        return out


class WeightedSum(Reward):
    """A weighted sum of named rewards.

    Args:
        terms: name to ``(reward, weight)``.

    Every term's value is a part under its name, and each of its own parts under ``name/part``. A term that fails makes
    the sum of that trajectory invalid, with which ``on_error`` deals. ``total(trajectories)``, or
    ``total(texts, golds, dbs, schemas)`` on plain lists of whole responses for a :class:`~guerdon.rewards.RewardBatch`.
    """

    def __init__(
        self, terms: Mapping[str, tuple[Reward, float]], *, name: str | None = None, on_error: OnError = "raise"
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if not terms:
            raise ConfigError("a weighted sum needs at least one term")
        for key, (_, weight) in terms.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ConfigError(f"the weight of {key!r} must be a finite number, got {weight!r}")
        self.terms = dict(terms)
        low = sum(min(w * b for b in r.range) for r, w in self.terms.values())
        high = sum(max(w * b for b in r.range) for r, w in self.terms.values())
        self.range = (low, high)

    def components(self) -> Iterator[Reward]:
        """The terms."""
        yield from (reward for reward, _ in self.terms.values())

    def state_dict(self) -> dict[str, Any]:
        """State of every term."""
        return {key: reward.state_dict() for key, (reward, _) in self.terms.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore every term."""
        for key, (reward, _) in self.terms.items():
            reward.load_state_dict(state[key])

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Sum the terms; one invalid term makes the sum invalid."""
        found = {key: reward.assess(trajectories)[0] for key, (reward, _) in self.terms.items()}
        out = []
        for k in range(len(trajectories)):
            row = {key: scores[k] for key, scores in found.items()}
            parts = {key: s.value for key, s in row.items()}
            parts |= {f"{key}/{part}": value for key, s in row.items() for part, value in s.parts.items()}
            bad = next((s for s in row.values() if not s.valid), None)
            if bad is not None:
                out.append(Score.invalid(bad.reason or "a term is invalid", **parts))
            else:
                out.append(Score(sum(self.terms[key][1] * s.value for key, s in row.items()), parts=parts))
        return out

    def __call__(
        self, trajectories: Any, golds: Any = None, dbs: Any = None, schemas: Any = None, *, progress: Any = None
    ) -> Any:
        """See the class."""
        if golds is None:
            return super().__call__(trajectories, progress=progress)
        rows = columns(text=trajectories, sql=golds, db=dbs, schema=schemas)
        made = [
            Trajectory(Task(f"sql-{k}", "", row), (Turn("policy", row["text"]),), StopReason.DONE)
            for k, row in enumerate(rows)
        ]
        scores = super().__call__(made)
        parts = {key: np.array([s.parts.get(key, math.nan) for s in scores], dtype=np.float64) for key in self.terms}
        return RewardBatch(np.array([s.value for s in scores], dtype=np.float64), parts)


def reasoning_sql(
    executor: SQLExecutor | None = None,
    judge: Reward | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    ordered: Literal["auto"] | bool = False,
    empty: Literal["keep", "exclude"] = "keep",
    on_error: OnError = "raise",
) -> WeightedSum:
    """The paper's total: ``3 execution + 2 judge + syntax + schema + ngram + format``; the judge only where execution is 0.

    At most 7 is reached, by a right query written as the gold one is; a wrong query stays below 6, so that with a generous
    judge one that copies the gold text nearly everywhere can outscore a right one in words of its own.

    Args:
        executor: shared by execution and syntax.
        judge: scores in [0, 1], for example :class:`~guerdon.reward_models.SqlJudge`; without one its term is left out.
            It is not asked about a response without a query.
        weights: replaces some of the weights; 0 leaves a term out.
        ordered, empty: see :class:`~guerdon.rewards.ExecutionMatch`; the paper compares sets.

    Raises:
        ConfigError: an unknown term.
    """
    executor = executor or SQLExecutor()
    execution = ExecutionMatch(executor, ordered, empty=empty)
    known: dict[str, tuple[Reward, float]] = {
        "execution": (execution, 3.0),
        "syntax": (SQLSyntax(executor), 1.0),
        "schema": (SchemaOverlap(), 1.0),
        "ngram": (NgramOverlap(), 1.0),
        "format": (SQLFormat(), 1.0),
    }
    if judge is not None:
        known["judge"] = (OnlyIf(judge, when_zero=execution, skip=_without_query), 2.0)
    for key, weight in (weights or {}).items():
        if key not in known:
            hint = " (give judge=)" if key == "judge" else ""
            raise ConfigError(f"unknown term {key!r}{hint}; choose from {', '.join(known)}")
        known[key] = (known[key][0], float(weight))
    return WeightedSum({k: v for k, v in known.items() if v[1] != 0}, name="reasoning_sql", on_error=on_error)


def _without_query(trajectory: Trajectory) -> bool:
    return not candidate_of(trajectory).strip()
