"""Rewards of a response's length, in tokens of the policy: a hump, a line, an overlong penalty, a target.

Lengths count what the policy sampled, its end token included; prompt and environment tokens never count, and
characters are never a stand-in for tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import ConfigError, RewardError
from guerdon.rewards.base import OnError, Progress, Reward
from guerdon.types import Score, StopReason, Trajectory

__all__ = [
    "HumpLength",
    "LinearLength",
    "OverlongPenalty",
    "TargetLength",
    "hump_length",
    "linear_length",
    "overlong_penalty",
    "policy_length",
]

_CUT_OFF = frozenset({StopReason.LENGTH, StopReason.CONTEXT})

Lengths = Tensor | np.ndarray | Sequence[float]
Count = Callable[[str], int]


def hump_length(
    lengths: Lengths, max_len: float, p: float = 0.5, shape: Literal["quadratic", "polyline"] = "quadratic"
) -> Tensor:
    """A reward that rises from 0 to 1 at a share ``p`` of the budget and falls to -1 at the whole budget.

    With ``x = min(lengths / max_len, 1)``, quadratic: ``1 - (1 - x/p)^2`` for ``x <= p``, and
    ``1 - 2 ((x - p) / (1 - p))^2`` above, which crosses 0 at ``p + (1 - p) / sqrt(2)``; both value and slope are
    continuous at p. Polyline: ``x/p``, and ``1 - 2 (x - p) / (1 - p)`` above.

    Args:
        lengths: any shape, tokens of each response; integers are computed in float64, floats in their own type.
        max_len: response budget in tokens (not the model's context), positive.
        p: turning point in (0, 1), which belongs to the rising branch.
        shape: of the two branches.

    Returns:
        the shape of ``lengths``, in [-1, 1].

    Raises:
        ConfigError: p outside (0, 1), a budget that is not positive, an unknown shape.
        ValueError: a length is negative, infinite or NaN.

    Source: Xin et al. 2025 (arXiv 2505.19439), length reward; the polyline is its ablation with p = 0.5, stated
    here for any p.
    """
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0.0 < p < 1.0:
        raise ConfigError(f"p must be strictly between 0 and 1, got {p!r}")
    if shape not in ("quadratic", "polyline"):
        raise ConfigError(f"shape must be 'quadratic' or 'polyline', got {shape!r}")
    x = linear_length(lengths, max_len)
    if shape == "quadratic":
        return torch.where(x <= p, 1.0 - (1.0 - x / p) ** 2, 1.0 - 2.0 * ((x - p) / (1.0 - p)) ** 2)
    return torch.where(x <= p, x / p, 1.0 - 2.0 * (x - p) / (1.0 - p))


def linear_length(lengths: Lengths, max_len: float) -> Tensor:
    """``min(lengths / max_len, 1)``: the control that makes responses grow until they are cut off.

    Arguments and errors as for :func:`hump_length`. Source: Xin et al. 2025 (arXiv 2505.19439), ablation.
    """
    _check_budget(max_len)
    return (_tokens(lengths) / max_len).clamp(max=1.0)


def overlong_penalty(lengths: Lengths, max_len: float, buffer: float) -> Tensor:
    """0 up to ``max_len - buffer`` tokens, then falling linearly to -1 at ``max_len``; -1 beyond.

    Args:
        lengths: as for :func:`hump_length`.
        max_len: length at which the whole penalty is paid.
        buffer: tokens over which it grows, in (0, ``max_len``].

    Source: soft overlong punishment, Yu et al. 2025 (DAPO, arXiv 2503.14476), eq. 13.
    """
    _check_budget(max_len)
    if not 0 < buffer <= max_len:
        raise ConfigError(f"buffer must be in (0, max_len={max_len}], got {buffer}")
    return ((max_len - buffer - _tokens(lengths)) / buffer).clamp(-1.0, 0.0)


def policy_length(trajectory: Trajectory, count: Count | None = None) -> int:
    """Tokens that the policy sampled in all its turns.

    Args:
        trajectory: what was said.
        count: counts the tokens of a text, for turns without recorded ids.

    Raises:
        RewardError: a turn has text but no token ids, and there is no ``count``.
    """
    total = 0
    for turn in trajectory.turns:
        if turn.speaker != "policy":
            continue
        if turn.token_ids or not turn.text:
            total += len(turn.token_ids)
        elif count is not None:
            total += int(count(turn.text))
        else:
            raise RewardError(
                f"a policy turn of task {trajectory.task.id!r} has no token ids, so its length is unknown; "
                "give count=, a function from text to its number of tokens"
            )
    return total


class _Length(Reward):
    """Base: a function of a trajectory's length; ``reward([120, 3072])`` takes plain lengths."""

    def __init__(
        self, max_len: float, *, count: Count | None = None, name: str | None = None, on_error: OnError = "raise"
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        self.max_len, self._count = max_len, count
        self.values([])  # settings are checked here, before anything is sampled

    def values(self, lengths: Lengths) -> Tensor:
        """The reward of plain lengths, any shape."""
        raise TypeError(f"{type(self).__name__} must override values")

    def __call__(self, trajectories: Any, *, progress: Progress | None = None) -> Any:
        """One score per trajectory, or ``[B]`` float64 for plain lengths."""
        if isinstance(trajectories, Tensor | np.ndarray) or not all(isinstance(t, Trajectory) for t in trajectories):
            return self.values(trajectories).double().numpy()
        return super().__call__(trajectories, progress=progress)

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """The part ``length`` of a score is in tokens: all the policy's, or at least the budget where it was cut off."""
        lengths = [float(policy_length(t, self._count)) for t in trajectories]
        lengths = [
            max(n, float(self.max_len)) if t.stop in _CUT_OFF else n for t, n in zip(trajectories, lengths, strict=True)
        ]
        return [Score(r, parts={"length": n}) for r, n in zip(self.values(lengths).tolist(), lengths, strict=True)]


class HumpLength(_Length):
    """:func:`hump_length` of a trajectory; one that was cut off has the whole budget as its length, so -1.

    Args:
        max_len: response budget in tokens; the paper uses 3072.
        p: turning point in (0, 1).
        shape: ``"quadratic"`` or ``"polyline"``.
        count: counts a text's tokens where an engine records no ids.
    """

    range = (-1.0, 1.0)

    def __init__(
        self,
        max_len: float,
        p: float = 0.5,
        shape: Literal["quadratic", "polyline"] = "quadratic",
        *,
        count: Count | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        self.p, self.shape = p, shape
        super().__init__(max_len, count=count, name=name, on_error=on_error)

    def values(self, lengths: Lengths) -> Tensor:
        """See :func:`hump_length`."""
        return hump_length(lengths, self.max_len, self.p, self.shape)


class LinearLength(_Length):
    """:func:`linear_length` of a trajectory; arguments as for :class:`HumpLength`."""

    range = (0.0, 1.0)

    def values(self, lengths: Lengths) -> Tensor:
        """See :func:`linear_length`."""
        return linear_length(lengths, self.max_len)


class OverlongPenalty(_Length):
    """:func:`overlong_penalty` of a trajectory; one that was cut off pays -1.

    Args:
        max_len: length at which the whole penalty is paid.
        buffer: tokens over which it grows.
        count: counts a text's tokens where an engine records no ids.
    """

    range = (-1.0, 0.0)

    def __init__(
        self,
        max_len: float,
        buffer: float,
        *,
        count: Count | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        self.buffer = buffer
        super().__init__(max_len, count=count, name=name, on_error=on_error)

    def values(self, lengths: Lengths) -> Tensor:
        """See :func:`overlong_penalty`."""
        return overlong_penalty(lengths, self.max_len, self.buffer)


class TargetLength(Reward):
    """``-alpha * |length - target|``, the target being the task's own budget.

    Args:
        target: tokens wanted, or a function of the trajectory (for example of its task's ``meta``).
        alpha: price of a token too many or too few.
        only_above: shorter responses pay nothing: a budget rather than a target.
        count: counts a text's tokens where an engine records no ids.

    Source: LCPO-exact, Aggarwal & Welleck 2025 (L1, arXiv 2503.04697), its length term; alpha = 0.0003 there.
    """

    range = (float("-inf"), 0.0)

    def __init__(
        self,
        target: float | Callable[[Trajectory], float],
        alpha: float = 0.0003,
        *,
        only_above: bool = False,
        count: Count | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if not 0 <= alpha < float("inf"):
            raise ConfigError(f"alpha must be finite and at least 0, got {alpha}")
        if not callable(target):
            _check_budget(target, "target")
        self.target, self.alpha, self.only_above, self._count = target, alpha, only_above, count

    def score_one(self, trajectory: Trajectory) -> Score:
        target = float(self.target(trajectory) if callable(self.target) else self.target)
        if not 0 < target < float("inf"):
            raise RewardError(f"the target of task {trajectory.task.id!r} must be positive and finite, got {target}")
        length = policy_length(trajectory, self._count)
        off = max(0.0, length - target) if self.only_above else abs(length - target)
        return Score(0.0 - self.alpha * off, parts={"length": float(length), "target": target})


def _tokens(lengths: Lengths) -> Tensor:
    if isinstance(lengths, Tensor | np.ndarray):
        x = torch.as_tensor(lengths)
        x = x if x.is_floating_point() else x.double()
    else:
        x = torch.tensor(lengths, dtype=torch.float64)
    if not bool(torch.isfinite(x).all() and (x >= 0).all()):
        raise ValueError("lengths must be finite and at least 0")
    return x


def _check_budget(value: float, what: str = "max_len") -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"{what} must be a positive, finite number of tokens, got {value!r}")
