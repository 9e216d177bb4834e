"""Language models as policies: loading, adapters, heads, log-probabilities."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "ATOMS": "tiny",
    "Encoder": "encoder",
    "LoraSpec": "lora",
    "Policy": "policy",
    "TokenBatch": "packing",
    "TokenOutputs": "logprobs",
    "ValueHead": "heads",
    "chunked_logprobs": "logprobs",
    "load_encoder": "encoder",
    "load_policy": "store",
    "make_batches": "packing",
    "tiny_policy": "tiny",
    "token_logprobs": "logprobs",
    "train_bpe": "tiny",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.policies.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.policies' has no attribute {name!r}")
