"""One reward for a mixture of tasks: each sample carries a type and gets that type's reward, all on one scale.

Source: Xu et al. 2025, "Mixed-R1" (arXiv 2505.24164). Its code could not be consulted: the weight of the format reward (1)
and the thresholds of the data filter (0.1 and 0.9) are reconstructions, and arguments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from guerdon.errors import ConfigError, nearest
from guerdon.rewards.base import OnError, Reward
from guerdon.rewards.plain import RewardBatch, TextReward
from guerdon.types import Score, StopReason, Task, Trajectory, Turn

__all__ = ["RoutedReward", "ThinkAnswerFormat", "select_by_rollouts", "source_statistics"]

_FORM = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


class ThinkAnswerFormat(TextReward):
    """1 where the stripped response is one think block and then one answer block, each tag once, else 0."""

    range = (0.0, 1.0)
    gives = frozenset({"outcome"})

    def score_text(self, text: str) -> float:
        text = text.strip()
        return float(all(text.count(t) == 1 for t in _TAGS) and _FORM.fullmatch(text) is not None)


class RoutedReward(Reward):
    """The reward of the sample's type, plus ``format_weight`` times the format.

    Args:
        routes: type to reward; each should stay within [0, 1], so that types can be mixed.
        format: reward of the form; by default :class:`ThinkAnswerFormat`. None leaves it out.
        format_weight: its weight.
        key: where a task says its type: ``task.meta[key]``; or a function of the trajectory.

    An unknown type is an error whatever ``on_error`` says, never 0. Parts: ``accuracy``, and ``format`` where there is one. ``routed(trajectories)``, or
    ``routed(texts, golds, types)`` for a :class:`~guerdon.rewards.RewardBatch` (``metas`` are what tasks would carry).
    """

    gives = frozenset({"outcome"})

    def __init__(
        self,
        routes: Mapping[str, Reward],
        format: Reward | Literal["think_answer"] | None = "think_answer",
        format_weight: float = 1.0,
        *,
        key: str | Callable[[Trajectory], str] = "type",
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if not routes:
            raise ConfigError("routes must name at least one type and its reward")
        if isinstance(format_weight, bool) or not 0 <= format_weight < math.inf:
            raise ConfigError(f"format_weight must be finite and >= 0, got {format_weight!r}")
        if format is not None and format != "think_answer" and not isinstance(format, Reward):
            raise ConfigError(f"format must be a reward, 'think_answer' or None, got {format!r}")
        self.routes = dict(routes)
        self.format = ThinkAnswerFormat() if isinstance(format, str) else format
        self.format_weight, self._key = float(format_weight), key
        low, high = (0.0, 0.0) if self.format is None else self.format.range
        self.range = (
            min(r.range[0] for r in self.routes.values()) + format_weight * low,
            max(r.range[1] for r in self.routes.values()) + format_weight * high,
        )

    def type_of(self, trajectory: Trajectory) -> str:
        """The sample's type.

        Raises:
            ConfigError: there is none, or no reward for it. No ``on_error`` turns that into a number.
        """
        kind = self._key(trajectory) if callable(self._key) else trajectory.task.meta.get(self._key)
        if kind not in self.routes:
            raise ConfigError(
                f"task {trajectory.task.id!r} has type {kind!r}{nearest(str(kind), self.routes)}; "
                f"there are rewards for {', '.join(self.routes)}"
            )
        return str(kind)

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Score each type's samples together."""
        kinds = [self.type_of(t) for t in trajectories]
        form = None if self.format is None else self.format(trajectories)
        out: list[Score | None] = [None] * len(trajectories)
        for kind in dict.fromkeys(kinds):
            chosen = [k for k, other in enumerate(kinds) if other == kind]
            for k, s in zip(chosen, self.routes[kind]([trajectories[k] for k in chosen]), strict=True):
                parts = {"accuracy": s.value} if form is None else {"accuracy": s.value, "format": form[k].value}
                bad = next((x for x in (s, *(() if form is None else (form[k],))) if not x.valid), None)
                if bad is not None:
                    out[k] = Score.invalid(bad.reason or "invalid", **parts)
                else:
                    out[k] = Score(s.value + self.format_weight * parts.get("format", 0.0), parts=parts)
        return [s for s in out if s is not None]

    def __call__(
        self, trajectories: Any, golds: Any = None, types: Any = None, metas: Any = None, *, progress: Any = None
    ) -> Any:
        """See the class."""
        if golds is None:
            return super().__call__(trajectories, progress=progress)
        if types is None or not len(trajectories) == len(golds) == len(types):
            n = "no types" if types is None else f"{len(types)} types"
            raise ConfigError(f"{len(trajectories)} texts, {len(golds)} golds and {n}: give one of each for every text")
        strange = [t for t in types if t not in self.routes]
        if strange:
            unknown = strange[0]
            raise ConfigError(
                f"unknown type {unknown!r}{nearest(str(unknown), self.routes)}; choose from {', '.join(self.routes)}"
            )
        key = self._key if isinstance(self._key, str) else "type"
        made = [
            Trajectory(
                Task(f"text-{k}", "", g, {**(metas[k] if metas is not None else {}), key: kind}),
                (Turn("policy", t),),
                StopReason.DONE,
            )
            for k, (t, g, kind) in enumerate(zip(trajectories, golds, types, strict=True))
        ]
        scores = super().__call__(made)
        names = ("accuracy",) if self.format is None else ("accuracy", "format")
        parts = {name: np.array([s.parts.get(name, np.nan) for s in scores], dtype=np.float64) for name in names}
        return RewardBatch(np.array([s.value for s in scores], dtype=np.float64), parts)


