"""One reward for a mixture of tasks: each sample carries a type and gets that type's reward, all on one scale.

Source: Xu et al. 2025, "Mixed-R1" (arXiv 2505.24164). Its code could not be consulted: the weight of the format reward (1)
and the thresholds of the data filter (0.1 and 0.9) are reconstructions, and arguments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from guerdon.errors import ConfigError, DataError, nearest
from guerdon.rewards.base import OnError, Reward
from guerdon.rewards.plain import RewardBatch, TextReward
from guerdon.types import Score, StopReason, Task, Trajectory, Turn

__all__ = ["RoutedReward", "ThinkAnswerFormat", "select_by_rollouts"]

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
        format: reward of the form; None leaves it out.
        format_weight: its weight.
        key: where a task says its type: ``task.meta[key]``; or a function of the trajectory.

    An unknown type is an error, never 0. Parts: ``accuracy``, ``format``. ``routed(trajectories)``, or
    ``routed(texts, golds, types)`` for a :class:`~guerdon.rewards.RewardBatch` (``metas`` are what tasks would carry).
    """

    gives = frozenset({"outcome"})

    def __init__(
        self,
        routes: Mapping[str, Reward],
        format: Reward | None = None,
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
        self.routes = dict(routes)
        self.format = ThinkAnswerFormat() if format is None else format
        self.format_weight, self._key = float(format_weight), key
        low = min(r.range[0] for r in self.routes.values()) + format_weight * self.format.range[0]
        self.range = (low, max(r.range[1] for r in self.routes.values()) + format_weight * self.format.range[1])

    def type_of(self, trajectory: Trajectory) -> str:
        """The sample's type.

        Raises:
            DataError: there is none, or no reward for it.
        """
        kind = self._key(trajectory) if callable(self._key) else trajectory.task.meta.get(self._key)
        if kind not in self.routes:
            raise DataError(
                f"task {trajectory.task.id!r} has type {kind!r}{nearest(str(kind), self.routes)}; "
                f"there are rewards for {', '.join(self.routes)}"
            )
        return str(kind)

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Score each type's samples together."""
        kinds = [self.type_of(t) for t in trajectories]
        form = self.format(trajectories)
        out: list[Score | None] = [None] * len(trajectories)
        for kind in dict.fromkeys(kinds):
            chosen = [k for k, other in enumerate(kinds) if other == kind]
            for k, s in zip(chosen, self.routes[kind]([trajectories[k] for k in chosen]), strict=True):
                if not s.valid or not form[k].valid:
                    bad = s if not s.valid else form[k]
                    out[k] = Score.invalid(bad.reason or "invalid", accuracy=s.value, format=form[k].value)
                else:
                    total = s.value + self.format_weight * form[k].value
                    out[k] = Score(total, parts={"accuracy": s.value, "format": form[k].value})
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
        parts = {name: np.array([s.parts[name] for s in scores], dtype=np.float64) for name in ("accuracy", "format")}
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
) -> np.ndarray:
    """Samples that teach something: neither always right nor always wrong under a reference model, and balanced.

    Args:
        mean, var: ``[n]`` of the rewards of each sample's rollouts; NaN (a gold that cannot be read) is dropped.
        source: ``[n]`` where each sample comes from.
        lo, hi: least and greatest mean that is kept, both included.
        per_source: most samples of each source, drawn at random.
        seed: of the draw.
        min_var: least variance that is kept: means of continuous rewards say nothing about agreement.

    Returns:
        Indices, ascending.

    Raises:
        ConfigError: lists of different lengths, ``lo`` above ``hi``.
    """
    m, v = np.asarray(mean, dtype=np.float64), np.asarray(var, dtype=np.float64)
    if not len(m) == len(v) == len(source):
        raise ConfigError(
            f"{len(m)} means, {len(v)} variances and {len(source)} sources: give one of each for every sample"
        )
    if not lo <= hi:
        raise ConfigError(f"lo must not exceed hi, got {lo} and {hi}")
    with np.errstate(invalid="ignore"):
        kept = [int(k) for k in np.flatnonzero((m >= lo) & (m <= hi) & (v > min_var))]
    if per_source is None:
        return np.array(kept, dtype=np.int64)
    rng = np.random.default_rng(seed)
    out: list[int] = []
    for name in dict.fromkeys(source[k] for k in kept):
        mine = [k for k in kept if source[k] == name]
        most = per_source.get(name, len(mine)) if isinstance(per_source, Mapping) else per_source
        out += mine if len(mine) <= most else rng.choice(mine, most, replace=False).tolist()
    return np.array(sorted(out), dtype=np.int64)
