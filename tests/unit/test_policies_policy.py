"""Rendering, saving and loading, references, adapters, and the built-in small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from guerdon.errors import CheckpointError, ConfigError, DataError
from guerdon.policies import ATOMS, LoraSpec, Policy, load_policy, make_batches, tiny_policy, token_logprobs, train_bpe
from guerdon.policies.lora import add_lora

ODD = "naïve café — 日本語 🏳️‍🌈 \t\n  two  spaces \x00 <think>x</think>\u202e"


def small(**options: Any) -> Policy:
    return tiny_policy(hidden=32, layers=1, heads=2, **options)


def adapted(seed: int = 0, trained: bool = True, **options: Any) -> Policy:
    policy = load_policy("tiny", lora=LoraSpec(r=4), device="cpu", seed=seed, **options)
    if trained:
        perturb(policy)
    return policy


def perturb(policy: Policy, scale: float = 0.2) -> None:
    rng = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in policy.trainable_parameters():
            p.add_(scale * torch.randn(p.shape, generator=rng))


def logits(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = policy.model(input_ids=torch.tensor([[1, 5, 9, 12, 40]])).logits
    return found


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    head = policy.value_head.state_dict() if policy.value_head is not None else {}
    return {**policy.model.state_dict(), **{f"head.{k}": v for k, v in head.items()}}


def assert_equal_weights(a: Policy, b: Policy) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key


# -- text


def test_text_round_trips_and_atoms_are_single_tokens() -> None:
    policy = small()
    assert policy.decode(policy.encode(ODD)) == ODD
    for atom in ATOMS:
        assert len(policy.encode(atom)) == 1
    ids = policy.encode("a<search>b</search>c")
    assert [policy.decode([i]) for i in ids] == ["a", "<search>", "b", "</search>", "c"]
    # Atoms are text, not control tokens: they survive where special tokens are dropped.
    assert policy.tokenizer.decode(policy.encode("<answer>x"), skip_special_tokens=True) == "<answer>x"
    assert not set(ATOMS) & set(policy.control_tokens)


def test_a_lone_surrogate_is_replaced_instead_of_failing() -> None:
    policy = small()
    assert policy.decode(policy.encode("a\ud800b")) == "a?b"
    assert policy.decode(policy.render([{"role": "user", "content": "a\ud800b"}])) == "a?b\n"


def test_training_a_tokenizer_learns_merges_and_reserves_atoms() -> None:
    texts = ["the cat sat on the mat"] * 20
    tokenizer = train_bpe(texts, 300, words=("Lima",))
    assert len(tokenizer) <= 300
    assert len(tokenizer.encode("the cat")) < len("the cat")
    assert len(tokenizer.encode("Lima")) == 1
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")
    assert train_bpe(texts, 300, words=("Lima",)).get_vocab() == tokenizer.get_vocab()
    assert ATOMS[0] not in train_bpe(texts, 300, atoms=()).get_vocab()
    with pytest.raises(ConfigError, match="vocab_size must be at least 266"):
        train_bpe(texts, 265)


def test_render_uses_the_template_and_adds_the_generation_prompt() -> None:
    policy = small()
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "?"}]
    assert policy.decode(policy.render(chat)) == "hi\nyo\n<eos>?\n"
    bare = policy.tokenizer
    bare.chat_template = None
    assert Policy(policy.model, bare).decode(Policy(policy.model, bare).render(chat)) == (
        "user: hi\nassistant: yo\nuser: ?\nassistant:"
    )
    bare.chat_template = "{{ '[' + messages[0]['content'] + ']' }}{% if add_generation_prompt %}>{% endif %}"
    assert Policy(policy.model, bare).decode(policy.render(chat)) == "[hi]>"


def test_conversations_that_cannot_be_rendered_are_refused() -> None:
    policy = small()
    with pytest.raises(DataError, match="at least one message"):
        policy.render([])
    policy.tokenizer.chat_template = "{% for m in messages %}{% endfor %}"
    with pytest.raises(DataError, match="to no tokens"):
        policy.render([{"role": "user", "content": "x"}])
    policy.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="refuses the conversation: no system role"):
        policy.render([{"role": "system", "content": "x"}])


# -- the built-in small model


def test_same_seed_same_weights_and_the_global_generator_is_untouched() -> None:
    torch.manual_seed(123)
    expected = torch.rand(1)
    torch.manual_seed(123)
    first, again, other = small(seed=4), small(seed=4), small(seed=5)
    assert torch.equal(torch.rand(1), expected)
    assert_equal_weights(first, again)
    assert not torch.equal(logits(first), logits(other))
    assert not first.model.training
    assert first.model.config._attn_implementation == "sdpa"
    assert first.dtype == torch.float32


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="hidden must be a multiple of heads"):
        tiny_policy(hidden=30, heads=4)
    assert small(max_context=77).max_context == 77


# -- value head


def test_a_value_head_starts_at_zero_and_is_trainable() -> None:
    policy = small(value_head=True)
    (batch,) = make_batches([([1, 2], [3, 4])], groups=None, max_tokens=8)
    values = token_logprobs(policy, batch, values=True).values
    assert values is not None and values.tolist() == [0.0, 0.0]
    values.sum().backward()
    assert policy.value_head is not None
    assert {id(p) for p in policy.value_head.parameters()} <= {id(p) for p in policy.trainable_parameters()}
    assert all(p.grad is not None for p in policy.value_head.parameters())


# -- references and adapters


def test_a_reference_does_not_follow_the_policy_and_asks_for_no_gradient() -> None:
    policy = small()
    reference, before = policy.reference(), logits(policy)
    perturb(policy)
    assert torch.equal(logits(reference), before) and not torch.equal(logits(policy), before)
    assert reference.trainable_parameters() == []


def test_the_reference_of_adapters_is_the_base_and_shares_its_memory() -> None:
    base = tiny_policy(seed=3)
    policy = adapted(seed=3)
    reference = policy.reference()
    assert torch.equal(logits(reference), logits(base))
    assert not torch.allclose(logits(policy), logits(base), atol=1e-3)
    assert reference.trainable_parameters() == []
    assert not reference.adapted
    storages = {p.data_ptr() for p in policy.model.parameters()}
    assert all(p.data_ptr() in storages for p in reference.model.parameters())


def test_running_the_reference_leaves_the_policys_gradients_alone() -> None:
    (batch,) = make_batches([([1, 2], [3, 4]), ([1, 2], [5])], groups=[0, 0], max_tokens=99)
    grads = []
    for also_reference in (False, True):
        policy = adapted()
        reference = policy.reference()
        loss = token_logprobs(policy, batch).logprobs.sum()
        if also_reference:
            out = token_logprobs(reference, batch).logprobs
            assert not out.requires_grad
        loss.backward()
        grads.append([p.grad for p in policy.trainable_parameters()])
    assert len(grads[0]) > 0
    for a, b in zip(*grads, strict=True):
        assert a is not None and torch.equal(a, b)


def test_adapters_start_as_the_identity_and_are_all_that_is_trained() -> None:
    policy = adapted(seed=2, trained=False)
    assert torch.equal(logits(policy), logits(tiny_policy(seed=2)))
    names = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in n for n in names)
    assert sum(p.numel() for p in policy.trainable_parameters()) < 0.2 * sum(
        p.numel() for p in policy.model.parameters()
    )


def test_merged_weights_compute_what_the_adapters_computed() -> None:
    policy = adapted(value_head=True)
    before = logits(policy)
    merged = policy.merged()
    assert not merged.adapted
    torch.testing.assert_close(logits(merged), before, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(policy), before)
    assert merged.value_head is not None and merged.value_head is not policy.value_head
    plain = small()
    assert plain.merged() is plain


def test_bad_adapter_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora.r must be at least 1, got 0"):
        LoraSpec(r=0)
    with pytest.raises(ConfigError, match=r"lora.dropout must be in \[0, 1\), got 1"):
        LoraSpec(dropout=1.0)
    with pytest.raises(ConfigError, match="fits no module"):
        add_lora(small().model, LoraSpec(targets=("nothing",)))


# -- saving and loading


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["full", "adapted"])
def test_what_is_saved_comes_back_bit_equal(kind: str, dtype: str, tmp_path: Path) -> None:
    if kind == "full":
        small(seed=7).save(tmp_path / "base")
        policy = load_policy(tmp_path / "base", value_head=True, device="cpu", dtype=dtype)
        perturb(policy)
    else:
        policy = adapted(seed=7, value_head=True, dtype=dtype)
    folder = policy.save(tmp_path / "p")
    loaded = Policy.load(folder, device="cpu")
    assert_equal_weights(policy, loaded)
    assert torch.equal(logits(policy), logits(loaded))
    assert (loaded.max_context, loaded.name, loaded.adapted) == (policy.max_context, policy.name, policy.adapted)
    assert loaded.render([{"role": "user", "content": ODD}]) == policy.render([{"role": "user", "content": ODD}])
    assert [p.shape for p in loaded.trainable_parameters()] == [p.shape for p in policy.trainable_parameters()]
    assert not loaded.model.training
    # A second generation of the same: nothing is lost on the way.
    loaded.save(tmp_path / "q")
    assert_equal_weights(policy, Policy.load(tmp_path / "q", device="cpu"))


def test_saving_again_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    first, second = small(seed=1, value_head=True), small(seed=2)
    first.save(tmp_path / "p")
    second.save(tmp_path / "p")
    assert_equal_weights(Policy.load(tmp_path / "p", device="cpu"), second)
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize("failing", ["tokenizer", "rename"])
def test_a_save_that_fails_leaves_the_old_one_and_nothing_half_written(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = small(seed=1)
    old.save(tmp_path / "p")
    new = small(seed=2)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    if failing == "tokenizer":
        monkeypatch.setattr(type(new.tokenizer), "save_pretrained", full)
    else:
        import os

        rename = os.replace
        monkeypatch.setattr(
            "guerdon.policies.policy.os.replace",
            lambda a, b: full() if Path(b) == tmp_path / "p" and not str(a).endswith(".old") else rename(a, b),
        )
    with pytest.raises(CheckpointError, match=r"cannot write the policy to .*No space left on device"):
        new.save(tmp_path / "p")
    monkeypatch.undo()
    assert_equal_weights(Policy.load(tmp_path / "p", device="cpu"), old)
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00garbage"),
        ("model.safetensors", None),
        ("config.json", b"{"),
        ("config.json", None),
        ("config.json", b'{"model_type": "no-such-thing"}'),
        ("tokenizer.json", b"{}"),
        ("guerdon.json", b"not json"),
        ("guerdon.json", b"[]"),
        ("value_head.safetensors", b"garbage"),
    ],
)
def test_a_damaged_folder_is_named(file: str, content: bytes | None, tmp_path: Path) -> None:
    folder = small(value_head=True).save(tmp_path / "p")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    for load in (Policy.load, load_policy):
        with pytest.raises(CheckpointError, match=str(folder)) as caught:
            load(folder, device="cpu")
        assert "\n" not in str(caught.value)


def test_truncated_weights_are_noticed(tmp_path: Path) -> None:
    folder = small().save(tmp_path / "p")
    weights_file = folder / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match="no readable model"):
        Policy.load(folder)


def test_missing_tensors_are_not_filled_with_noise(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = small().save(tmp_path / "p")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        Policy.load(folder)


def test_an_absent_folder_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        Policy.load(tmp_path / "nothing")


# -- adapters find their base


def test_adapters_on_a_folder_are_small_and_name_their_base(tmp_path: Path) -> None:
    base = tiny_policy(seed=1, layers=1)
    base.save(tmp_path / "base")
    policy = load_policy(tmp_path / "base", lora=LoraSpec(r=2), device="cpu")
    folder = policy.save(tmp_path / "p")
    assert json.loads((folder / "guerdon.json").read_text())["base"] == str((tmp_path / "base").resolve())
    assert not (folder / "base").exists()
    assert_equal_weights(Policy.load(folder, device="cpu"), policy)
    # Another model at that place is not what the adapters were trained on.
    tiny_policy(seed=2, layers=1).save(tmp_path / "base")
    with pytest.raises(CheckpointError, match="whose weights are others now"):
        Policy.load(folder, device="cpu")


def test_adapters_whose_base_is_gone_say_so(tmp_path: Path) -> None:
    small().save(tmp_path / "base")
    folder = load_policy(tmp_path / "base", lora=LoraSpec(r=2), device="cpu").save(tmp_path / "p")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"holds adapters for .*base.*does not exist"):
        Policy.load(folder, device="cpu")


def test_adapters_on_a_model_without_a_name_carry_it_along(tmp_path: Path) -> None:
    base = small(seed=11, texts=["a tokenizer of its own"])
    policy = Policy(add_lora(base.model, LoraSpec(r=2)), base.tokenizer, name="mine")
    perturb(policy)
    loaded = Policy.load(policy.save(tmp_path / "p"), device="cpu")
    assert_equal_weights(loaded, policy)
    assert loaded.encode("a tokenizer") == base.encode("a tokenizer")


def test_adapters_are_not_stacked(tmp_path: Path) -> None:
    folder = adapted().save(tmp_path / "p")
    with pytest.raises(ConfigError, match="already carries adapters"):
        load_policy(folder, lora=LoraSpec(), device="cpu")
