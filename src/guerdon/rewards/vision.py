"""Boxes: how much a predicted box, or set of boxes, overlaps the gold.

Source: Xu et al. 2025, "Mixed-R1" (arXiv 2505.24164), grounding reward.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from guerdon.errors import ConfigError, DataError
from guerdon.rewards.base import OnError
from guerdon.rewards.grammar import fenced
from guerdon.rewards.referenced import AnswerReward

__all__ = ["BoxIoU", "box_iou", "read_boxes"]

_MOST = 256
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def box_iou(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> np.ndarray:
    """Intersection over union of boxes ``[x1, y1, x2, y2]``: ``[n, m]`` float64, 0 for boxes without area."""
    x, y = np.asarray(a, dtype=np.float64).reshape(-1, 4), np.asarray(b, dtype=np.float64).reshape(-1, 4)
    low = np.maximum(x[:, None, :2], y[None, :, :2])
    high = np.minimum(x[:, None, 2:], y[None, :, 2:])
    good_x, good_y = (np.asarray((z[:, 2:] > z[:, :2]).all(-1)) for z in (x, y))
    good = good_x[:, None] & good_y[None]
    # A box may be too large for its area to be a number: it then overlaps the other by nothing.
    with np.errstate(over="ignore", invalid="ignore"):
        common = np.clip(high - low, 0, None).prod(-1)
        area_x, area_y = ((z[:, 2:] - z[:, :2]).prod(-1) for z in (x, y))
        union = area_x[:, None] + area_y[None] - common
    return np.where(good & (union > 0), common / np.where(union > 0, union, 1.0), 0.0)


def read_boxes(value: Any) -> list[list[float]] | None:
    """Boxes in a text or value: ``{"bbox_2d": [...]}``, lists of four numbers, lists of these, or bare numbers.

    Returns:
        At least one box of four finite numbers (not necessarily with an area), or None where none can be read.
    """
    if isinstance(value, str):
        block = fenced(value, "json")
        text = block[-1] if block else value
        try:
            return read_boxes(json.loads(text))
        except (ValueError, RecursionError):
            numbers = [float(n) for n in _NUMBER.findall(text.replace("bbox_2d", ""))]
            return _group(numbers)
    if isinstance(value, Mapping):
        for key in ("bbox_2d", "bbox", "box", "boxes"):
            if key in value:
                return read_boxes(value[key])
        return None
    if isinstance(value, Sequence | np.ndarray):
        items = list(value)
        if items and all(isinstance(v, int | float | np.number) and not isinstance(v, bool) for v in items):
            return _group([float(v) for v in items])
        out: list[list[float]] = []
        for item in items[: _MOST + 1]:
            made = read_boxes(item) if not isinstance(item, str) else None
            if made is None:
                return None
            out += made
        return out or None
    return None


def _group(numbers: list[float]) -> list[list[float]] | None:
    if not numbers or len(numbers) % 4 or len(numbers) > 4 * _MOST or not all(map(math.isfinite, numbers)):
        return None
    return [numbers[k : k + 4] for k in range(0, len(numbers), 4)]


class BoxIoU(AnswerReward):
    """Intersection over union of predicted and gold boxes, in [0, 1].

    Several boxes: the best one-to-one matching, its values summed, over the larger number of boxes. Both sides must be in
    one frame (pixels, or normalised); nothing is converted.

    Args:
        threshold: count a pair as 1 from this IoU on and else 0, instead of its IoU.

    ``iou(texts, golds)`` on plain lists. A prediction that cannot be read, or a box whose right edge is not right of its
    left one, gets 0; such a gold is an error.
    """

    def __init__(
        self,
        threshold: float | None = None,
        *,
        tag: str | None = "answer",
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(tag=tag, name=name, on_error=on_error)
        if threshold is not None and not 0 < threshold <= 1:
            raise ConfigError(f"threshold must be in (0, 1] or None, got {threshold!r}")
        self.threshold = threshold

    def score_answer(self, answer: str, reference: Any, meta: Mapping[str, Any]) -> float:
        gold = read_boxes(reference)
        if gold is None or any(not (b[2] > b[0] and b[3] > b[1]) for b in gold):
            raise DataError(f"the gold is no box [x1, y1, x2, y2] with an area: {str(reference)[:80]}")
        found = read_boxes(answer)
        if found is None:
            return 0.0
        values = box_iou(found, gold)
        if self.threshold is not None:
            values = (values >= self.threshold).astype(np.float64)
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(values, maximize=True)
        return float(values[rows, columns].sum() / max(len(found), len(gold)))
