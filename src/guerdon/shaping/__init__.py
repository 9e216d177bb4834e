"""From scores to scores: combiners, normalisers, annealing."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "AllGood": "log_sigmoid",
    "AllGoodScores": "scores",
    "CalibrateLow": "noise",
    "Compose": "steps",
    "Fallback": "noise",
    "FlipScores": "noise",
    "GroupFlip": "noise",
    "LogSigmoidCentered": "log_sigmoid",
    "PreferenceAsReward": "shapers",
    "ProgressShape": "progress_bonus",
    "ProgressShapedReward": "progress_bonus",
    "R3Filter": "reflection",
    "ReasoningReflection": "reflection",
    "RewardCombiner": "log_sigmoid",
    "RewardShaper": "shapers",
    "RewardTransform": "log_sigmoid",
    "RunningPercentileCost": "percentile",
    "RunningShaper": "running",
    "ShapeScores": "scores",
    "StepClip": "steps",
    "StepDelta": "steps",
    "StepNormalise": "steps",
    "TrustBatch": "trust",
    "TrustCombine": "trust",
    "TrustScores": "trust",
    "affine": "combine",
    "all_good": "log_sigmoid",
    "best_of_k_kl": "log_sigmoid",
    "calibrate_low": "noise",
    "centred": "relative",
    "choose_eta": "steps",
    "clip": "combine",
    "clip_steps": "steps",
    "condition": "combine",
    "delta_steps": "steps",
    "fallback": "noise",
    "flip": "noise",
    "gate": "combine",
    "hierarchical": "combine",
    "linear_anneal": "combine",
    "log_sigmoid_centred": "log_sigmoid",
    "normalise_steps": "steps",
    "outcome_length_reward": "reflection",
    "par": "scores",
    "penalise_length": "shapers",
    "preference_probability": "relative",
    "product": "combine",
    "quantile_rescale": "combine",
    "reference_rewards": "scores",
    "reflection_weights": "reflection",
    "shape": "shapers",
    "shaped": "scores",
    "shaper": "shapers",
    "signed_geometric_mean": "combine",
    "split_steps": "steps",
    "trust_weight": "trust",
    "warm_up": "noise",
    "weighted_sum": "combine",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.shaping.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.shaping' has no attribute {name!r}")
