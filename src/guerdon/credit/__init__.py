"""From scores to advantages: pure functions on torch tensors."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "GroupStatistics": "groups",
    "MARKERS": "episodes",
    "accuracy_filter": "channels",
    "best_of_k_value": "prover",
    "best_trace": "regret",
    "broadcast_outcome": "temporal",
    "cumulative_regret": "regret",
    "effective_reward": "prover",
    "episode_offsets": "episodes",
    "exact_redistribution": "redistribution",
    "fuse": "redistribution",
    "gae": "temporal",
    "group_relative": "groups",
    "group_statistics": "groups",
    "implicit_rewards": "implicit",
    "leave_one_out": "groups",
    "length_baseline": "minform",
    "merge_episodes": "episodes",
    "min_form_returns": "minform",
    "normalize_by_max_return": "channels",
    "normalized_regret": "regret",
    "pairwise_accuracy": "channels",
    "per_channel": "outcome",
    "place_on_turn_ends": "redistribution",
    "place_outcome": "temporal",
    "predicted_correct": "minform",
    "prefix_values": "implicit",
    "process_relative": "stepwise",
    "progress": "prover",
    "progress_bonus": "regret",
    "progress_weights": "prover",
    "prover_terms": "prover",
    "pure_advantage": "minform",
    "redistribute": "redistribution",
    "reduce_steps": "implicit",
    "reinforce": "outcome",
    "reinforce_plus_plus": "stepwise",
    "returns": "temporal",
    "returns_relative": "step_returns",
    "returns_to_go": "step_returns",
    "rloo_with_process": "channels",
    "soft_expectation": "implicit",
    "softmin_rewards": "minform",
    "split_episodes": "episodes",
    "step_leave_one_out": "stepwise",
    "sum_form_returns": "minform",
    "termination_relative": "regret",
    "to_token_rewards": "step_returns",
    "turn_ends": "redistribution",
    "uniform_redistribution": "redistribution",
    "whiten": "temporal",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.credit.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.credit' has no attribute {name!r}")
