"""Losses of a critic, per token."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["value_clip_loss"]


def value_clip_loss(values: Tensor, old_values: Tensor, targets: Tensor, clip: float | None = None) -> Tensor:
    """Half the squared error; with ``clip``, the larger of it and that of the value held near the old one.

    Args:
        values: of the critic being trained.
        old_values: at sampling time; read only with ``clip``.
        targets: returns.
        clip: largest change of a value that is not punished; ``None`` for the plain loss.

    Returns:
        Loss of the same shape.

    Source: Schulman et al. 2017; Router-R1 uses a value clip of 0.5.
    """
    targets = targets.detach()
    error = (values - targets) ** 2
    if clip is not None:
        if not clip > 0:
            raise ValueError(f"clip must be positive, got {clip}")
        old_values = old_values.detach()
        held = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (held - targets) ** 2)
    return 0.5 * error
