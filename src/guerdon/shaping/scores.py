"""Shapers as the ``shape`` of a training run: trajectories and scores in, scores out, references looked up by task."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch

from guerdon.errors import ConfigError, DataError, RewardError
from guerdon.shaping.log_sigmoid import AllGood
from guerdon.shaping.shapers import PreferenceAsReward, RewardShaper, apply_ceiling, penalise_length, shaper
from guerdon.types import Group, Score, Task, Trajectory

__all__ = ["AllGoodScores", "ShapeScores", "par", "reference_rewards", "shaped"]

References = Mapping[Hashable, Sequence[float]]


class ShapeScores:
    """A :class:`RewardShaper` on the outcomes of scored trajectories.

    Args:
        shaper: what shapes; if it has state, the state is this object's.
        references: reference rewards by task id (see :func:`reference_rewards`); ``None`` reads each task's
            ``meta["reference_rewards"]``. They are read, never updated: references stay those of the initial policy.
        ceiling: first hold scores under this.
        length_penalty: ``(free, per_token)``: then take ``per_token`` for each policy token beyond ``free``; the study
            of PAR uses (300, 0.01) for every shaper it compares. ``None``: no penalty.
        key: what references are filed under; the task's id by default.

    A shaped score keeps both numbers as its parts ``proxy_reward`` (shaped) and ``proxy_reward_origin`` (as scored).
    Invalid scores pass unchanged and touch no statistic. A score with step or token values is refused, since only
    its outcome would be shaped.
    """

    def __init__(
        self,
        shaper: RewardShaper,
        references: References | None = None,
        *,
        ceiling: float | None = None,
        length_penalty: tuple[int, float] | None = None,
        key: Callable[[Task], Hashable] = lambda task: task.id,
    ) -> None:
        if ceiling is not None:
            apply_ceiling(torch.zeros(0), ceiling)
        if length_penalty is not None:
            penalise_length(torch.zeros(0), torch.zeros(0), *length_penalty)
        self.shaper, self.references, self.ceiling, self.key = shaper, references, ceiling, key
        self.length_penalty = length_penalty
        self.name = shaper.name

    def check(self, tasks: Iterable[Task]) -> None:
        """Refuse tasks without reference rewards, where the shaper needs them; for use before anything is loaded.

        Raises:
            ConfigError: names the first such tasks.
        """
        if not self.shaper.needs_references:
            return
        bare = [task.id for task in tasks if not len(self._found(task))]
        if bare:
            some = ", ".join(repr(i) for i in bare[:3])
            raise ConfigError(
                f"shape {self.name!r} needs reference rewards, and {len(bare)} task(s) have none ({some}, ...); sample a "
                "response of the initial policy to each, score it with the same reward (reference_rewards(groups, "
                "reward)), and give the result as references= or as each task's meta['reference_rewards']"
            )

    def __call__(self, trajectories: Sequence[Trajectory], scores: Sequence[Score]) -> list[Score]:
        """Shape a batch.

        Raises:
            ConfigError: a task has no reference rewards though the shaper needs them.
            RewardError: a score has step or token values, or a length is needed and unknown.
        """
        if len(trajectories) != len(scores):
            raise ValueError(f"{len(scores)} scores for {len(trajectories)} trajectories")
        index = [k for k, score in enumerate(scores) if score.valid]
        for k in index:
            if scores[k].steps is not None or scores[k].tokens is not None:
                raise RewardError(
                    f"shape {self.name!r} takes outcomes only; the score of task {trajectories[k].task.id!r} has step or "
                    "token values, which it would leave as they are"
                )
        if not index:
            return list(scores)
        chosen = [trajectories[k] for k in index]
        values = torch.tensor([scores[k].value for k in index], dtype=torch.float64)
        if self.ceiling is not None:
            values = apply_ceiling(values, self.ceiling)
        if self.length_penalty is not None:
            lengths = torch.tensor([_length(t) for t in chosen], dtype=torch.float64)
            values = penalise_length(values, lengths, *self.length_penalty)
        rows = None
        if self.shaper.needs_references:
            self.check({t.task.id: t.task for t in chosen}.values())
            rows = [self._found(t.task) for t in chosen]
        out = list(scores)
        for k, value in zip(index, self.shaper(values, rows).tolist(), strict=True):
            out[k] = scores[k].with_value(value, proxy_reward=value, proxy_reward_origin=scores[k].value)
        return out

    def _found(self, task: Task) -> Sequence[float]:
        if self.references is None:
            return task.meta.get("reference_rewards") or ()
        found = self.references.get(self.key(task))
        return () if found is None else found

    def state_dict(self) -> dict[str, Any]:
        """State of the shaper."""
        return self.shaper.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.shaper.load_state_dict(state)


def par(
    references: References | None = None,
    *,
    k: float = 1.0,
    max_refs: int = 10,
    ceiling: float | None = None,
    length_penalty: tuple[int, float] | None = None,
) -> ShapeScores:
    """Preference As Reward as the ``shape`` of a run; arguments as for :class:`ShapeScores` and its shaper.

    Source: Fu et al. 2025 (arXiv 2502.18770). The study's loop adds ``length_penalty=(300, 0.01)``.
    """
    return ShapeScores(PreferenceAsReward(k, max_refs), references, ceiling=ceiling, length_penalty=length_penalty)


def shaped(
    method: str = "par",
    references: References | None = None,
    *,
    ceiling: float | None = None,
    length_penalty: tuple[int, float] | None = None,
    **settings: Any,
) -> ShapeScores:
    """Any method of :func:`guerdon.shaping.shaper` as the ``shape`` of a run; ``settings`` are the method's."""
    return ShapeScores(shaper(method, **settings), references, ceiling=ceiling, length_penalty=length_penalty)


