"""The engine that samples a policy, by the name that the settings give it."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from guerdon.policies import Policy

__all__ = ["make_engine"]


def make_engine(policy: Policy, *, kind: Literal["transformers", "vllm"] = "transformers", **options: Any) -> Any:
    """Build it.

    Args:
        policy: sampled from.
        kind: ``"transformers"`` samples the policy's own weights in this process. ``"vllm"`` keeps a copy on the GPU,
            which a trainer brings up to date after every update.
        options: of the engine.

    Raises:
        MissingDependency: vLLM is not installed.
    """
    if kind == "transformers":
        from guerdon.rollout import TransformersEngine

        return TransformersEngine(policy, **options)
    from guerdon.rollout import VllmEngine

    with tempfile.TemporaryDirectory(prefix="guerdon-vllm-") as folder:
        merged = policy.merged()
        merged.model.save_pretrained(folder)
        merged.tokenizer.save_pretrained(folder)
        return VllmEngine(
            folder, tokenizer=policy.tokenizer, max_context=options.pop("max_context", policy.max_context), **options
        )
