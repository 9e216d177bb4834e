"""Rule rewards: a trajectory in, a Score out, no weights of their own."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Block": "grammar",
    "BoxedFormat": "surrogate",
    "BoxedMatch": "surrogate",
    "CallCost": "cost",
    "CodeTests": "code",
    "ExactMatch": "answer",
    "ExecutionMatch": "sql",
    "FunctionReward": "base",
    "GatedSum": "surrogate",
    "Grounding": "grounding",
    "HumpLength": "length",
    "LinearLength": "length",
    "MATH_PHRASES": "reasoning_pattern",
    "NgramOverlap": "sql",
    "OPEN_PHRASES": "reasoning_pattern",
    "OnlyIf": "sql",
    "OverlongPenalty": "length",
    "PhraseReward": "reasoning_pattern",
    "Progress": "base",
    "Reward": "base",
    "RewardBatch": "plain",
    "RouterFormat": "format",
    "SQLExecutor": "sql",
    "SQLFormat": "sql",
    "SQLSyntax": "sql",
    "SchemaOverlap": "sql",
    "TagFormat": "format",
    "TargetLength": "length",
    "TestSuite": "code",
    "TextReward": "plain",
    "ThinkAnswer": "reasoning_pattern",
    "TokenF1": "answer",
    "TypedOutcome": "typed_outcome",
    "Weighted": "base",
    "WeightedSum": "sql",
    "as_reward": "base",
    "blocks": "grammar",
    "boxed": "grammar",
    "extract_answer": "surrogate",
    "extract_code": "code",
    "extract_sql": "sql",
    "fenced": "grammar",
    "format_length": "surrogate",
    "gated_sum": "surrogate",
    "grounding_signal": "grounding",
    "hump_length": "length",
    "is_expression": "expression",
    "json_lines": "grammar",
    "last_block": "grammar",
    "linear_length": "length",
    "normalise_answer": "answer",
    "normalise_expression": "expression",
    "overlong_penalty": "length",
    "policy_length": "length",
    "reasoning_sql": "sql",
    "reward_values": "base",
    "rouge": "overlap",
    "same_answer": "expression",
    "think_answer": "reasoning_pattern",
    "think_then_answer": "typed_outcome",
    "word_error_rate": "overlap",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.rewards.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.rewards' has no attribute {name!r}")