def select_by_rollouts(
    mean: Sequence[float],
    var: Sequence[float],
    source: Sequence[Any],
    lo: float = 0.1,
    hi: float = 0.9,
    per_source: int | Mapping[Any, int] | None = None,
    seed: int = 0,
    *,
    min_var: float = 1e-6,
    continuous: Collection[Any] = (),
) -> np.ndarray:
    """Samples that teach something: neither always right nor always wrong under a reference model, and balanced.

    Args:
        mean, var: ``[n]`` of the rewards of each sample's rollouts; NaN (a gold that cannot be read) is dropped.
        source: ``[n]`` where each sample comes from.
        lo, hi: least and greatest mean that is kept, both included, where rewards are 0 or 1.
        per_source: most samples of each source, drawn at random.
        seed: of the draw.
        min_var: variance that must be exceeded.
        continuous: sources whose rewards are no 0 or 1: only the variance counts, since a high mean says nothing about
            agreement (unrelated texts share most of their embeddings).

    Returns:
        Indices, ascending.

    Raises:
        ConfigError: lists of different lengths, ``lo`` above ``hi``, a negative number of samples.
    """
    m, v = np.asarray(mean, dtype=np.float64), np.asarray(var, dtype=np.float64)
    if not len(m) == len(v) == len(source):
        raise ConfigError(
            f"{len(m)} means, {len(v)} variances and {len(source)} sources: give one of each for every sample"
        )
    if not lo <= hi:
        raise ConfigError(f"lo must not exceed hi, got {lo} and {hi}")
    limits = per_source.values() if isinstance(per_source, Mapping) else [] if per_source is None else [per_source]
    if any(most < 0 for most in limits):
        raise ConfigError(f"per_source must be at least 0, got {per_source!r}")
    free = np.array([name in continuous for name in source], dtype=bool)
    with np.errstate(invalid="ignore"):
        kept = [int(k) for k in np.flatnonzero(((m >= lo) & (m <= hi) | free) & np.isfinite(m) & (v > min_var))]
    if per_source is None:
        return np.array(kept, dtype=np.int64)
    rng = np.random.default_rng(seed)
    out: list[int] = []
    for name in dict.fromkeys(source[k] for k in kept):
        mine = [k for k in kept if source[k] == name]
        most = per_source.get(name, len(mine)) if isinstance(per_source, Mapping) else per_source
        out += mine if len(mine) <= most else rng.choice(mine, most, replace=False).tolist()
    return np.array(sorted(out), dtype=np.int64)


def source_statistics(
    values: Sequence[float], sources: Sequence[Any], groups: Sequence[Any]
) -> dict[Any, dict[str, float]]:
    """What is to be watched of each source in a mixed batch.

    Args:
        values: ``[B]`` rewards; NaN where there is none.
        sources: ``[B]`` source or type of each sample.
        groups: ``[B]`` prompt of each sample, of one source each.

    Returns:
        By source: ``mean`` reward, ``zero_variance`` (share of prompts whose rewards are all equal: no gradient comes
        from them), ``prompts`` and ``invalid`` (samples without a reward, left out of the rest).

    Raises:
        ConfigError: lists of different lengths.
    """
    if not len(values) == len(sources) == len(groups):
        raise ConfigError(f"{len(values)} values, {len(sources)} sources and {len(groups)} groups: give one of each")
    rows: dict[Any, dict[Any, list[float]]] = {}
    for value, source, group in zip(values, sources, groups, strict=True):
        rows.setdefault(source, {}).setdefault(group, []).append(float(value))
    out = {}
    for source, found in rows.items():
        valid = [[x for x in row if math.isfinite(x)] for row in found.values()]
        scored = [row for row in valid if row]
        n = sum(map(len, scored))
        out[source] = {
            "mean": sum(map(sum, scored)) / n if n else math.nan,
            "zero_variance": sum(max(r) == min(r) for r in scored) / len(scored) if scored else math.nan,
            "prompts": float(len(found)),
            "invalid": float(sum(map(len, found.values())) - n),
        }
    return out
