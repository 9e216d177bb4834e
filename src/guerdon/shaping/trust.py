"""An outcome beside a fallible judge: how far to trust the judge on this prompt, and fading it out.

The trust weight of a group is free: if the judge scores right samples lower than wrong ones, it is doubted there.

Source: Fan et al. 2025, "SophiaVL-R1" (arXiv 2505.17018), Trust-GRPO, and its released code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import ConfigError
from guerdon.types import Score, Trajectory

__all__ = ["TrustBatch", "TrustCombine", "TrustScores", "trust_weight"]


def trust_weight(outcome: Any, thinking: Any, groups: Any, threshold: float = 0.5, *, exponent: float = 1.0) -> Tensor:
    """``exp(mu_c - mu_w)`` of each group where its right samples score lower than its wrong ones, else 1.

    ``mu_c`` and ``mu_w`` are the mean thinking rewards of the samples with ``outcome >= threshold`` and of the others.
    Without right samples, or without wrong ones, the weight is 1.

    Args:
        outcome: ``[B]`` in [0, 1].
        thinking: ``[B]``; clipped to [0, 1], NaN counts as 0.
        groups: ``[B]`` ids, numbers or texts; equal ids, one group, of any size.
        threshold: an outcome of exactly this is right.
        exponent: multiplies the difference of means: 1 as the paper rewards, 2 as its released code logs.

    Returns:
        ``[n_groups]`` in ``[exp(-exponent), 1]``, without gradient, in the order of the sorted ids.

    Raises:
        ValueError: lengths that differ, an outcome that is not in [0, 1].
    """
    outcome_B, thinking_B, ids_B, n = _rows(outcome, thinking, groups)
    return _weights(outcome_B, _unit(thinking_B), ids_B, n, threshold, exponent)


class TrustBatch(NamedTuple):
    """What :class:`TrustCombine` returns.

    Args:
        total: ``[B]`` rewards.
        gamma: ``[n_groups]`` trust weights in the order of the sorted group ids; 0 where a group was skipped.
        anneal: the factor of this step.
    """

    total: Tensor
    gamma: Tensor
    anneal: float


class TrustCombine:
    """``outcome + gamma * alpha * exp(-step / T) * thinking``, with the trust weight gamma of each sample's group.

    Args:
        alpha: weight of the thinking reward.
        threshold: see :func:`trust_weight`.
        anneal: ``"exp"``, or ``None`` for a factor of 1 throughout.
        T: decay constant in steps; in the paper the number of training steps. Needed for ``"exp"`` from step 1 on.
            (The released code uses 500, its shipped configuration 12000.)
        skip_uniform: ``(low, high)``: a group whose outcomes are all at most ``low`` or all at least ``high`` gets no
            thinking reward, so that the judge alone never ranks samples and need not be asked. ``None`` skips none.
        trust: False leaves the weight at 1 (an ablation).
        min_outcome: thinking rewards of samples with a lower outcome count as 0, as in the released code (0.2). It
            pulls ``mu_w`` to 0 and the weight to 1, so the paper's mechanism is off; ``None`` by default.
        exponent: see :func:`trust_weight`.

    Attributes:
        counts: ``missing`` (NaN or absent thinking rewards, taken as 0), ``clipped`` (outside [0, 1]), ``groups`` and
            ``skipped``, since the beginning.

    No gradient flows through the result.
    """

    def __init__(
        self,
        alpha: float = 0.3,
        threshold: float = 0.5,
        anneal: Literal["exp"] | None = "exp",
        T: float | None = None,
        skip_uniform: tuple[float, float] | None = (0.1, 0.9),
        *,
        trust: bool = True,
        min_outcome: float | None = None,
        exponent: float = 1.0,
    ) -> None:
        if not 0 <= alpha < math.inf:
            raise ConfigError(f"alpha must be finite and at least 0, got {alpha}")
        if anneal not in ("exp", None):
            raise ConfigError(f"anneal must be 'exp' or None, got {anneal!r}")
        if T is not None and not 0 < T < math.inf:
            raise ConfigError(f"T must be a positive, finite number of steps, got {T}")
        if skip_uniform is not None and not skip_uniform[0] < skip_uniform[1]:
            raise ConfigError(f"skip_uniform must be (low, high) with low < high, got {skip_uniform}")
        self.alpha, self.threshold, self.anneal, self.T = alpha, threshold, anneal, T
        self.skip_uniform, self.trust = skip_uniform, trust
        self.min_outcome, self.exponent = min_outcome, exponent
        self.counts: Counter[str] = Counter()

    def factor(self, step: int) -> float:
        """``exp(-step / T)``, or 1 without annealing.

        Raises:
            ConfigError: no ``T``. ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        if self.anneal is None or step == 0:
            return 1.0
        if self.T is None:
            raise ConfigError("annealing needs T, the number of steps in which it falls to 1/e; or anneal=None")
        return math.exp(-step / self.T)

    def asks(self, outcome: Any, group_ids: Any) -> Tensor:
        """``[B]`` bool: True on samples whose thinking reward is read, so that a judge is asked for no others."""
        outcome_B, _, ids_B, n = _rows(outcome, torch.zeros(len(outcome)), group_ids)
        asked = ~self._skipped(outcome_B, ids_B, n)[ids_B]
        return asked if self.min_outcome is None else asked & (outcome_B >= self.min_outcome)

    def __call__(self, outcome: Any, thinking: Any, group_ids: Any, step: int) -> TrustBatch:
        """Combine a batch.

        Args:
            outcome: ``[B]`` in [0, 1].
            thinking: ``[B]``; ``None`` entries of a list count as missing.
            group_ids: ``[B]``; the samples of one prompt share an id.
            step: training steps done so far.

        Raises:
            ValueError: lengths that differ, an outcome that is not in [0, 1].
        """
        anneal = self.factor(step)
        outcome_B, raw_B, ids_B, n = _rows(outcome, thinking, group_ids)
        skipped = self._skipped(outcome_B, ids_B, n)
        read = ~skipped[ids_B]
        if self.min_outcome is not None:
            read &= outcome_B >= self.min_outcome
        self.counts["missing"] += int((read & torch.isnan(raw_B)).sum())
        self.counts["clipped"] += int((read & ((raw_B < 0) | (raw_B > 1))).sum())
        self.counts["groups"] += n
        self.counts["skipped"] += int(skipped.sum())
        thinking_B = torch.where(read, _unit(raw_B), 0.0)
        gamma = torch.ones(n, dtype=thinking_B.dtype)
        if self.trust:
            gamma = _weights(outcome_B, thinking_B, ids_B, n, self.threshold, self.exponent)
        gamma = torch.where(skipped, 0.0, gamma)
        return TrustBatch(outcome_B + gamma[ids_B] * self.alpha * anneal * thinking_B, gamma, anneal)

    def _skipped(self, outcome_B: Tensor, ids_B: Tensor, n: int) -> Tensor:
        if self.skip_uniform is None:
            return torch.zeros(n, dtype=torch.bool)
        low, high = self.skip_uniform
        above, below = (_sums(test.double(), ids_B, n) for test in (outcome_B > low, outcome_B < high))
        return (above == 0) | (below == 0)

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.counts = Counter(state["counts"])


