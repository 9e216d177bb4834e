"""Packed, shared and chunked log-probabilities against one plain forward pass per trajectory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from guerdon.errors import ConfigError, DataError, EngineError
from guerdon.policies import LoraSpec, Policy, TokenBatch, make_batches, probe, tiny_policy, token_logprobs
from guerdon.policies.logprobs import chunked_logprobs
from guerdon.policies.lora import add_lora

Item = tuple[list[int], list[int]]


def items_of(vocab: int, seed: int = 0) -> tuple[list[Item], list[int]]:
    """Three groups with short and long prompts, responses from one token to several prompts' length."""
    rng = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(0, vocab, (n,), generator=rng).tolist()

    out: list[Item] = []
    groups = []
    for g, (p, lengths) in enumerate([(11, (5, 1, 30, 7)), (3, (4, 9)), (20, (6, 6, 18))]):
        prompt = draw(p)
        for n in lengths:
            out.append((prompt, draw(n)))
            groups.append(g)
    return out, groups


def alone(policy: Policy, items: Sequence[Item], temperature: float = 1.0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probabilities and entropies by the model's own forward pass on each sequence alone, in float64."""
    out = []
    for prompt, response in items:
        logits = policy.model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logp = (logits.double() / temperature).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        out.append((logp.gather(-1, torch.tensor(response)[:, None])[:, 0], entropy))
    return out


def packed(policy: Policy, items: Sequence[Item], groups: Any, max_tokens: int = 4096, **options: Any) -> Any:
    """The same by batches, put back into one list per trajectory."""
    logprobs = [torch.zeros(len(r), dtype=torch.float64) for _, r in items]
    entropies = [torch.zeros(len(r), dtype=torch.float64) for _, r in items]
    for batch in make_batches(items, groups=groups, max_tokens=max_tokens):
        out = token_logprobs(policy, batch, entropy=True, **options)
        for k in batch.trajectory.unique().tolist():
            mine = batch.trajectory == k
            at = (batch.position[mine],)
            logprobs[k] = logprobs[k].index_put(at, out.logprobs[mine].double())
            entropies[k] = entropies[k].index_put(at, out.entropy[mine].double())
    return list(zip(logprobs, entropies, strict=True))


def qwen(tokenizer: Any) -> Policy:
    """Grouped-query attention with biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Policy(Qwen2ForCausalLM(config).eval(), tokenizer)


def gpt2(tokenizer: Any) -> Policy:
    """Learned absolute positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return Policy(GPT2LMHeadModel(config).eval(), tokenizer)


def gemma2(tokenizer: Any) -> Policy:
    """Caps its attention scores and its logits, and slides a window."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.2, sliding_window=64,
        final_logit_softcapping=5.0, attn_logit_softcapping=3.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Policy(Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval(), tokenizer)


def lora(tokenizer: Any) -> Policy:
    base = tiny_policy(tokenizer, hidden=32, layers=2, heads=4, seed=1)
    policy = Policy(add_lora(base.model, LoraSpec(r=4), seed=0), tokenizer)
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    return policy


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_policy().tokenizer


MAKERS = {
    "llama": lambda t: tiny_policy(t, hidden=32, layers=2, heads=4, init_std=0.2, seed=1),
    "lora": lora,
    "qwen2": qwen,
    "gpt2": gpt2,
    "gemma2": gemma2,
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("shared", [True, False])
def test_packed_rows_equal_each_sequence_alone_in_values_and_gradients(name: str, shared: bool, tokenizer: Any) -> None:
    policy = MAKERS[name](tokenizer)
    items, groups = items_of(len(tokenizer))
    weights = torch.Generator().manual_seed(3)

    def gradients(pairs: Any) -> list[torch.Tensor]:
        weights.manual_seed(3)
        loss = sum(
            (x * torch.randn(len(x), generator=weights)).sum() + (h * torch.randn(len(h), generator=weights)).sum()
            for x, h in pairs
        )
        found = torch.autograd.grad(loss, policy.trainable_parameters(), allow_unused=True)
        return [torch.zeros(1) if g is None else g for g in found]

    ours, theirs = packed(policy, items, groups if shared else None), alone(policy, items)
    for (a, h), (b, k) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(h, k, atol=1e-5, rtol=1e-5)
    for g, e in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(g, e, atol=1e-5 * max(1.0, float(e.abs().max())), rtol=1e-4)


def test_blocks_and_dense_mask_agree_and_blocks_serve_sdpa_models(tokenizer: Any) -> None:
    policy = MAKERS["qwen2"](tokenizer)
    from guerdon.policies.logprobs import _hidden

    assert probe.sharing(policy.model, _hidden) == "tree"
    assert probe.sharing(MAKERS["gemma2"](tokenizer).model, _hidden) == "mask"
    items, groups = items_of(len(tokenizer))
    (batch,) = make_batches(items, groups=groups, max_tokens=4096)
    blocks, dense = (_hidden(policy.model, batch, way)[batch.source] for way in ("tree", "mask"))
    torch.testing.assert_close(blocks, dense, atol=1e-5, rtol=1e-5)
    assert policy.model.config._attn_implementation == "sdpa"


def test_checkpointed_layers_still_share_prompts_exactly(tokenizer: Any) -> None:
    items, groups = items_of(len(tokenizer))
    plain, saving = (MAKERS["llama"](tokenizer) for _ in range(2))
    saving.model.gradient_checkpointing_enable()
    saving.model.train()
    (batch,) = make_batches(items, groups=groups, max_tokens=4096)
    for policy in (plain, saving):
        token_logprobs(policy, batch).logprobs.sum().backward()
    for a, b in zip(plain.model.parameters(), saving.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)
    assert saving.model.training


def test_temperature_divides_the_logits(tokenizer: Any) -> None:
    policy = MAKERS["llama"](tokenizer)
    items, groups = items_of(len(tokenizer))
    ours, theirs = packed(policy, items, groups, temperature=0.6), alone(policy, items, 0.6)
    for (a, h), (b, k) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(h, k, atol=1e-5, rtol=1e-5)


def test_values_are_read_where_the_token_is_chosen(tokenizer: Any) -> None:
    policy = tiny_policy(tokenizer, hidden=32, layers=1, heads=4, value_head=True)
    assert policy.value_head is not None
    with torch.no_grad():
        policy.value_head.linear.weight.copy_(torch.randn(1, 32, generator=torch.Generator().manual_seed(0)))
        policy.value_head.linear.bias.fill_(0.25)
    items, groups = items_of(len(tokenizer))
    (batch,) = make_batches(items, groups=groups, max_tokens=4096)
    values = token_logprobs(policy, batch, values=True).values
    assert values is not None
    for k, (prompt, response) in enumerate(items):
        hidden = policy.model.model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
        expected = (hidden @ policy.value_head.linear.weight[0] + 0.25)[len(prompt) - 1 : -1]
        torch.testing.assert_close(values[batch.trajectory == k], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 0])
def test_chunked_head_equals_log_softmax_in_float64(chunk: int) -> None:
    rng = torch.Generator().manual_seed(0)
    states = torch.randn(23, 6, dtype=torch.float64, generator=rng, requires_grad=True)
    head = torch.nn.Linear(6, 50, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.randn(50, 6, generator=rng))
    y = torch.randint(0, 50, (23,), generator=rng)
    w, u = torch.randn(2, 23, dtype=torch.float64, generator=rng)
    logprobs, entropy = chunked_logprobs(
        states, y, head, temperature=0.7, entropy=True, chunk_tokens=chunk, softcap=4.0, scale=0.5
    )
    assert entropy is not None
    logp = (4.0 * torch.tanh(0.5 * head(states) / 4.0) / 0.7).log_softmax(-1)
    expected, expected_h = logp[torch.arange(23), y], -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(logprobs, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(entropy, expected_h, atol=1e-12, rtol=1e-12)
    inputs = [states, head.weight, head.bias]
    ours = torch.autograd.grad((w * logprobs + u * entropy).sum(), inputs)
    theirs = torch.autograd.grad((w * expected + u * expected_h).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 0])
def test_a_head_that_is_one_matrix_equals_log_softmax_in_float64(chunk: int, entropy: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    states = torch.randn(23, 6, dtype=torch.float64, generator=rng, requires_grad=True)
    head = torch.nn.Linear(6, 50, bias=False, dtype=torch.float64)
    y = torch.randint(0, 50, (23,), generator=rng)
    w, u = torch.randn(2, 23, dtype=torch.float64, generator=rng)
    logprobs, spread = chunked_logprobs(
        states, y, head, temperature=0.7, entropy=entropy, chunk_tokens=chunk, scale=0.5
    )
    logp = (0.5 * (states @ head.weight.t()) / 0.7).log_softmax(-1)
    expected, expected_h = logp[torch.arange(23), y], -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(logprobs, expected, atol=1e-12, rtol=1e-12)
    ours, theirs = (w * logprobs).sum(), (w * expected).sum()
    assert (spread is None) == (not entropy)
    if spread is not None:
        torch.testing.assert_close(spread, expected_h, atol=1e-12, rtol=1e-12)
        ours, theirs = ours + (u * spread).sum(), theirs + (u * expected_h).sum()
    for a, b in zip(
        torch.autograd.grad(ours, [states, head.weight]),
        torch.autograd.grad(theirs, [states, head.weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)
    head.weight.requires_grad_(False)
    (alone,) = torch.autograd.grad((w * chunked_logprobs(states, y, head, chunk_tokens=chunk)[0]).sum(), [states])
    (right,) = torch.autograd.grad(
        (w * (states @ head.weight.t()).log_softmax(-1)[torch.arange(23), y]).sum(), [states]
    )
    torch.testing.assert_close(alone, right, atol=1e-11, rtol=1e-11)


def test_entropy_of_a_vocabulary_with_forbidden_entries_is_finite() -> None:
    class Masked(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).index_fill(-1, torch.tensor([3, 4]), float("-inf"))

    states = torch.zeros(2, 4, requires_grad=True)
    head = Masked(4, 5, bias=False)
    _, entropy = chunked_logprobs(states, torch.tensor([0, 1]), head, entropy=True)
    assert entropy is not None
    torch.testing.assert_close(entropy, torch.full((2,), 3.0).log())  # uniform over three of five
    (grad,) = torch.autograd.grad(entropy.sum(), [states])
    assert bool(grad.isfinite().all())


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                Largest.elements = max(Largest.elements, leaf.numel())
        return out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("entropy", [True, False])
def test_no_tensor_of_tokens_by_vocabulary_exists_forward_or_backward(entropy: bool, bias: bool) -> None:
    vocabulary, tokens, width, chunk = 5000, 400, 8, 20
    states = torch.randn(tokens, width, requires_grad=True)
    head = torch.nn.Linear(width, vocabulary, bias=bias)
    Largest.elements = 0
    with Largest():
        logprobs, spread = chunked_logprobs(
            states, torch.randint(0, vocabulary, (tokens,)), head, entropy=entropy, chunk_tokens=chunk
        )
        (logprobs.sum() + (spread.sum() if spread is not None else 0.0)).backward()
    assert chunk * vocabulary <= Largest.elements < 2 * chunk * vocabulary
    assert states.grad is not None and head.weight.grad is not None


def test_chunks_are_limited_by_default() -> None:
    vocabulary, tokens = 200_000, 200
    states = torch.randn(tokens, 2, requires_grad=True)
    head = torch.nn.Linear(2, vocabulary)
    Largest.elements = 0
    with Largest():
        chunked_logprobs(states, torch.zeros(tokens, dtype=torch.long), head)[0].sum().backward()
    assert Largest.elements < tokens * vocabulary / 2


def test_tokens_can_be_left_out_and_a_batch_be_empty(tokenizer: Any) -> None:
    policy = MAKERS["llama"](tokenizer)
    items, groups = items_of(len(tokenizer))
    (batch,) = make_batches(items, groups=groups, max_tokens=4096)
    whole = token_logprobs(policy, batch).logprobs

    def only(keep: torch.Tensor) -> TokenBatch:
        names = ("source", "targets", "trajectory", "position")
        return dataclasses.replace(batch, **{n: getattr(batch, n)[keep] for n in names})

    some = torch.arange(len(batch)) % 3 == 0
    torch.testing.assert_close(token_logprobs(policy, only(some)).logprobs, whole[some])
    none = token_logprobs(policy, only(torch.zeros(len(batch), dtype=torch.bool)), entropy=True)
    assert none.logprobs.shape == (0,) and none.entropy is not None and none.entropy.shape == (0,)


def test_bad_arguments_are_refused(tokenizer: Any) -> None:
    policy = MAKERS["llama"](tokenizer)
    (batch,) = make_batches([([1], [2])], groups=None, max_tokens=8)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="temperature must be positive"):
            token_logprobs(policy, batch, temperature=temperature)
    with pytest.raises(ConfigError, match="has no value head"):
        token_logprobs(policy, batch, values=True)
    with pytest.raises(ConfigError, match="chunk_tokens"):
        token_logprobs(policy, batch, chunk_tokens=-1)


def test_a_sequence_longer_than_the_context_is_refused_but_a_long_shared_row_is_not(tokenizer: Any) -> None:
    policy = tiny_policy(tokenizer, hidden=32, layers=1, heads=4, max_context=12)
    (fits,) = make_batches([([1] * 6, [2] * 6), ([1] * 6, [3] * 6)], groups=[0, 0], max_tokens=100)
    assert fits.input_ids.shape == (1, 18)
    assert token_logprobs(policy, fits).logprobs.shape == (12,)
    (long,) = make_batches([([1] * 6, [2] * 7)], groups=None, max_tokens=100)
    with pytest.raises(DataError, match="13 tokens, more than the 12"):
        token_logprobs(policy, long)


def test_a_window_smaller_than_the_sequences_is_refused_for_shared_rows(tokenizer: Any) -> None:
    policy = MAKERS["gemma2"](tokenizer)
    long = [([1] * 30, [2] * 50), ([1] * 30, [3] * 50)]
    (batch,) = make_batches(long, groups=[0, 0], max_tokens=1000)
    with pytest.raises(EngineError, match=r"windows of 64.*share_prompt=False"):
        token_logprobs(policy, batch)
    ours, theirs = packed(policy, long, None), alone(policy, long)
    torch.testing.assert_close(ours[1][0], theirs[1][0], atol=1e-5, rtol=1e-5)


def test_an_architecture_that_ignores_the_tree_is_refused_for_shared_rows_only(tokenizer: Any) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, state_size=4, num_hidden_layers=1)
    policy = Policy(MambaForCausalLM(config).eval(), tokenizer)
    items = [([1, 2, 3], [4, 5]), ([1, 2, 3], [6])]
    (shared,) = make_batches(items, groups=[0, 0], max_tokens=64)
    with pytest.raises(EngineError, match=r"MambaForCausalLM cannot compute several responses.*share_prompt=False"):
        token_logprobs(policy, shared)
    ours, theirs = packed(policy, items, None), alone(policy, items)
    torch.testing.assert_close(ours[0][0], theirs[0][0], atol=1e-5, rtol=1e-5)


def test_a_model_that_reshapes_its_logits_in_an_unknown_way_is_refused(tokenizer: Any) -> None:
    policy = MAKERS["llama"](tokenizer)
    plain = policy.model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    policy.model.forward = scaled
    (batch,) = make_batches([([1], [2])], groups=None, max_tokens=8)
    with pytest.raises(EngineError, match="logits"):
        token_logprobs(policy, batch)


def test_bfloat16_is_close_and_its_outputs_are_float32(tokenizer: Any) -> None:
    policy = MAKERS["llama"](tokenizer)
    items, groups = items_of(len(tokenizer))
    exact = alone(policy, items)
    policy.model.to(torch.bfloat16)
    (batch,) = make_batches(items, groups=groups, max_tokens=4096)
    out = token_logprobs(policy, batch).logprobs
    assert out.dtype == torch.float32
    for k in range(len(items)):
        torch.testing.assert_close(out[batch.trajectory == k].double(), exact[k][0], atol=0.3, rtol=0.1)
