"""The loss of one micro-batch: objective terms over streams, each already weighted by its own token count."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from guerdon.errors import ConfigError
from guerdon.objectives import kl_k1, kl_k2, kl_k3, sequence_log_ratio, value_clip_loss
from guerdon.parts import Part, build

if TYPE_CHECKING:
    from guerdon.training.config import OnlineConfig

__all__ = ["KL", "Objective", "Slice", "policy_terms", "value_term"]

KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


@dataclass(frozen=True, slots=True)
class Slice:
    """Streams of the n tokens of one micro-batch; weights are normalised over the whole minibatch.

    Args:
        old, advantage, sampled: [n].
        policy, entropy, kl, value: [n] weights of the terms; None where a term is off.
        reference, target, values: [n]; None where the term that reads them is off.
        sequence: [n] which trajectory a token belongs to; None where the objective does not ask.
    """

    old: Tensor
    advantage: Tensor
    sampled: Tensor
    policy: Tensor
    entropy: Tensor | None = None
    kl: Tensor | None = None
    value: Tensor | None = None
    reference: Tensor | None = None
    target: Tensor | None = None
    values: Tensor | None = None
    sequence: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """The loss per token, with its settings and what it reads beside the three streams that all objectives read.

    Args:
        function: ``(logprobs, old_logprobs, advantages, **settings)`` to [n].
        settings: keyword arguments.
        reads: of ``sequence_ids``, ``mask``, ``sampling_logprobs`` and ``reference_logprobs``.
    """

    function: Callable[..., Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    reads: frozenset[str] = frozenset()

    EXTRAS = ("sequence_ids", "mask", "sampling_logprobs", "reference_logprobs")

    @classmethod
    def of(cls, config: OnlineConfig, given: Any = None) -> Objective:
        """The objective of a configuration, or a callable ``given`` in its place.

        Raises:
            ConfigError: it cannot be called.
        """
        part = build("objective", given if given is not None else config.objective or "ppo_clip")
        function = part.function if isinstance(part, Part) else part
        if not callable(function):
            raise ConfigError(
                f"an objective maps (logprobs, old_logprobs, advantages) to a loss per token, got {type(part).__name__}"
            )
        settings = dict(part.settings) if isinstance(part, Part) else {}
        known = inspect.signature(function).parameters
        plain = part.name == "ppo_clip" and not settings if isinstance(part, Part) else False
        for name in ("clip_low", "clip_high"):
            # The configuration's own defaults are those of ppo_clip; another objective has its own.
            if name in known and name not in settings and (plain or name in config.model_fields_set):
                settings[name] = getattr(config, name)
        return cls(function, settings, frozenset(cls.EXTRAS) & known.keys())

    def __call__(self, logprobs: Tensor, part: Slice, learned: Tensor) -> Tensor:
        """[n] loss of these tokens."""
        have = {
            "sequence_ids": part.sequence,
            "mask": learned,
            "sampling_logprobs": part.sampled,
            "reference_logprobs": part.reference,
        }
        loss = self.function(
            logprobs, part.old, part.advantage, **self.settings, **{name: have[name] for name in self.reads}
        )
        if loss.shape != logprobs.shape:
            raise ConfigError(
                f"the objective returned a loss of shape {tuple(loss.shape)} for {len(logprobs)} tokens; "
                "return one per token, unreduced"
            )
        return loss

    def clipped(self, change: Tensor, part: Slice, learned: Tensor) -> Tensor:
        """[n] bool, tokens whose gradient the clip has taken; ``change`` is their log-ratio."""
        low, high = (self._default(name) for name in ("clip_low", "clip_high"))
        if low is None:
            return torch.zeros_like(learned)
        if "sequence_ids" in self.reads and part.sequence is not None:
            change = sequence_log_ratio(change, torch.zeros_like(change), part.sequence, learned)
        ratio = change.exp()
        up = (ratio > 1 + (low if high is None else high)) & (part.advantage > 0)
        return (up | ((ratio < 1 - low) & (part.advantage < 0))) & learned

    def _default(self, name: str) -> float | None:
        if name in self.settings:
            return self.settings[name]
        found = inspect.signature(self.function).parameters.get(name)
        return None if found is None or found.default is found.empty else found.default


def policy_terms(
    logprobs: Tensor,
    entropy: Tensor | None,
    part: Slice,
    config: OnlineConfig,
    entropy_coef: float,
    objective: Objective | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss, minus the entropy bonus, plus the KL penalty.

    Args:
        logprobs, entropy: [n] of the policy being trained; entropy only where its coefficient is positive.
        part: the streams of these tokens.
        config: KL.
        entropy_coef: at this step.
        objective: the policy loss; default: the configuration's.

    Returns:
        The scalar loss of these tokens, and detached scalars that add up over micro-batches. Those under
        ``n/`` are plain sums over tokens.
    """
    learned = part.policy != 0
    # Where nothing is learned the ratio is made 1: an infinite one times a weight of 0 would be NaN.
    objective = objective or Objective.of(config)
    term = objective(torch.where(learned, logprobs, part.old), part, learned)
    policy_loss = (part.policy * term).sum()
    loss = policy_loss
    stats = {"loss/policy": policy_loss.detach()}
    if entropy is not None and part.entropy is not None:
        mean = (part.entropy * entropy.float()).sum()
        loss = loss - entropy_coef * mean
        stats["entropy/bonus"] = mean.detach()
    if part.reference is not None and part.kl is not None:
        mean = (part.kl * KL[config.kl_kind](logprobs, part.reference)).sum()
        loss = loss + config.kl_coef * mean
        stats["kl"] = mean.detach()
    with torch.no_grad():
        change = torch.where(learned, logprobs - part.old, 0.0)
        ratio = change.exp()
        stats["n/tokens"] = learned.sum()
        stats["n/clipped"] = objective.clipped(change, part, learned).sum()
        stats["n/kl_old"] = (ratio - 1 - change).sum()
    return loss, stats


def value_term(values: Tensor, part: Slice, config: OnlineConfig) -> Tensor:
    """Value loss of these tokens: squared error, clipped around the values at sampling; a scalar.

    Source: Schulman et al. 2017; PPO implementations clip the value as they clip the ratio.
    """
    assert part.value is not None and part.target is not None and part.values is not None
    return (part.value * value_clip_loss(values, part.values, part.target, config.value_clip)).sum()
