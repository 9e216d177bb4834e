"""Llama-shaped trunks as a straight line of tensor operations, with gradients written out.

The model's own modules are general: around each matrix product they run a dozen small operations, and autograd keeps
the result of every one. On a CPU the small operations cost as much as the products of a small model, and what is kept
is most of an update's memory. Here each half of a layer is one operation that keeps its input and what its products
made, and computes the rest again in the backward pass (a few per cent of the products' time).

Weights are read from the model's own modules at every call. Which models fit is a short list, and each is compared
with its own forward pass once (:func:`guerdon.policies.probe.check_direct`); everything else (adapters, hooks,
checkpointed or sharded layers, other number formats, a GPU) takes the model's own modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from guerdon.policies.products import PackedWeight, linear, matmul, pack

__all__ = ["Attend", "DirectTrunk", "direct_trunk", "grouped_sdpa", "is_plain"]

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention of one layer: number of the layer, queries ``[M, H, D]``, keys and values ``[M, KV, D]``, rotated;
returns ``[M, H * D]``."""

Weight = Tensor | PackedWeight

_TYPES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's parameters: gains of the norms, weights and biases of the products."""

    attention_gain: Tensor
    qkv: tuple[Weight, Weight, Weight]
    qkv_bias: tuple[Tensor | None, Tensor | None, Tensor | None]
    out: Weight
    out_bias: Tensor | None
    mlp_gain: Tensor
    gate: Weight
    up: Weight
    down: Weight

    def packed(self) -> _Layer:
        """The same with a copy of each weight in the layout that is fast for few rows."""

        def copy(weight: Weight, bias: Tensor | None = None) -> Weight:
            assert isinstance(weight, Tensor)
            return pack(weight, bias) or weight

        return _Layer(
            self.attention_gain,
            tuple(copy(w, b) for w, b in zip(self.qkv, self.qkv_bias, strict=True)),  # type: ignore[arg-type]
            self.qkv_bias,
            copy(self.out, self.out_bias),
            self.out_bias,
            self.mlp_gain,
            copy(self.gate),
            copy(self.up),
            copy(self.down),
        )


