"""Search at test time, and the values of prefixes that process labels are made from."""

from __future__ import annotations

import importlib
from typing import Any

_HOME: dict[str, str] = {
    "AnswerSampler": "meta_prover",
    "Beam": "beam",
    "BeamResult": "beam",
    "CLOSE_SUFFIX": "meta_prover",
    "Edge": "prefix_tree",
    "EffectiveReward": "beam",
    "EngineSampler": "prefixes",
    "Estimate": "prefix_values",
    "FORCE_SUFFIX": "meta_prover",
    "MetaProver": "meta_prover",
    "Node": "prefix_tree",
    "Prefix": "prefixes",
    "PrefixTree": "prefix_tree",
    "PrefixValues": "prefix_values",
    "beam_search": "beam",
    "beam_searches": "beam",
    "locate_first_error": "first_error",
    "mc_values": "prefix_values",
    "prefixes_of": "prefixes",
    "step_estimates": "prefix_values",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.search.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.search' has no attribute {name!r}")
