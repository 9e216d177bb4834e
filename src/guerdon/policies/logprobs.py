"""Log-probabilities of given tokens, without ever holding a [tokens, vocabulary] matrix.

The trunk runs once; the hidden states that predict a wanted token are gathered first, and head and
log-softmax run over them in chunks that are computed again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from guerdon.errors import ConfigError, EngineError
from guerdon.policies.packing import TokenBatch

if TYPE_CHECKING:
    from guerdon.policies.policy import Policy

__all__ = ["TokenOutputs", "chunked_logprobs", "logits_of", "token_logprobs", "trunk_and_head"]


@dataclass(frozen=True, slots=True)
class TokenOutputs:
    """Per predicted token: log-probability, and where asked for entropy (nats) and value; each ``[N]``, float32."""

    logprobs: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None


def token_logprobs(
    policy: Policy,
    batch: TokenBatch,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    values: bool = False,
    chunk_tokens: int = 0,
) -> TokenOutputs:
    """Score the response tokens of a packed batch.

    Args:
        policy: whose model (and value head) is run, in whatever mode it is in; gradients flow unless disabled.
        batch: from :func:`guerdon.policies.make_batches`, on the policy's device.
        temperature: logits are divided by it before the softmax.
        entropy: also return each distribution's entropy.
        values: also return the value head's output at the state in which each token is chosen.
        chunk_tokens: tokens of one head chunk; 0 chooses so that a chunk holds about 16 million logits.

    Raises:
        ConfigError: temperature is not positive, or values are asked of a policy without value head.
        EngineError: the model cannot run with a tree mask.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature must be positive, got {temperature}")
    if values and policy.value_head is None:
        raise ConfigError(f"policy {policy.name!r} has no value head; load it with value_head=True")
    trunk, head = trunk_and_head(policy.model)
    if len(batch) == 0:
        none = torch.zeros(0, device=batch.input_ids.device)
        return TokenOutputs(none, none if entropy else None, none if values else None)
    hidden = _hidden(policy.model, trunk, batch)
    states = hidden.reshape(-1, hidden.shape[-1])[batch.source]
    logprobs, entropies = chunked_logprobs(
        states, batch.targets, head, temperature=temperature, entropy=entropy, chunk_tokens=chunk_tokens,
        softcap=getattr(policy.model.config, "final_logit_softcapping", None),
        scale=_logit_scale(policy.model.config),
    )
    value = policy.value_head(states).float().squeeze(-1) if values and policy.value_head is not None else None
    return TokenOutputs(logprobs, entropies, value)


def chunked_logprobs(
    states: Tensor,
    targets: Tensor,
    head: nn.Module,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_tokens: int = 0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Log-softmax of ``head(states)`` at ``targets``, in chunks recomputed for the backward pass.

    Args:
        states: ``[N, hidden]``.
        targets: ``[N]`` token ids.
        head: maps hidden states to logits ``[.., vocabulary]``.
        temperature, softcap, scale: ``logits = softcap * tanh(scale * head / softcap) / temperature``.
        entropy: also return entropies.
        chunk_tokens: rows per chunk; 0: about 16 million logits.

    Returns:
        ``[N]`` float32 log-probabilities, and entropies or ``None``.
    """
    vocabulary = int(getattr(head, "out_features", 0)) or 32_768
    size = chunk_tokens or max(1, (1 << 24) // vocabulary)

    def one(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(x).float() * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if temperature != 1.0:
            logits = logits / temperature
        norm = torch.logsumexp(logits, -1)
        chosen = logits.gather(-1, y[:, None]).squeeze(-1) - norm
        if not entropy:
            return chosen, chosen
        # H = log Z - E[logit]; -inf logits have probability 0 and must not make 0 * inf.
        p = (logits - norm[:, None]).exp()
        return chosen, norm - (p * logits.masked_fill(p == 0, 0.0)).sum(-1)

    recompute = torch.is_grad_enabled() and len(targets) > size
    pieces = []
    for start in range(0, len(targets), size):
        part = states[start : start + size], targets[start : start + size]
        pieces.append(checkpoint(one, *part, use_reentrant=False) if recompute else one(*part))
    logprobs = torch.cat([p[0] for p in pieces])
    return logprobs, torch.cat([p[1] for p in pieces]) if entropy else None


def trunk_and_head(model: Any) -> tuple[nn.Module, nn.Module]:
    """The module that yields hidden states and the one that maps them to logits, through any LoRA wrapper.

    Raises:
        EngineError: the model is no causal language model with an output head.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    trunk = getattr(base, getattr(base, "base_model_prefix", "model"), None)
    if head is None or trunk is None or trunk is base:
        raise EngineError(f"{type(base).__name__} has no separate trunk and output head; use a causal language model")
    return trunk, head


def logits_of(model: Any, states: Tensor) -> Tensor:
    """Next-token logits ``[N, vocabulary]``, float32, of hidden states ``[N, hidden]``, as the model itself would give."""
    _, head = trunk_and_head(model)
    logits = head(states).float() * _logit_scale(model.config)
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _hidden(model: Any, trunk: nn.Module, batch: TokenBatch) -> Tensor:
    mask = batch.attention_mask
    if mask is not None and getattr(model.config, "sliding_window", None) and getattr(model.config, "use_sliding_window", True):
        raise EngineError("a sliding-window model cannot share prompts in one row; use share_prompt=False")
    dtype = next(trunk.parameters()).dtype
    if mask is not None:
        # Additive masks are what every attention implementation accepts.
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
    out = trunk(
        input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
    )
    return out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]


def _logit_scale(config: Any) -> float:
    if getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)
    return float(getattr(config, "logit_scale", None) or 1.0)
