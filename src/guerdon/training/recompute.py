"""Gradient checkpointing of a policy in evaluation mode: only the layers' activations are recomputed, nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from guerdon.errors import ConfigError

__all__ = ["recomputing"]


@contextmanager
def recomputing(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Within it, forward passes with gradients keep each layer's input only.

    Transformers' layers checkpoint themselves in training mode; here only their own flag is in that mode, so that
    dropout stays off and the log-probabilities are those of the sampler.

    Raises:
        ConfigError: the model has no layers that can do it.
    """
    if not wanted:
        yield
        return
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "gradient_checkpointing") and not _holds(m)]
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no layers for gradient_checkpointing; leave it out")
    before = [(layer.gradient_checkpointing, layer.training) for layer in layers]
    for layer in layers:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing, layer.training = True, True
    try:
        yield
    finally:
        for layer, (enabled, training) in zip(layers, before, strict=True):
            layer.gradient_checkpointing, layer.training = enabled, training


def _holds(module: nn.Module) -> bool:
    """Whether a module contains another that checkpoints: then it is a whole model and no layer."""
    return any(m is not module and hasattr(m, "gradient_checkpointing") for m in module.modules())
