"""Rewards that hold a model, made from plain settings, so that a YAML file can name them.

reward:
  - {name: embedding_similarity, encoder: minilm, weight: 0.5}
  - {name: judge, model: qwen3-8b, base_url: http://localhost:8000/v1}
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from guerdon.errors import ConfigError
from guerdon.rewards.base import OnError

if TYPE_CHECKING:
    from guerdon.reward_models.judge import JudgeRewardModel
    from guerdon.rewards.relevance import EmbeddingRelevance, RegularizedRelevance
    from guerdon.rewards.token_similarity import BMAS

__all__ = ["bmas", "embedding_similarity", "judge", "regularized_relevance"]

RUBRIC = """\
Grade the response to the question.

Question:
{question}

Response:
{response}

Reply with a score from 0.0 (worthless) to 1.0 (flawless) in steps of 0.1 and nothing else, as <answer>score</answer>."""
"""The default of :func:`judge`: the whole response, no criterion but the question."""


def judge(
    model: str | None = None,
    base_url: str | None = None,
    *,
    template: str = RUBRIC,
    read: Literal["response", "reasoning"] = "response",
    api_key_env: str | None = None,
    max_tokens: int = 64,
    temperature: float = 0.0,
    concurrency: int = 16,
    generate: Callable[..., Any] | None = None,
    name: str | None = None,
    on_error: OnError = "raise",
    **options: Any,
) -> JudgeRewardModel:
    """A language model's score of the response, in [0, 1]; a judgement that fails is an invalid score.

    Args:
        model: name that an OpenAI-compatible endpoint serves.
        base_url: of the endpoint, up to and including ``/v1``.
        template: with places ``{question}`` and ``{response}``.
        read: what the judge sees: the whole response, or its ``<think>`` blocks.
        api_key_env: environment variable that holds the endpoint's key.
        max_tokens, temperature: of the reply.
        concurrency: calls at once.
        generate: from a prompt to a reply, instead of an endpoint.
        name, on_error: see :class:`~guerdon.rewards.Reward`.
        options: further ones of :class:`~guerdon.reward_models.Judge` (``retries``, ``timeout``, ``cache``, ...).

    A blank response gives 0 and is not shown to the judge.

    Raises:
        ConfigError: neither an endpoint nor ``generate``, or both.
    """
    from guerdon.reward_models.judge import JudgeRewardModel, engine_generate, reasoning_of

    if read not in ("response", "reasoning"):
        raise ConfigError(f"read must be 'response' or 'reasoning', got {read!r}")
    if (generate is None) == (model is None or base_url is None):
        raise ConfigError("a judge needs model= and base_url= of an endpoint, or generate=, and not both")
    if generate is None:
        from guerdon.rollout import OpenAIEngine

        engine = OpenAIEngine(str(base_url), str(model), api_key_env=api_key_env)
        generate = engine_generate(engine, max_tokens=max_tokens, temperature=temperature)
    return JudgeRewardModel(
        generate, template, read=reasoning_of if read == "reasoning" else _whole, batched=False, concurrency=concurrency,
        name=name, on_error=on_error, **options,
    )  # fmt: skip


def embedding_similarity(
    encoder: str | Callable[..., Any] = "minilm",
    *,
    to: Literal["reference", "query"] = "reference",
    name: str | None = None,
    on_error: OnError = "raise",
) -> EmbeddingRelevance:
    """Cosine of the embeddings of the response and the reference, in [-1, 1]; a blank response gives 0.

    Args:
        encoder: see :func:`guerdon.policies.load_encoder`; or a function from texts to vectors.
        to: ``"reference"`` (a text), or ``"query"``.
        name, on_error: see :class:`~guerdon.rewards.Reward`.
    """
    from guerdon.rewards.relevance import EmbeddingRelevance

    name = name or "embedding_similarity"
    return EmbeddingRelevance(_encode(encoder), normalise=True, to=to, name=name, on_error=on_error)


def regularized_relevance(
    encoder: str | Callable[..., Any] = "minilm",
    *,
    F: Literal["identity"] | None = "identity",
    unit: float = 100.0,
    n: int = 3,
    name: str | None = None,
    on_error: OnError = "raise",
) -> RegularizedRelevance:
    """Relevance times length incentive times trigram uniqueness (open questions), or relevance to the reference times
    uniqueness (``meta["type"]: closed``); see :class:`~guerdon.rewards.RegularizedRelevance`.

    Args:
        encoder: see :func:`guerdon.policies.load_encoder`; or a function from texts to vectors.
        F: the map of the closed branch; it is fitted in Python, not in YAML.
        unit, n: of the regularisers.
        name, on_error: see :class:`~guerdon.rewards.Reward`.
    """
    from guerdon.rewards.relevance import RegularizedRelevance

    return RegularizedRelevance(_encode(encoder), F=F, unit=unit, n=n, name=name, on_error=on_error)


def bmas(policy: Any = "smollm2", **settings: Any) -> BMAS:
    """Two-way similarity of response and reference by a policy's own input embeddings, in [0, 1]; 0 where a side is empty.

    Args:
        policy: whose embeddings and tokenizer are taken: one, or what :func:`guerdon.policies.load_policy` loads.
        settings: of :class:`~guerdon.rewards.BMAS`.
    """
    from guerdon.rewards.token_similarity import BMAS

    if isinstance(policy, str):
        from guerdon.policies import load_policy

        policy = load_policy(policy)
    return BMAS.from_policy(policy, **settings)


def _whole(text: str) -> str:
    return text


def _encode(encoder: str | Callable[..., Any]) -> Callable[..., Any]:
    return _loaded(encoder) if isinstance(encoder, str) else encoder


@functools.lru_cache(maxsize=4)
def _loaded(ref: str) -> Callable[..., Any]:
    from guerdon.policies import load_encoder

    return load_encoder(ref).encode
