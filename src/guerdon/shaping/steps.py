"""Transforms of step scores that bound what a process reward can pay in all: Clip, Delta, and both.

A sum of step scores grows with the number of steps, so a policy earns it by adding steps that are right and useless.
Clip only punishes; Delta pays differences, which telescope. Steps lie in a ``[B, K]`` grid; what the mask leaves out is
never read, and gets 0.

Source: Gao et al. 2024, "On Designing Effective RL Reward at Training Time for LLM Reasoning" (arXiv 2410.15115).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from guerdon.errors import ConfigError
from guerdon.types import Segmenter

__all__ = [
    "Compose",
    "StepClip",
    "StepDelta",
    "StepNormalise",
    "choose_eta",
    "clip_steps",
    "delta_steps",
    "normalise_steps",
    "split_steps",
    "splitter_segmenter",
]


def clip_steps(scores: Any, mask: Any = None, *, eta: float) -> Tensor:
    """``min(score - eta, 0)``: a step that scores ``eta`` or more gets 0, a worse one pays what it lacks.

    Args:
        scores: ``[B, K]`` in [0, 1]. NaN counts as ``eta``, which is neutral; anything outside the mask.
        mask: ``[B, K]`` True on steps; all by default.
        eta: in (0, 1).

    Returns:
        ``[B, K]`` in [-eta, 0], 0 outside the mask.

    Raises:
        ConfigError: eta outside (0, 1).
        ValueError: a score outside [0, 1], or shapes that differ.
    """
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not 0 < eta < 1:
        raise ConfigError(f"eta must be strictly between 0 and 1, got {eta!r}")
    scores_BK, mask_BK = _grid(scores, mask)
    known = torch.where(mask_BK & ~torch.isnan(scores_BK), scores_BK, eta)
    if bool(((known < 0) | (known > 1)).any()):
        raise ValueError("step scores must lie in [0, 1]: they are probabilities that a step is right")
    return (known - eta).clamp(max=0.0)


def delta_steps(scores: Any, mask: Any = None) -> Tensor:
    """A step's score minus that of the step behind it; the last but one keeps its score, the last gets 0.

    Summed from a step to the end this is the step's own score, whatever follows, and the whole is the first score. The
    last step, which states the answer, is left to the success reward; with one step alone nothing is left.

    Args:
        scores: ``[B, K]``; anything outside the mask.
        mask: ``[B, K]`` True on steps; all by default. A step's neighbour is the next one inside the mask.

    Returns:
        ``[B, K]``, 0 outside the mask.

    Raises:
        ValueError: a NaN inside the mask, or shapes that differ.
    """
    scores_BK, mask_BK = _grid(scores, mask)
    if bool(torch.isnan(scores_BK[mask_BK]).any()):
        raise ValueError("a step score is NaN; put a neutral value in its place first (StepClip takes NaN as eta)")
    kept = torch.where(mask_BK, scores_BK, 0.0)
    out = torch.zeros_like(kept)
    behind = torch.zeros_like(kept[:, 0]) if kept.shape[1] else kept.new_zeros(len(kept))
    is_last = torch.ones_like(behind, dtype=torch.bool)
    for k in range(kept.shape[1] - 1, -1, -1):
        step = mask_BK[:, k]
        # The last step is worth 0 and nothing is subtracted for it from the one before.
        out[:, k] = torch.where(step & ~is_last, kept[:, k] - behind, 0.0)
        behind = torch.where(step & ~is_last, kept[:, k], behind)
        is_last = is_last & ~step
    return out


def normalise_steps(scores: Any, mask: Any = None, *, eps: float = 1e-6) -> Tensor:
    """Step scores minus their mean, over their (unbiased) standard deviation, over all steps of the batch.

    Equal scores, or a single one, give 0. The paper leaves open whether batch or group is meant; this is the batch. Of
    itself this prevents no hacking: fillers that score above the mean still pay.
    """
    scores_BK, mask_BK = _grid(scores, mask)
    kept = scores_BK[mask_BK].double()
    if bool(torch.isnan(kept).any()):
        raise ValueError("a step score is NaN; put a neutral value in its place first")
    out = torch.zeros_like(scores_BK)
    if len(kept) > 1 and bool(kept.max() > kept.min()):
        out[mask_BK] = ((kept - kept.mean()) / (kept.std() + eps)).to(out.dtype)
    return out


def choose_eta(scores: Any, mask: Any = None, *, quantile: float = 0.4) -> float:
    """The threshold for :class:`StepClip` from the step scores of the initial policy.

    At the 30 to 50% quantile most of its steps get 0 and its worse ones a penalty. Held within [0.01, 0.99].
    """
    if not 0 < quantile < 1:
        raise ConfigError(f"quantile must be strictly between 0 and 1, got {quantile}")
    scores_BK, mask_BK = _grid(scores, mask)
    kept = scores_BK[mask_BK]
    kept = kept[~torch.isnan(kept)].double()
    if not len(kept):
        raise ValueError("there are no step scores to choose eta from")
    return min(max(float(torch.quantile(kept, quantile)), 0.01), 0.99)


class StepClip:
    """:func:`clip_steps` as a transform.

    Attributes:
        missing: how many NaN were taken as ``eta`` so far.
    """

    def __init__(self, eta: float) -> None:
        clip_steps(torch.zeros(0, 0), eta=eta)
        self.eta = float(eta)
        self.missing = 0

    def __call__(self, scores: Any, mask: Any = None) -> Tensor:
        """``[B, K]`` to ``[B, K]``."""
        scores_BK, mask_BK = _grid(scores, mask)
        out = clip_steps(scores_BK, mask_BK, eta=self.eta)
        self.missing += int(torch.isnan(scores_BK[mask_BK]).sum())
        return out


class StepDelta:
    """:func:`delta_steps` as a transform."""

    def __call__(self, scores: Any, mask: Any = None) -> Tensor:
        """``[B, K]`` to ``[B, K]``."""
        return delta_steps(scores, mask)


class StepNormalise:
    """:func:`normalise_steps` as a transform."""

    def __call__(self, scores: Any, mask: Any = None) -> Tensor:
        """``[B, K]`` to ``[B, K]``."""
        return normalise_steps(scores, mask)


class Compose:
    """Transforms one after the other: ``Compose(StepClip(0.5), StepDelta())`` is what the paper recommends.

    Raises:
        ConfigError: a Clip behind a Delta, whose differences it would take for scores.
    """

    def __init__(self, *transforms: Callable[[Any, Any], Any]) -> None:
        kinds = [isinstance(t, StepDelta) - isinstance(t, StepClip) for t in transforms]
        if 1 in kinds and -1 in kinds[kinds.index(1) :]:
            raise ConfigError("StepClip reads scores, not differences: put it before StepDelta")
        self.transforms = tuple(transforms)

    def __call__(self, scores: Any, mask: Any = None) -> Tensor:
        """``[B, K]`` to ``[B, K]``."""
        scores_BK, mask_BK = _grid(scores, mask)
        for transform in self.transforms:
            scores_BK = transform(scores_BK, mask_BK)
        return torch.where(mask_BK, scores_BK, 0.0)


def splitter_segmenter(splitter: str = "\n") -> Segmenter:
    """Cuts steps behind every run of ``splitter`` (``"\\n"``, ``"\\n\\n"``, or a model's step tag)."""
    if not splitter:
        raise ConfigError("splitter must not be empty")
    return Segmenter("regex", pattern=f"(?:{re.escape(splitter)})+")


def split_steps(text: str, splitter: str = "\n") -> list[tuple[int, int]]:
    """Where the steps of a text lie, ``(start, end)`` in characters, half-open.

    A separator belongs to the step that it ends. A blank piece joins the step before it, or the first step where it
    stands at the beginning; a blank text has no steps.
    """
    segmenter = splitter_segmenter(splitter)
    return list(pairwise([0, *segmenter.offsets(text)])) if text.strip() else []


def _grid(scores: Any, mask: Any) -> tuple[Tensor, Tensor]:
    scores_BK = scores if isinstance(scores, Tensor) else _tensor(scores)
    if not scores_BK.is_floating_point():
        scores_BK = scores_BK.double()
    mask_BK = torch.ones_like(scores_BK, dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool()
    if scores_BK.ndim != 2 or scores_BK.shape != mask_BK.shape:
        raise ValueError(f"scores {tuple(scores_BK.shape)} and mask {tuple(mask_BK.shape)} must have one shape [B, K]")
    return scores_BK, mask_BK


def _tensor(values: Sequence[Any]) -> Tensor:
    return torch.as_tensor(values) if hasattr(values, "dtype") else torch.tensor(values, dtype=torch.float64)