class DirectTrunk:
    """The hidden states of a model, as its own trunk gives them; make it with :func:`direct_trunk`.

    Args:
        base: the causal language model.

    Attributes:
        scaling: of the attention scores.
    """

    def __init__(self, base: Any) -> None:
        trunk = base.model
        first = trunk.layers[0].self_attn
        self.scaling = float(first.scaling)
        self._embedding = trunk.embed_tokens.weight
        self._padding = trunk.embed_tokens.padding_idx
        self._rotary = trunk.rotary_emb
        self._gain = trunk.norm.weight
        self._eps = float(trunk.norm.variance_epsilon)
        self._head_dim = int(first.head_dim)
        self._layers = [_layer(layer) for layer in trunk.layers]
        self._table: tuple[Tensor, Tensor] | None = None
        self._packed: list[_Layer] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states."""
        return self._embedding.dtype

    def tabulate(self, positions: int, limit: int) -> None:
        """Compute the rotations of the first positions once, for many short passes.

        Args:
            positions: how many are needed now.
            limit: how many may be needed later.
        """
        if self._table is not None and len(self._table[0]) >= positions:
            return
        every = torch.arange(max(positions, min(limit, 2 * positions)), device=self._embedding.device)
        self._table = self._rotations_of(every)

    def pack(self) -> None:
        """Copy the weights into the layout that is fast for few rows; passes without gradients use the copies.

        They do not follow the weights: call :meth:`unpack` when these have changed.
        """
        if self._packed is None:
            self._packed = [layer.packed() for layer in self._layers]

    def unpack(self) -> None:
        """Let the copies go."""
        self._packed = None

    def take_over(self, other: DirectTrunk) -> None:
        """Go on with the rotations and copies that another trunk of the same, unchanged model has made."""
        if other._rotary is self._rotary and other.dtype == self.dtype:
            self._table, self._packed = other._table, other._packed

    def _rotations(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self._table is None or not len(positions) or torch.is_grad_enabled():
            return self._rotations_of(positions)
        return self._table[0].index_select(0, positions), self._table[1].index_select(0, positions)

    def _rotations_of(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine ``[M, 1, D]``: ``x * cos + swap(x) * sin`` rotates x."""
        cos, sin = self._rotary(self._embedding.new_zeros(()), position_ids=positions[None])
        half = self._head_dim // 2
        sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
        return cos[0][:, None], sin[:, None]

    def __call__(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Last hidden states ``[M, hidden]`` of tokens ``[M]`` at ``positions`` [M]."""
        x = F.embedding(ids, self._embedding, self._padding)
        cos, sin = self._rotations(positions)
        learning = torch.is_grad_enabled()
        for k, layer in enumerate(self._layers if learning or self._packed is None else self._packed):
            first = (x, layer.attention_gain, *layer.qkv, *layer.qkv_bias, cos, sin, self._eps, self._head_dim)
            attended = attend(k, *(_Qkv.apply(*first) if learning else _qkv(*first)[:3]))
            second = (x, attended, layer.out, layer.out_bias)
            x = _Out.apply(*second) if learning else _plus(*second)
            third = (x, layer.mlp_gain, layer.gate, layer.up, layer.down, self._eps)
            x = _Mlp.apply(*third) if learning else _mlp(*third)[0]
        return _Norm.apply(x, self._gain, self._eps) if learning else _norm(x, self._gain, self._eps)[0]


def direct_trunk(base: Any, *, context: int = 0) -> DirectTrunk | None:
    """The direct form of a model's trunk, or None where the model must run its own modules.

    Args:
        base: a causal language model, adapters unwrapped.
        context: most tokens that attend to one another.
    """
    if not _fits(base, context):
        return None
    from guerdon.policies.probe import check_direct

    trunk = DirectTrunk(base)
    return trunk if check_direct(base, trunk) else None


def _fits(base: Any, context: int) -> bool:
    config: Any = getattr(base, "config", None)
    if type(base).__name__ not in _TYPES or type(base).__module__.partition(".")[0] != "transformers":
        return False
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    rope = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or "")
    if (
        getattr(config, "_attn_implementation", None) != "sdpa"
        or config.hidden_act != "silu"
        or (window is not None and window < context)
        or any(kind in rope for kind in ("dynamic", "longrope"))
    ):
        return False
    weights = list(base.parameters())
    first = weights[0]
    if first.device.type != "cpu" or first.dtype not in (torch.float32, torch.float64):
        return False
    if any(w.dtype != first.dtype or type(w) is not nn.Parameter for w in weights):
        return False
    mlps = [layer.mlp for layer in base.model.layers]
    if any(p.bias is not None for mlp in mlps for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        return False
    return all(is_plain(module) for module in base.model.modules())


_ELEMENTARY = (nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU)


def is_plain(module: nn.Module) -> bool:
    """Whether a module of a known type computes what its type does: nothing is hooked to it, put in its place, or on."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    if getattr(module, "gradient_checkpointing", False) and module.training:
        return False
    if getattr(module, "attention_dropout", 0.0) and module.training:
        return False
    kind = type(module)
    if kind.__module__.startswith("torch."):
        return kind in _ELEMENTARY and "forward" not in vars(module)
    return kind.__module__.startswith("transformers.") and "forward" not in vars(module)


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    products = (attention.q_proj, attention.k_proj, attention.v_proj)
    return _Layer(
        layer.input_layernorm.weight,
        tuple(p.weight for p in products),  # type: ignore[arg-type]
        tuple(p.bias for p in products),  # type: ignore[arg-type]
        attention.o_proj.weight,
        attention.o_proj.bias,
        layer.post_attention_layernorm.weight,
        mlp.gate_proj.weight,
        mlp.up_proj.weight,
        mlp.down_proj.weight,
    )


# Forward ---------------------------------------------------------------------------------------------------------


def _norm(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm ``[M, C]``, and the factor ``[M, 1]`` by which each row was scaled."""
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(gain), scale


def _plus(x: Tensor, states: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``x + states @ weight.T + bias``."""
    return linear(states, weight, bias).add_(x)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``[M, H, D]``; with ``-sin`` back."""
    half = x.shape[-1] // 2
    return (x * cos).addcmul_(x.roll(half, -1), sin)


def _qkv(
    x: Tensor,
    gain: Tensor,
    wq: Weight,
    wk: Weight,
    wv: Weight,
    bq: Tensor | None,
    bk: Tensor | None,
    bv: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotated queries and keys, values, and the norm's factor."""
    normed, scale = _norm(x, gain, eps)
    m = len(x)
    q = _rotate(linear(normed, wq, bq).view(m, -1, dim), cos, sin)
    k = _rotate(linear(normed, wk, bk).view(m, -1, dim), cos, sin)
    return q, k, linear(normed, wv, bv).view(m, -1, dim), scale


def _mlp(
    x: Tensor, gain: Tensor, gate: Weight, up: Weight, down: Weight, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x + down(silu(gate(n)) * up(n))`` with n the norm of x; and the norm's factor, gate(n) and up(n)."""
    normed, scale = _norm(x, gain, eps)
    g, u = linear(normed, gate), linear(normed, up)
    return _plus(x, F.silu(g).mul_(u), down), scale, g, u


# Backward --------------------------------------------------------------------------------------------------------


def _norm_backward(grad: Tensor, x: Tensor, gain: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and gain, and the unscaled norm ``x * scale``; ``grad`` is overwritten.

    With n = x s and s = (mean(x^2) + eps)^-1/2: ``dx = s (g - n mean(g n))`` for g = grad * gain.
    """
    unit = x * scale
    d_gain = (grad * unit).sum(0)
    grad.mul_(gain)
    along = (grad * unit).sum(-1, keepdim=True).div_(x.shape[-1])
    return grad.addcmul_(unit, along, value=-1).mul_(scale), d_gain, unit


class _Norm(torch.autograd.Function):
    """The root-mean-square norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        out, scale = _norm(x, gain, eps)
        ctx.save_for_backward(x, gain, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        d_x, d_gain, _ = _norm_backward(grad.clone(), *ctx.saved_tensors)
        return d_x, d_gain, None


class _Qkv(torch.autograd.Function):
    """The first half of a layer up to attention; keeps its input only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        wq: Tensor,
        wk: Tensor,
        wv: Tensor,
        bq: Tensor | None,
        bk: Tensor | None,
        bv: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        dim: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, scale = _qkv(x, gain, wq, wk, wv, bq, bk, bv, cos, sin, eps, dim)
        ctx.save_for_backward(x, gain, wq, wk, wv, cos, sin, scale)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, wq, wk, wv, cos, sin, scale = ctx.saved_tensors
        m, back = len(x), -sin
        grads = [_rotate(d_q, cos, back).reshape(m, -1), _rotate(d_k, cos, back).reshape(m, -1), d_v.reshape(m, -1)]
        d_normed = matmul(grads[0], wq).add_(matmul(grads[1], wk)).add_(matmul(grads[2], wv))
        d_x, d_gain, unit = _norm_backward(d_normed, x, gain, scale)
        normed = unit.mul_(gain)
        wanted = ctx.needs_input_grad
        d_w = [torch.mm(g.t(), normed) if wanted[2 + i] else None for i, g in enumerate(grads)]
        d_b = [g.sum(0) if wanted[5 + i] else None for i, g in enumerate(grads)]
        return d_x, d_gain, *d_w, *d_b, None, None, None, None


class _Out(torch.autograd.Function):
    """What attention adds to the residual stream; keeps what attention gave."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(states, weight)
        return _plus(x, states, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        d_weight = torch.mm(grad.t(), states) if wanted[2] else None
        return grad, matmul(grad, weight), d_weight, grad.sum(0) if wanted[3] else None


class _Mlp(torch.autograd.Function):
    """The second half of a layer; keeps its input and the two products of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float) -> Tensor:
        out, scale, g, u = _mlp(x, gain, gate, up, down, eps)
        ctx.save_for_backward(x, gain, gate, up, down, scale, g, u)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, gate, up, down, scale, g, u = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        s = F.silu(g)
        d_down = torch.mm(grad.t(), s * u) if wanted[4] else None
        d_h = matmul(grad, down)
        d_u = s.mul_(d_h)
        d_g = torch.ops.aten.silu_backward(d_h.mul_(u), g)
        d_x, d_gain, unit = _norm_backward(matmul(d_g, gate).add_(matmul(d_u, up)), x, gain, scale)
        normed = unit.mul_(gain)
        d_gate = torch.mm(d_g.t(), normed) if wanted[2] else None
        d_up = torch.mm(d_u.t(), normed) if wanted[3] else None
        return d_x.add_(grad), d_gain, d_gate, d_up, d_down, None


def grouped_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention in which several query heads share a key head, without copies of the keys.

    Args:
        query: ``[B, H, n, D]``.
        key, value: ``[B, KV, L, D]`` with KV a divisor of H.
        mask: ``[B or 1, 1, n, L]`` added to the scores, or None.
        causal: no mask is given and position i sees up to i.
        scaling: factor on the scores.
        dropout: of the weights.

    Returns:
        ``[B, H, n, D]``.
    """
    b, heads, n, dim = query.shape
    shared = heads // key.shape[1]
    if shared == 1:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scaling, dropout_p=dropout
        )
    if causal:
        mask = torch.full((n, n), -torch.inf, dtype=query.dtype, device=query.device).triu_(1)[None, None]
    if mask is not None:
        mask = mask.expand(-1, shared, -1, -1).reshape(len(mask), 1, shared * n, -1)
    folded = query.reshape(b, heads // shared, shared * n, dim)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling, dropout_p=dropout)
    return out.reshape(b, heads, n, dim)
