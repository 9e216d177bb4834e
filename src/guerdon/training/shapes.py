"""Shapes of a run: what stands between the reward's scores and credit, by name, alone or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from guerdon.errors import ConfigError
from guerdon.parts import Part, build
from guerdon.rewards.base import Progress, takes_progress
from guerdon.types import Score, Trajectory

__all__ = ["Chain", "Overlong", "Shape", "ShapeFunction", "as_shape", "name_of"]

Shape = Callable[..., Sequence[Score]]
"""``(trajectories, scores) -> scores``; may have a keyword ``progress``, ``state_dict`` and ``check(tasks)``."""


class ShapeFunction:
    """A pure function of one tensor as a shape: it maps the outcomes of the valid scores.

    Args:
        part: the function with its settings.

    The score as it was remains as the part ``unshaped``.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        self.name = part.name

    def __call__(self, trajectories: Sequence[Trajectory], scores: Sequence[Score]) -> list[Score]:
        """Map the outcomes."""
        valid = [k for k, s in enumerate(scores) if s.valid]
        out = list(scores)
        if not valid:
            return out
        before = torch.tensor([scores[k].value for k in valid], dtype=torch.float64)
        after = self.part(before)
        if after.shape != before.shape:
            raise ValueError(f"{self.part!r} mapped {len(before)} outcomes to shape {tuple(after.shape)}")
        for k, value in zip(valid, after.tolist(), strict=True):
            out[k] = scores[k].with_value(value, unshaped=scores[k].value)
        return out

    def __repr__(self) -> str:
        return repr(self.part)


class Chain:
    """Shapes one after the other.

    Args:
        shapes: applied in this order; each sees the scores that the one before made.
    """

    name = "chain"

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.shapes = list(shapes)
        self.needs = frozenset().union(*(getattr(s, "needs", frozenset()) for s in self.shapes))

    def __call__(
        self, trajectories: Sequence[Trajectory], scores: Sequence[Score], progress: Progress | None = None
    ) -> Sequence[Score]:
        """Apply them."""
        for shape in self.shapes:
            more = {"progress": progress} if takes_progress(shape) else {}
            made = list(shape(trajectories, scores, **more))
            if len(made) != len(scores):
                raise ValueError(f"{name_of(shape)!r} returned {len(made)} scores for {len(scores)} trajectories")
            scores = [new if old.valid else old for old, new in zip(scores, made, strict=True)]
        return scores

    def state_dict(self) -> dict[str, Any]:
        """State of those that have any, by their place."""
        return {str(k): s.state_dict() for k, s in enumerate(self.shapes) if hasattr(s, "state_dict")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        for k, shape in enumerate(self.shapes):
            if hasattr(shape, "load_state_dict"):
                shape.load_state_dict(state[str(k)])

    def __repr__(self) -> str:
        return " -> ".join(repr(s) for s in self.shapes)


class Overlong:
    """Adds DAPO's soft overlong punishment, whose limit may change during the run: a curriculum of lengths.

    Args:
        max_len: policy tokens at which the whole penalty of -1 is paid.
        buffer: tokens over which it grows.
        weight: of the penalty.
        final_max_len: limit at the end of the run; it moves there linearly.

    Source: Yu et al. 2025 (DAPO, arXiv 2503.14476), eq. 13.
    """

    name = "overlong"

    def __init__(self, max_len: int, buffer: int, weight: float = 1.0, final_max_len: int | None = None) -> None:
        for limit in (max_len, max_len if final_max_len is None else final_max_len):
            if not 0 < buffer <= limit:
                raise ConfigError(f"overlong: buffer must be in (0, {limit}], got {buffer}")
        self.max_len, self.buffer, self.weight, self.final_max_len = max_len, buffer, weight, final_max_len

    def limit(self, progress: Progress | None) -> float:
        """The limit at this point of the run."""
        if progress is None or self.final_max_len is None:
            return float(self.max_len)
        return self.max_len + (self.final_max_len - self.max_len) * progress.fraction

    def __call__(
        self, trajectories: Sequence[Trajectory], scores: Sequence[Score], progress: Progress | None = None
    ) -> list[Score]:
        """Subtract from each valid score what its length costs."""
        from guerdon.rewards.length import OverlongPenalty

        penalties = OverlongPenalty(self.limit(progress), self.buffer)(trajectories)
        return [
            s.with_value(s.value + self.weight * p.value, overlong=p.value) if s.valid else s
            for s, p in zip(scores, penalties, strict=True)
        ]

    def __repr__(self) -> str:
        return f"overlong(max_len={self.max_len}, buffer={self.buffer}, weight={self.weight})"


def as_shape(value: Any) -> Shape | None:
    """A shape from a name, a mapping, a :class:`~guerdon.parts.Part`, a list of these (in order), or a callable.

    Raises:
        ConfigError, UnknownName: it stands for none.
    """
    if value is None:
        return None
    if isinstance(value, list | tuple):
        several = [s for s in map(as_shape, value) if s is not None]
        return Chain(several) if len(several) != 1 else several[0]
    made: Any = build("shape", value)
    if isinstance(made, Part):
        made = ShapeFunction(made)
    if not callable(made):
        raise ConfigError(
            f"a shape maps trajectories and scores to scores, got {type(made).__name__}; see guerdon.shaping"
        )
    return made


def name_of(part: Any) -> str:
    """What a part is called in messages."""
    return str(getattr(part, "name", None) or getattr(part, "__name__", type(part).__name__))