class AllGoodScores:
    """:class:`AllGood` as the ``shape`` of a run: the scores' named parts in, the log-probability of all good out.

    Args:
        combiner: its names are those of the parts (a weighted sum of rewards names its terms); with a single name that
            no part has, the outcome itself is taken.
        key: what the references were fitted under; the task's id by default.

    Further parts: ``log_good/<name>`` for each count, ``prob_good`` (of all), ``proxy_reward`` and
    ``proxy_reward_origin``. Invalid scores pass unchanged.
    """

    name = "all_good"

    def __init__(self, combiner: AllGood, *, key: Callable[[Task], Hashable] = lambda task: task.id) -> None:
        self.combiner, self.key = combiner, key

    def check(self, tasks: Iterable[Task]) -> None:
        """Refuse tasks that some transform has no reference for.

        Raises:
            ConfigError: names the first such task.
        """
        for task in tasks:
            for name, transform in self.combiner.transforms.items():
                try:
                    transform.reference_of(self.key(task))
                except DataError as error:
                    raise ConfigError(f"shape {self.name!r}, reward {name!r}: {error}") from None

    def __call__(self, trajectories: Sequence[Trajectory], scores: Sequence[Score]) -> list[Score]:
        """Combine a batch.

        Raises:
            RewardError: a valid score lacks a part, or has step or token values.
            DataError: a task without a fitted reference.
        """
        if len(trajectories) != len(scores):
            raise ValueError(f"{len(scores)} scores for {len(trajectories)} trajectories")
        index = [k for k, score in enumerate(scores) if score.valid]
        prompts = [self.key(trajectories[k].task) for k in index]
        named = {
            name: torch.tensor([self._part(scores[k], name, trajectories[k]) for k in index], dtype=torch.float64)
            for name in self.combiner.transforms
        }
        terms = self.combiner.terms(named, prompts)
        total = self.combiner.log_prob(named, prompts)
        out = list(scores)
        for b, k in enumerate(index):
            value = float(total[b])
            parts = {f"log_good/{name}": float(term[b]) for name, term in terms.items()}
            parts |= {"prob_good": math.exp(value), "proxy_reward": value, "proxy_reward_origin": scores[k].value}
            out[k] = scores[k].with_value(value, **parts)
        return out

    def _part(self, score: Score, name: str, trajectory: Trajectory) -> float:
        if score.steps is not None or score.tokens is not None:
            raise RewardError(f"shape {self.name!r} takes outcomes only, task {trajectory.task.id!r} has finer values")
        if name in score.parts:
            return score.parts[name]
        if len(self.combiner.transforms) == 1:
            return score.value
        raise RewardError(
            f"the score of task {trajectory.task.id!r} has no part {name!r} (it has {', '.join(score.parts) or 'none'}); "
            "name the transforms after the rewards that are summed"
        )

    def state_dict(self) -> dict[str, Any]:
        """The references of every transform."""
        return {name: t.state_dict() for name, t in self.combiner.transforms.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        for name, transform in self.combiner.transforms.items():
            transform.load_state_dict(state[name])


def reference_rewards(
    groups: Iterable[Group], reward: Callable[[Sequence[Trajectory]], Sequence[Score | float]]
) -> dict[str, list[float]]:
    """Score responses of the initial policy once: ``{task id: rewards}``, in the order of each group.

    Args:
        groups: sampled from the initial (SFT) policy; never the dataset's chosen answers, never the present policy.
        reward: the one that training uses. Its invalid scores are left out.

    Raises:
        RewardError: a task has no valid reference, or another number of scores came back.
    """
    out: dict[str, list[float]] = {}
    for group in groups:
        scores = [s if isinstance(s, Score) else Score(float(s)) for s in reward(list(group.trajectories))]
        if len(scores) != len(group):
            raise RewardError(f"{len(scores)} scores for the {len(group)} references of task {group.task.id!r}")
        values = [float(s.value) for s in scores if s.valid and math.isfinite(s.value)]
        if not values:
            raise RewardError(f"none of the {len(group)} references of task {group.task.id!r} has a valid score")
        out.setdefault(group.task.id, []).extend(values)
    return out


def _length(trajectory: Trajectory) -> int:
    total = 0
    for turn in trajectory.turns:
        if turn.speaker == "policy":
            if turn.text and not turn.token_ids:
                raise RewardError(
                    f"a policy turn of task {trajectory.task.id!r} has no token ids: its length is unknown"
                )
            total += len(turn.token_ids)
    return total
