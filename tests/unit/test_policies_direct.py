"""Trunks written out: the same hidden states and gradients as the model's own modules, and used only where they fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from guerdon.policies import direct, make_batches, tiny_policy
from guerdon.policies import logprobs as scoring
from guerdon.policies.direct import _Mlp, _Norm, _Qkv, direct_trunk, grouped_sdpa
from guerdon.policies.logprobs import token_logprobs
from guerdon.policies.policy import Policy

SIZES = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1, "attention_dropout": 0.0,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama with biases and a scaled rope": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SIZES,
            attention_bias=True,
            rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, head_dim=12, sliding_window=None)),
}


def model_of(kind: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS[kind]().to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_policy(hidden=16, layers=1, heads=2).tokenizer


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_log_probabilities_and_gradients_are_those_of_the_modules(kind, shared, tokenizer, monkeypatch) -> None:
    policy = Policy(model_of(kind), tokenizer)
    generator = torch.Generator().manual_seed(1)
    items = [
        ([3 + g] * (2 + 5 * g), torch.randint(0, 300, (n,), generator=generator).tolist())
        for g in range(3)
        for n in (1, 4, 9)
    ]
    groups = [g for g in range(3) for _ in range(3)] if shared else None
    batches = make_batches(items, groups=groups, max_tokens=10_000)

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        policy.model.zero_grad()
        out = torch.cat([token_logprobs(policy, b).logprobs for b in batches])
        (out * torch.linspace(-1, 1, len(out), dtype=out.dtype)).sum().backward()
        return out.detach(), {n: p.grad.clone() for n, p in policy.model.named_parameters()}

    assert direct_trunk(policy.model) is not None
    ours, our_gradients = run()
    monkeypatch.setattr(scoring, "direct_trunk", lambda base, **_: None)
    theirs, their_gradients = run()
    # The modules compute norms in float32 whatever the weights are.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-5, atol=2e-6, msg=name)


def test_the_gradients_written_out_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    x, gain, m, c = random(3, 8), random(8), 3, 8
    angle = torch.randn(m, 1, 2, generator=generator, dtype=torch.float64)
    cos = torch.cat([angle.cos()] * 2, -1)
    sin = torch.cat([-angle.sin(), angle.sin()], -1)
    assert torch.autograd.gradcheck(lambda *a: _Norm.apply(*a, 1e-5), (x, gain))
    assert torch.autograd.gradcheck(
        lambda *a: _Qkv.apply(*a, cos, sin, 1e-5, 4),
        (x, gain, random(8, c), random(4, c), random(4, c), random(8), random(4), random(4)),
    )
    assert torch.autograd.gradcheck(
        lambda *a: _Mlp.apply(*a, 1e-5), (x, gain, random(12, c), random(12, c), random(c, 12))
    )


def test_frozen_weights_get_no_gradient_and_the_others_the_same() -> None:
    model = model_of("llama")
    ids, positions = torch.tensor([5, 6, 7, 8]), torch.arange(4)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        return grouped_sdpa(*heads, None, causal=True, scaling=q.shape[-1] ** -0.5)[0].transpose(0, 1).flatten(1)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        direct_trunk(model)(ids, positions, attend).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole = gradients()
    frozen = [n for n, _ in model.named_parameters() if "gate" in n or "k_proj" in n or "input_layernorm" in n]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    part = gradients()
    assert set(part) == set(whole) - set(frozen)
    for name, gradient in part.items():
        torch.testing.assert_close(gradient, whole[name])


@pytest.mark.parametrize("causal", [True, False])
def test_grouped_attention_is_attention_with_repeated_keys(causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 5, 4, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 2, 5 if causal else 7, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = None if causal else torch.randn(2, 1, 5, 7, generator=generator, dtype=torch.float64)
    scores = q @ k.repeat_interleave(3, 1).transpose(-1, -2) * 0.3
    scores = scores.masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf) if causal else scores + mask
    expected = scores.softmax(-1) @ v.repeat_interleave(3, 1)
    torch.testing.assert_close(grouped_sdpa(q, k, v, mask, causal=causal, scaling=0.3), expected)


def _hook(model) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def _patch(model) -> None:
    model.model.layers[0].self_attn.forward = model.model.layers[0].self_attn.forward


def _wrap(model) -> None:
    class Other(torch.nn.Linear):
        pass

    model.model.layers[0].self_attn.q_proj.__class__ = Other


def _recompute(model) -> None:
    model.model.layers[0].gradient_checkpointing = True
    model.model.layers[0].train()


def _eager(model) -> None:
    model.config._attn_implementation = "eager"


def _half(model) -> None:
    model.to(torch.bfloat16)


def _dynamic(model) -> None:
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}


@pytest.mark.parametrize(
    "change", [_hook, _patch, _wrap, _recompute, _eager, _half, _dynamic], ids=lambda f: f.__name__
)
def test_a_model_with_something_of_its_own_runs_its_own_modules(change) -> None:
    model = model_of("llama")
    assert direct_trunk(model) is not None
    change(model)
    assert direct_trunk(model) is None


def test_windows_shorter_than_the_context_are_not_written_out() -> None:
    model = MistralForCausalLM(MistralConfig(**SIZES, head_dim=8, sliding_window=32)).eval()
    assert direct_trunk(model, context=32) is not None
    assert direct_trunk(model, context=33) is None


def test_a_trunk_that_differs_from_the_model_is_refused(monkeypatch) -> None:
    """The list of types is no proof: a model that computes something else is found out by trying it."""
    model = model_of("llama")
    right = direct._mlp
    monkeypatch.setattr(direct, "_mlp", lambda *a: (right(*a)[0] * 1.1, *right(*a)[1:]))
    assert direct_trunk(model) is None


def test_positions_beyond_the_table_are_computed_when_they_are_reached() -> None:
    model = model_of("llama")
    trunk = direct_trunk(model)
    with torch.no_grad():
        trunk.tabulate(4, 100)
        assert len(trunk._table[0]) == 8
        trunk.tabulate(60, 100)
        short, long = trunk._rotations(torch.tensor([0, 3, 59])), trunk._rotations_of(torch.tensor([0, 3, 59]))
    for ours, theirs in zip(short, long, strict=True):
        torch.testing.assert_close(ours, theirs)
