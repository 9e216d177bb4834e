"""From advantages to losses: pure functions on torch tensors."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "cispo": "policy_gradient",
    "entropy_bonus": "reduce",
    "gspo": "sequence",
    "implicit_ce": "implicit",
    "implicit_dpo": "implicit",
    "implicit_kto": "implicit",
    "implicit_nca": "implicit",
    "kl_estimate": "kl",
    "kl_k1": "kl",
    "kl_k2": "kl",
    "kl_k3": "kl",
    "kl_penalised_rewards": "kl",
    "log_ratio": "policy_gradient",
    "masked_mean": "reduce",
    "ppo_clip": "policy_gradient",
    "reinforce": "policy_gradient",
    "sequence_log_ratio": "sequence",
    "sequence_mean_token_mean": "reduce",
    "sequence_mean_token_sum_norm": "reduce",
    "truncated_importance_weight": "policy_gradient",
    "value_clip_loss": "value",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.objectives.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.objectives' has no attribute {name!r}")
