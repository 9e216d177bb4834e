"""Log-probabilities of given tokens, without ever holding a [tokens, vocabulary] matrix.

The trunk runs once; the hidden states that predict a wanted token are gathered first, and head and
log-softmax run over them in chunks that are computed again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from guerdon.errors import ConfigError, DataError, EngineError
from guerdon.policies.direct import DirectTrunk, direct_trunk, grouped_sdpa, is_plain
from guerdon.policies.packing import TokenBatch
from guerdon.policies.probe import Sharing, check_head, sharing
from guerdon.policies.products import linear, matmul
from guerdon.policies.tree import attending

if TYPE_CHECKING:
    from guerdon.policies.policy import Policy

__all__ = ["TokenOutputs", "chunked_logprobs", "logits_of", "token_logprobs", "trunk_and_head"]

_CHUNK_LOGITS = 1 << 23


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
        chunk_tokens: tokens of one head chunk; 0 chooses so that a chunk holds about 8 million logits.

    Raises:
        ConfigError: temperature is not positive, or values are asked of a policy without value head.
        DataError: a prompt with its response is longer than the policy's context.
        EngineError: the model cannot put several responses in one row, or has no plain output head.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature must be positive, got {temperature}")
    if chunk_tokens < 0:
        raise ConfigError(f"chunk_tokens must be at least 1, or 0 to choose, got {chunk_tokens}")
    if values and policy.value_head is None:
        raise ConfigError(f"policy {policy.name!r} has no value head; load it with value_head=True")
    if batch.context > policy.max_context:
        raise DataError(
            f"a prompt with its response has {batch.context} tokens, more than the {policy.max_context} "
            f"that {policy.name!r} takes; drop or shorten it"
        )
    base = _base(policy.model)
    _, head = trunk_and_head(policy.model)
    if len(batch) == 0:
        none = torch.zeros(0, device=batch.input_ids.device)
        return TokenOutputs(none, none if entropy else None, none if values else None)
    check_head(base, lambda states: logits_of(base, states), lambda ids: _last(_trunk(base)(input_ids=ids)))
    way: Sharing = "mask" if batch.tree is None else _way(base, batch)
    states = _hidden(base, batch, way)[batch.source]
    logprobs, entropies = chunked_logprobs(
        states,
        batch.targets,
        head,
        temperature=temperature,
        entropy=entropy,
        chunk_tokens=chunk_tokens,
        softcap=_softcap(base.config),
        scale=_logit_scale(base.config),
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
        chunk_tokens: rows per chunk; 0: about 8 million logits.

    Returns:
        ``[N]`` log-probabilities, and entropies or ``None``; float32, or float64 where the states are.
        Gradients flow once: they cannot themselves be differentiated.
    """
    vocabulary = int(getattr(head, "out_features", 0)) or 32_768
    size = chunk_tokens or max(1, _CHUNK_LOGITS // vocabulary)

    def one(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = _finish(head(x), scale, softcap)
        if temperature != 1.0:
            logits = logits / temperature
        return _Chosen.apply(logits, y, entropy)

    if softcap is None and states.dtype in (torch.float32, torch.float64) and _is_matrix(head, states.dtype):
        logprobs, entropies = _HeadChosen.apply(states, head.weight, targets, scale / temperature, entropy, size)
        return logprobs, entropies if entropy else None
    recompute = torch.is_grad_enabled() and len(targets) > size
    pieces = []
    for start in range(0, len(targets), size):
        part = states[start : start + size], targets[start : start + size]
        pieces.append(checkpoint(one, *part, use_reentrant=False) if recompute else one(*part))
    logprobs = torch.cat([p[0] for p in pieces])
    return logprobs, torch.cat([p[1] for p in pieces]) if entropy else None


def _choose(logits: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax of ``[N, V]`` at one entry per row, entropy (0 where not wanted), and the log of the norm."""
    norm = torch.logsumexp(logits, -1)
    chosen = logits.gather(-1, targets[:, None]).squeeze(-1) - norm
    spread = torch.zeros_like(norm)
    if entropy:
        p = (logits - norm[:, None]).exp_()
        # A logit of -inf has probability 0, and 0 * inf must be 0.
        spread = norm - p.mul_(logits.clamp(min=torch.finfo(logits.dtype).min)).sum(-1)
    return chosen, spread, norm


def _choose_backward(
    logits: Tensor, targets: Tensor, spread: Tensor, norm: Tensor, entropy: bool, g_chosen: Tensor, g_spread: Tensor
) -> Tensor:
    """Gradient of the logits of :func:`_choose`.

    With p the softmax, ``d log p_y / dz = e_y - p`` and ``dH / dz = -p (log p + H)``. Written out, both take one
    pass over the logits each way, where autograd takes a dozen.
    """
    grad = (logits - norm[:, None]).exp_()
    if entropy:
        # -p (g_chosen + g_spread (z - log Z + H))
        offset = g_chosen + g_spread * (spread - norm)
        slope = logits.clamp(min=torch.finfo(logits.dtype).min).mul_(g_spread[:, None])
        grad.mul_(slope.add_(offset[:, None])).neg_()
    else:
        grad.mul_(-g_chosen[:, None])
    return grad.scatter_add_(1, targets[:, None], g_chosen[:, None])


class _Chosen(torch.autograd.Function):
    """:func:`_choose`: ``[N, V]``, ``[N]`` in, log-probabilities and entropies ``[N]`` out."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
        chosen, spread, norm = _choose(logits, targets, entropy)
        ctx.save_for_backward(logits, targets, spread, norm)
        ctx.entropy = entropy
        return chosen, spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_chosen: Tensor, g_spread: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, spread, norm = ctx.saved_tensors
        return _choose_backward(logits, targets, spread, norm, ctx.entropy, g_chosen, g_spread), None, None


class _HeadChosen(torch.autograd.Function):
    """:func:`_choose` of a head that is one matrix, chunk by chunk, with one buffer for the matrix's gradient.

    Of several chunks the logits are computed again in the backward pass; those of one are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, factor: float, entropy: bool, size: int
    ) -> tuple[Tensor, Tensor]:
        n = len(targets)
        chosen, spread, norm = (states.new_zeros(n) for _ in range(3))
        kept = None
        for start in range(0, n, size):
            part = slice(start, start + size)
            logits = _times(linear(states[part], weight), factor)
            chosen[part], spread[part], norm[part] = _choose(logits, targets[part], entropy)
            kept = logits if n <= size else None
        ctx.save_for_backward(states, weight, targets, spread, norm, kept)
        ctx.settings = factor, entropy, size
        return chosen, spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_chosen: Tensor, g_spread: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, targets, spread, norm, kept = ctx.saved_tensors
        factor, entropy, size = ctx.settings
        d_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        d_weight: Tensor | None = None
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            logits = kept if kept is not None else _times(linear(states[part], weight), factor)
            known = targets[part], spread[part], norm[part]
            grad = _times(_choose_backward(logits, *known, entropy, g_chosen[part], g_spread[part]), factor)
            del logits
            if d_states is not None:
                d_states[part] = matmul(grad, weight)
            if ctx.needs_input_grad[1]:
                d_weight = grad.t() @ states[part] if d_weight is None else d_weight.addmm_(grad.t(), states[part])
        return d_states, d_weight, None, None, None, None


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x.mul_(factor)


def _is_matrix(head: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a head is a product with a matrix of its own and nothing else."""
    return type(head) is nn.Linear and head.bias is None and is_plain(head) and head.weight.dtype == dtype


def trunk_and_head(model: Any) -> tuple[nn.Module, nn.Module]:
    """The module that yields hidden states and the one that maps them to logits, through any LoRA wrapper.

    Raises:
        EngineError: the model is no causal language model with an output head.
    """
    base = _base(model)
    head = base.get_output_embeddings()
    trunk = _trunk(base)
    if head is None or trunk is None or trunk is base:
        raise EngineError(f"{type(base).__name__} has no separate trunk and output head; use a causal language model")
    return trunk, head


def logits_of(model: Any, states: Tensor) -> Tensor:
    """Next-token logits ``[N, vocabulary]``, float32, as the model itself would give them for ``[N, hidden]``."""
    _, head = trunk_and_head(model)
    config = _base(model).config
    return _finish(head(states), _logit_scale(config), _softcap(config))


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _trunk(base: Any) -> Any:
    return getattr(base, getattr(base, "base_model_prefix", "model"), None)


def _last(output: Any) -> Tensor:
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]


def _finish(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    if logits.dtype != torch.float64:
        logits = logits.float()
    if scale != 1.0:
        logits = logits * scale
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _way(base: Any, batch: TokenBatch) -> Sharing:
    config = base.config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    window = window or getattr(config, "attention_chunk_size", None)
    if window and batch.context > window:
        raise EngineError(
            f"{type(base).__name__} attends to windows of {window} tokens and cannot share prompts in rows of "
            f"{batch.context}; use share_prompt=False"
        )
    return sharing(base, _hidden)


def _hidden(base: Any, batch: TokenBatch, way: Sharing) -> Tensor:
    """Last hidden states ``[R * T, hidden]``; zero or arbitrary at padding."""
    trunk = _trunk(base)
    if way != "mask" or batch.tree is None:
        direct = direct_trunk(base, context=batch.context)
        if direct is not None:
            return _directly(direct, batch)
    if batch.tree is None:
        # Right padding is behind everything that counts, so the model's own causal pass is exact.
        out = _last(trunk(input_ids=batch.input_ids, use_cache=False))
        return out.reshape(-1, out.shape[-1])
    dtype = next(trunk.parameters()).dtype
    if way == "mask":
        allowed = batch.attention_mask
        assert allowed is not None
        # Additive masks are what every attention implementation accepts.
        mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        mask.masked_fill_(~allowed, torch.finfo(dtype).min)
        out = _last(
            trunk(input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False)
        )
        return out.reshape(-1, out.shape[-1])
    layout = batch.tree.layout(batch.input_ids.device)
    ids, positions = (x.reshape(-1).index_select(0, layout.tokens)[None] for x in (batch.input_ids, batch.position_ids))
    with attending(base.config, layout, dtype):
        out = _last(trunk(input_ids=ids, position_ids=positions, use_cache=False))
    if layout.calls == 0:
        raise EngineError(f"{type(base).__name__} does not use the attention functions of transformers")
    return out[0].index_select(0, layout.compact)


def _directly(trunk: DirectTrunk, batch: TokenBatch) -> Tensor:
    """As :func:`_hidden`, on the trunk written out."""
    shape = batch.input_ids.shape
    flat = batch.input_ids.reshape(-1), batch.position_ids.reshape(-1)
    if batch.tree is None:

        def rows(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            one, two, three = (x.view(*shape, -1, x.shape[-1]).transpose(1, 2) for x in (q, k, v))
            return (
                grouped_sdpa(one, two, three, None, causal=True, scaling=trunk.scaling)
                .transpose(1, 2)
                .reshape(len(q), -1)
            )

        return trunk(*flat, rows)
    layout = batch.tree.layout(batch.input_ids.device)
    layout.prepare(trunk.dtype)
    try:
        ids, positions = (x.index_select(0, layout.tokens) for x in flat)
        out = trunk(ids, positions, lambda _, q, k, v: layout.attend(q, k, v, scaling=trunk.scaling))
    finally:
        layout.finish()
    return out.index_select(0, layout.compact)


def _softcap(config: Any) -> float | None:
    return getattr(config.get_text_config(), "final_logit_softcapping", None)


def _logit_scale(config: Any) -> float:
    config = config.get_text_config()
    if getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)
    return float(getattr(config, "logit_scale", None) or 1.0)
