"""Low-rank adapters, by peft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from guerdon.errors import ConfigError

__all__ = ["LoraSpec", "add_lora"]


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """Which low-rank adapters to add.

    Args:
        r: rank.
        alpha: scale; the update is ``alpha / r * B A``.
        dropout: on the adapter's input while training. Keep 0 for online learning, where dropout would make
            the trainer disagree with the sampler.
        targets: module names, or ``"all-linear"``.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | str = "all-linear"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"lora.r must be at least 1, got {self.r}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout must be in [0, 1), got {self.dropout}")
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))


def add_lora(model: Any, spec: LoraSpec, *, seed: int = 0) -> Any:
    """Wrap ``model`` with adapters that start as the identity; only they are trainable."""
    from peft import LoraConfig, get_peft_model

    options: dict[str, Any] = {
        "r": spec.r,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": spec.targets if isinstance(spec.targets, str) else list(spec.targets),
        "task_type": "CAUSAL_LM",
    }
    config = LoraConfig(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(f"lora.targets {spec.targets!r} fits no module of the model: {error}") from error
