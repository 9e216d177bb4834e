"""Losses of scalar reward models: Bradley-Terry on pairs with margins, soft labels and strengths; masked regression.

Pure functions of tensors, one entry per pair. All logarithms of sigmoids are computed as such, so scores may lie any
distance apart. Means are over the number of pairs: strengths are weights, and nothing is divided by their sum.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from guerdon.errors import ConfigError, DataError

__all__ = ["bt_loss", "masked_regression_loss", "preference_loss"]


def preference_loss(
    rc: Tensor,
    rr: Tensor,
    *,
    p: Tensor | float | None = None,
    margin: Tensor | float | None = None,
    weight: Tensor | float | None = None,
) -> Tensor:
    """``-mean w [p log sigmoid(rc - rr - m) + (1 - p) log sigmoid(rr - rc + m)]``.

    Args:
        rc, rr: ``[N]`` scores of chosen and rejected.
        p: probability that "chosen" is the better one, ``[N]`` or a number in [0, 1]; 1 by default, 1/2 for a tie.
        margin: by how much the scores should differ, ``[N]`` or a number; 0 by default, negative ones are allowed.
        weight: of each pair; 1 by default.

    All three are constants: no gradient flows into them. No pairs: 0.

    Source: Wang et al. 2024 (arXiv 2401.06080), which combines soft labels and adaptive margins in this form.
    """
    losses = _pair_losses(rc, rr, p, margin)
    return _mean(losses if weight is None else losses * _constant(weight, losses, "weight"))


def bt_loss(
    r_chosen: Tensor,
    r_rejected: Tensor,
    strength: Tensor | None = None,
    kind: Literal["regular", "margin", "scaled"] = "scaled",
) -> Tensor:
    """Bradley-Terry loss of ``[N]`` pairs that may carry a strength of preference ``m``.

    ``regular``: ``-log sigmoid(rc - rr)``; ``margin``: ``-log sigmoid(rc - rr - m)``; ``scaled``:
    ``-m log sigmoid(rc - rr)``, as if the pair stood there m times. The signed strengths of a data set are turned into
    their size first: the sign only says which response was chosen.

    Args:
        r_chosen, r_rejected: ``[N]`` scores.
        strength: ``[N]``; needed for ``margin``; without it ``scaled`` is ``regular``.
        kind: of the three.

    Raises:
        ConfigError: an unknown kind, or ``margin`` without strengths.

    Source: Wang et al. 2024 (arXiv 2410.01257).
    """
    if kind not in ("regular", "margin", "scaled"):
        raise ConfigError(f"kind must be 'regular', 'margin' or 'scaled', got {kind!r}")
    if kind == "margin" and strength is None:
        raise ConfigError("kind='margin' needs strength=, one per pair")
    size = None if strength is None or kind == "regular" else strength.detach().abs()
    if kind == "margin":
        return preference_loss(r_chosen, r_rejected, margin=size)
    return preference_loss(r_chosen, r_rejected, weight=size)


def masked_regression_loss(pred: Tensor, label: Tensor, ignore: float = -100.0) -> Tensor:
    """Mean squared error over the labels that are there: ``sum mask (f - y)^2 / sum mask``.

    Args:
        pred: ``[N]`` or ``[N, attributes]``.
        label: the same shape; an entry of ``ignore``, or NaN, is no label and is never computed with.

    Raises:
        DataError: no label is there at all.
        ValueError: shapes differ.
    """
    if pred.shape != label.shape:
        raise ValueError(f"predictions {tuple(pred.shape)} and labels {tuple(label.shape)} differ in shape")
    known = (label != ignore) & ~label.isnan()
    if not bool(known.any()):
        raise DataError(f"every label is {ignore} or NaN: there is nothing to fit")
    return ((pred - label.to(pred))[known] ** 2).mean()


def _pair_losses(rc: Tensor, rr: Tensor, p: Tensor | float | None, margin: Tensor | float | None) -> Tensor:
    if rc.ndim != 1 or rc.shape != rr.shape:
        raise ValueError(f"chosen {tuple(rc.shape)} and rejected {tuple(rr.shape)} must be one [N] each")
    gap = rc - rr
    if margin is not None:
        gap = gap - _constant(margin, gap, "margin")
    if p is None:
        return -F.logsigmoid(gap)
    label = _constant(p, gap, "p")
    if not bool(((label >= 0) & (label <= 1)).all()):
        raise ValueError("p must be a probability in [0, 1] everywhere")
    return -(label * F.logsigmoid(gap) + (1 - label) * F.logsigmoid(-gap))


def _constant(value: Tensor | float, like: Tensor, what: str) -> Tensor:
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
    if tensor.ndim and tensor.shape != like.shape:
        raise ValueError(f"{what} {tuple(tensor.shape)} and scores {tuple(like.shape)} differ in shape")
    return tensor.expand_as(like)


def _mean(losses: Tensor) -> Tensor:
    return losses.sum() / max(1, losses.numel())