class TrustScores:
    """:class:`TrustCombine` as the ``shape`` of a training run; evaluation, which has no shape, sees outcomes only.

    Args:
        thinking: from trajectories to thinking rewards (numbers, or scores: an invalid one is missing), for example a
            :class:`~guerdon.reward_models.JudgeRewardModel`. It is asked for what :meth:`TrustCombine.asks` names.
        combine: the rule; with annealing it must have ``T``.
        group: what the samples of one prompt share; the task's id by default.

    A call is a training step, and their number is part of the state. A score keeps ``outcome``, ``thinking`` (0 where
    it was not asked for), ``gamma`` and ``anneal`` as its parts; invalid scores pass unchanged.
    """

    def __init__(
        self,
        thinking: Callable[[Sequence[Trajectory]], Sequence[Any]],
        combine: TrustCombine,
        *,
        group: Callable[[Trajectory], Hashable] = lambda trajectory: trajectory.task.id,
    ) -> None:
        combine.factor(1)  # a missing T is found now, not after the first step
        self.thinking, self.combine, self._group = thinking, combine, group
        self.step = 0

    def __call__(self, trajectories: Sequence[Trajectory], scores: Sequence[Score]) -> list[Score]:
        """Combine a step's scores with thinking rewards."""
        if len(trajectories) != len(scores):
            raise ValueError(f"{len(scores)} scores for {len(trajectories)} trajectories")
        index = [k for k, score in enumerate(scores) if score.valid]
        if any(scores[k].steps is not None or scores[k].tokens is not None for k in index):
            raise ValueError("a score with step or token values can't be combined by its outcome alone")
        numbers: dict[Hashable, int] = {}
        ids = [numbers.setdefault(self._group(trajectories[k]), len(numbers)) for k in index]
        outcome = [scores[k].value for k in index]
        asked = self.combine.asks(outcome, ids).tolist()
        thinking = [0.0] * len(index)
        chosen = [i for i, ask in enumerate(asked) if ask]
        if chosen:
            wanted = [trajectories[index[i]] for i in chosen]
            # A failed judgement is missing here, and no reason to stop a run.
            said = self.thinking.assess(wanted)[0] if hasattr(self.thinking, "assess") else self.thinking(wanted)
            for i, value in zip(chosen, said, strict=True):
                thinking[i] = (value.value if value.valid else math.nan) if isinstance(value, Score) else float(value)
        batch = self.combine(outcome, thinking, ids, self.step)
        self.step += 1
        out = list(scores)
        for i, k in enumerate(index):
            known = 0.0 if math.isnan(thinking[i]) else thinking[i]
            parts = {"thinking": known, "gamma": float(batch.gamma[ids[i]]), "anneal": batch.anneal}
            out[k] = scores[k].with_value(float(batch.total[i]), outcome=outcome[i], **parts)
        return out

    def state_dict(self) -> dict[str, Any]:
        """The step, and the combiner's counts."""
        return {"step": self.step, "combine": self.combine.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.step = int(state["step"])
        self.combine.load_state_dict(state["combine"])


def _weights(outcome_B: Tensor, thinking_B: Tensor, ids_B: Tensor, n: int, threshold: float, exponent: float) -> Tensor:
    right = (outcome_B >= threshold).double()
    count_c, count_w = _sums(right, ids_B, n), _sums(1 - right, ids_B, n)
    mu_c = _sums(right * thinking_B, ids_B, n) / count_c.clamp(min=1)
    mu_w = _sums((1 - right) * thinking_B, ids_B, n) / count_w.clamp(min=1)
    doubted = (count_c > 0) & (count_w > 0) & (mu_c < mu_w)
    return torch.where(doubted, torch.exp(exponent * (mu_c - mu_w)), 1.0)


def _rows(outcome: Any, thinking: Any, groups: Any) -> tuple[Tensor, Tensor, Tensor, int]:
    outcome_B, thinking_B = _floats(outcome), _floats(thinking)
    ids = groups.tolist() if hasattr(groups, "tolist") else list(groups)
    if outcome_B.ndim != 1 or not len(outcome_B) == len(ids) == len(thinking_B):
        raise ValueError(f"{len(outcome_B)} outcomes, {len(thinking_B)} thinking rewards and {len(ids)} group ids")
    if not bool(((outcome_B >= 0) & (outcome_B <= 1)).all()):
        raise ValueError("outcomes must lie in [0, 1]")
    order = {group: k for k, group in enumerate(sorted(set(ids)))}
    return outcome_B, thinking_B, torch.tensor([order[i] for i in ids], dtype=torch.long), len(order)


def _floats(values: Any) -> Tensor:
    if isinstance(values, Tensor | np.ndarray):
        return torch.as_tensor(values).detach().double()
    return torch.tensor([math.nan if v is None else float(v) for v in values], dtype=torch.float64)


def _unit(thinking_B: Tensor) -> Tensor:
    return torch.nan_to_num(thinking_B, nan=0.0, posinf=1.0, neginf=0.0).clamp(0.0, 1.0)


def _sums(values_B: Tensor, ids_B: Tensor, n: int) -> Tensor:
    return torch.zeros(n, dtype=values_B.dtype).index_add_(0, ids_B, values_B)
