"""Learned scorers with ``fit`` and ``score``: preference models, judges, process and implicit rewards."""

from __future__ import annotations

import importlib
from typing import Any

_HOME: dict[str, str] = {
    "BradleyTerry": "bradley_terry",
    "EncoderFeatures": "trunks",
    "FeatureTrunk": "trunks",
    "FitReport": "implicit",
    "FitSettings": "progress_estimator",
    "GruTrunk": "trunks",
    "ImplicitPRM": "implicit",
    "Judge": "judge",
    "JudgeRewardModel": "judge",
    "ModelReward": "model_reward",
    "PAPER_FIT": "progress_estimator",
    "PolicyTrunk": "trunks",
    "Preference": "scalar",
    "PrimeReward": "prime",
    "ProcessAdvantageVerifier": "advantage_verifier",
    "ProcessReward": "process_reward",
    "ProgressEstimator": "progress_estimator",
    "ProgressReward": "progress_reward",
    "QueryTypeClassifier": "query_types",
    "Reflection": "reflection",
    "ReflectionReward": "reflection",
    "SQL_RUBRIC": "sql_judge",
    "ScalarRewardModel": "scalar",
    "SentencePairs": "hashed_text",
    "SqlJudge": "sql_judge",
    "StepClassifier": "step_heads",
    "StepReward": "steps",
    "StepRewards": "process_reward",
    "StepScorer": "steps",
    "StepValue": "step_heads",
    "StyleDiscriminator": "style",
    "THINKING_RUBRIC": "judge",
    "TurnReward": "progress_reward",
    "Verdict": "judge",
    "auc": "style",
    "balanced_bins": "balance",
    "bmas": "named",
    "bt_loss": "pair_losses",
    "embedding_similarity": "named",
    "engine_generate": "judge",
    "first_error": "ranking",
    "fit_threshold": "ranking",
    "implicit_rewards": "implicit",
    "masked_regression_loss": "pair_losses",
    "parse_query_type": "query_types",
    "parse_sql_score": "sql_judge",
    "parse_unit_score": "judge",
    "pick_best": "ranking",
    "preference_loss": "pair_losses",
    "process_f1": "ranking",
    "query_type": "query_types",
    "reasoning_of": "judge",
    "reference_logprobs": "reflection",
    "regularized_relevance": "named",
    "score_reference": "reflection",
    "score_references": "reflection",
    "weighted_vote": "ranking",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.reward_models.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.reward_models' has no attribute {name!r}")
