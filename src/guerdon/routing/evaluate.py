"""Measure a router: quality, money, calls, validity, and whether it chose members that can answer.

Every row of the table, trained router or baseline, is a list of trajectories over the same tasks, so
that they can be compared item by item.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from guerdon.errors import DataError
from guerdon.rewards import ExactMatch, RouterFormat, TokenF1
from guerdon.types import StopReason, Trajectory

__all__ = ["COLUMNS", "Competence", "RouterMetrics", "measure", "rows_table"]

Competence = Callable[[Trajectory, Any], bool | None]
"""``competence(trajectory, call)``: can the member that was asked answer what it was asked? None: unknown."""


@dataclass(frozen=True, slots=True)
class RouterMetrics:
    """One row of the table. Means are over all questions, failed ones included.

    Attributes:
        name: of the router.
        n: number of questions, the denominator of every mean per question.
        em, f1: answer quality in [0, 1].
        usd_per_1000: pool money per 1,000 questions.
        raw_cost: mean of completion tokens times price per million (the paper's cost figure).
        calls: executed route actions per question.
        valid_route_rate: share of executed route actions that named a member and got a reply.
        format_error_rate: share of trajectories that break the format reward; ``None`` for baselines
            that write no tags.
        competent_rate: share of calls to a member that can answer what it was asked, where known.
        failed: trajectories that ended in an error.
        policy_tokens, policy_seconds: mean output tokens and seconds of the router itself.
        by_hops: em and calls per number of hops.
        items: per question ``em``, ``f1``, ``raw_cost``, ``usd``, ``calls``, ``format_error`` and ``hops``.
    """

    name: str
    n: int
    em: float
    f1: float
    usd_per_1000: float
    raw_cost: float
    calls: float
    valid_route_rate: float
    format_error_rate: float | None
    competent_rate: float | None
    failed: int
    policy_tokens: float
    policy_seconds: float
    by_hops: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    items: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)

    def to_dict(self, *, items: bool = False) -> dict[str, Any]:
        """JSON-ready form; per-question arrays only when asked for."""
        out = {k: getattr(self, k) for k in self.__dataclass_fields__ if k != "items"}
        if items:
            out["items"] = {k: v.tolist() for k, v in self.items.items()}
        return out


def measure(
    name: str,
    trajectories: Sequence[Trajectory],
    *,
    competence: Competence | None = None,
    writes_tags: bool = True,
) -> RouterMetrics:
    """Summarise trajectories, one per question, in the order of the questions.

    Args:
        name: of the row.
        trajectories: with ``info`` as :class:`~guerdon.routing.env.RoutingEpisode` reports it, and the
            gold answers in ``task.reference``.
        competence: judges single calls.
        writes_tags: False for baselines whose answer is in ``info["answer"]`` and has no format.

    Raises:
        DataError: no trajectories, or a task without gold answers.
    """
    if not trajectories:
        raise DataError("nothing to evaluate: the list of trajectories is empty")
    n = len(trajectories)
    if writes_tags:
        em = _values(ExactMatch(), trajectories)
        f1 = _values(TokenF1(), trajectories)
        form = RouterFormat()
        broken = np.array([s.value < 0 for s in form(trajectories)], dtype=float)
    else:
        em = _text_values(ExactMatch(), trajectories)
        f1 = _text_values(TokenF1(), trajectories)
        broken = np.zeros(n)
    routes = np.array([t.info.get("routes", 0) for t in trajectories], dtype=float)
    valid = np.array([t.info.get("valid_routes", 0) for t in trajectories], dtype=float)
    cost = np.array([t.info.get("raw_cost", 0.0) for t in trajectories], dtype=float)
    usd = np.array([t.usage.usd for t in trajectories], dtype=float)
    hops = np.array([int(t.task.meta.get("hops", 1)) for t in trajectories])
    judged = [
        verdict
        for t in trajectories
        if competence is not None
        for call in t.info.get("calls", ())
        if (verdict := competence(t, call)) is not None
    ]
    by_hops = {
        str(h): {
            "n": int((hops == h).sum()),
            "em": float(em[hops == h].mean()),
            "calls": float(routes[hops == h].mean()),
        }
        for h in sorted(set(hops.tolist()))
    }
    return RouterMetrics(
        name=name,
        n=n,
        em=float(em.mean()),
        f1=float(f1.mean()),
        usd_per_1000=float(usd.mean() * 1000),
        raw_cost=float(cost.mean()),
        calls=float(routes.mean()),
        valid_route_rate=float(valid.sum() / routes.sum()) if routes.sum() else 1.0,
        format_error_rate=float(broken.mean()) if writes_tags else None,
        competent_rate=float(np.mean(judged)) if judged else None,
        failed=sum(t.stop is StopReason.ERROR for t in trajectories),
        policy_tokens=float(np.mean([t.policy_usage.output_tokens for t in trajectories])),
        policy_seconds=float(np.mean([t.policy_usage.seconds for t in trajectories])),
        by_hops=by_hops,
        items={"em": em, "f1": f1, "raw_cost": cost, "usd": usd, "calls": routes, "format_error": broken, "hops": hops},
    )


def _values(reward: Any, trajectories: Sequence[Trajectory]) -> np.ndarray:
    scores = reward(trajectories)
    for score, trajectory in zip(scores, trajectories, strict=True):
        if not score.valid:
            raise DataError(f"task {trajectory.task.id!r} cannot be scored: {score.reason}")
    return np.array([s.value for s in scores], dtype=float)


def _text_values(reward: Any, trajectories: Sequence[Trajectory]) -> np.ndarray:
    answers = [(str(t.info.get("answer") or ""), t.task.reference) for t in trajectories]
    return np.array(
        [reward.text(completion=f"<answer>{a}</answer>" if a else "", reference=r).value for a, r in answers],
        dtype=float,
    )


COLUMNS = (
    "router",
    "EM",
    "F1",
    "USD/1k",
    "raw cost",
    "calls",
    "valid routes",
    "format errors",
    "competent",
    "EM 1-hop",
    "EM 2-hop",
)


def rows_table(rows: Sequence[RouterMetrics]) -> list[list[str]]:
    """Cells of the printed table, one list a row, in the order of :data:`COLUMNS`."""

    def share(x: float | None) -> str:
        return "-" if x is None else f"{100 * x:.1f}%"

    return [
        [
            r.name,
            f"{r.em:.3f}",
            f"{r.f1:.3f}",
            f"{r.usd_per_1000:.4f}",
            f"{r.raw_cost:.1f}",
            f"{r.calls:.2f}",
            share(r.valid_route_rate if r.calls else None),
            share(r.format_error_rate),
            share(r.competent_rate),
            *(f"{r.by_hops[h]['em']:.3f}" if h in r.by_hops else "-" for h in ("1", "2")),
        ]
        for r in rows
    ]
