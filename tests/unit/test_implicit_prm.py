"""The implicit reward model: exact values and updates against a plain reference, spans, masks, and refusals."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from guerdon.errors import CheckpointError, ConfigError, DataError, TrainingError
from guerdon.policies import LoraSpec, Policy, load_policy, tiny_policy, train_bpe
from guerdon.reward_models import ImplicitPRM
from guerdon.types import Segmenter, StopReason, Task, Trajectory, Turn

torch.set_num_threads(1)

TEXTS = ["one plus two is three\n\nso the answer is three", "four minus one\n\nis three indeed. \n\n done"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 300, atoms=())


def make(tokenizer, seed: int = 0, dtype=torch.float32) -> Policy:
    policy = tiny_policy(tokenizer, hidden=16, layers=1, heads=2, seed=seed)
    policy.model.to(dtype)
    return policy


def model(tokenizer, *, seeds=(0, 1), dtype=torch.float64, **settings) -> ImplicitPRM:
    """A reward model whose reference is another network, so that rewards are not 0."""
    return ImplicitPRM(make(tokenizer, seeds[0], dtype), make(tokenizer, seeds[1], dtype), None, **settings)


def slow_logps(policy: Policy, prompt, response) -> torch.Tensor:
    """Log-probability of each response token from the full logits, with gradient."""
    ids = torch.tensor([[*prompt, *response]])
    logits = policy.model(input_ids=ids).logits[0].double()
    table = F.log_softmax(logits, -1)
    return torch.stack([table[len(prompt) - 1 + t, token] for t, token in enumerate(response)])


ITEMS = [([5, 6, 7], [8, 9, 1]), ([5, 6, 7], [10, 1]), ([9, 4], [11, 12, 13, 1]), ([9, 4], [14, 1]), ([3], [7, 7, 1])]
LABELS = [1, 0, 0, 1, 1]
PROMPTS, RESPONSES = [p for p, _ in ITEMS], [r for _, r in ITEMS]


def slow_rewards(prm: ImplicitPRM, items=ITEMS, beta=0.05) -> list[torch.Tensor]:
    return [beta * (slow_logps(prm.policy, p, r) - slow_logps(prm.reference, p, r).detach()) for p, r in items]


@pytest.mark.parametrize("budget", [16_384, 8])
def test_token_rewards_are_beta_times_the_log_ratio(tokenizer, budget):
    prm = model(tokenizer, max_tokens_per_microbatch=budget)
    for got, want in zip(prm.token_rewards(PROMPTS, RESPONSES), slow_rewards(prm), strict=True):
        assert got.dtype == torch.float64 and torch.allclose(got, want, atol=1e-8)
    (half,) = prm.token_rewards(PROMPTS[:1], RESPONSES[:1], beta=0.025)
    assert torch.allclose(2 * half, slow_rewards(prm)[0])
    (bare,) = prm.token_rewards(PROMPTS[:1], RESPONSES[:1], use_reference=False)
    assert torch.allclose(bare, 0.05 * slow_logps(prm.policy, *ITEMS[0]))


def test_a_fresh_model_gives_nothing_and_ln_2(tokenizer):
    policy = make(tokenizer)
    prm = ImplicitPRM.from_policy(policy)
    assert all(bool((r == 0).all()) for r in prm.token_rewards(PROMPTS, RESPONSES))
    prm.fit(PROMPTS, RESPONSES, LABELS, lr=1e-2)
    assert prm.report.losses[0] == pytest.approx(math.log(2), abs=1e-7)
    # The policy it came from and the reference stayed as they were.
    assert all(
        torch.equal(a, b) for a, b in zip(policy.model.parameters(), prm.reference.model.parameters(), strict=True)
    )
    assert any(bool((r != 0).any()) for r in prm.token_rewards(PROMPTS, RESPONSES))


def test_dropout_is_off_in_training_and_scoring(tokenizer):
    policy = make(tokenizer)
    policy.model.config.attention_dropout = 0.5
    for module in policy.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    prm = ImplicitPRM.from_policy(policy)
    prm.policy.model.train()
    prm.reference.model.train()
    prm.fit(PROMPTS, RESPONSES, LABELS, lr=1e-9)
    assert prm.report.losses[0] == pytest.approx(math.log(2), abs=1e-7)


def slow_loss(prm: ImplicitPRM, loss: str) -> torch.Tensor:
    r = [x.sum() for x in slow_rewards(prm)]
    sig = torch.sigmoid
    if loss == "ce":
        return sum(-torch.log(sig(x) if y else 1 - sig(x)) for x, y in zip(r, LABELS, strict=True)) / 5
    if loss in ("dpo", "nca"):
        pairs = [(r[0], r[1]), (r[3], r[2])]  # the third prompt has one class only
        if loss == "dpo":
            return sum(-torch.log(sig(w - l)) for w, l in pairs) / 2
        return sum(-(torch.log(sig(w)) + 0.5 * torch.log(sig(-w)) + 0.5 * torch.log(sig(-l))) for w, l in pairs) / 2
    # Each prompt with the nearest earlier response to another prompt, around the end of the batch.
    mixed = [(PROMPTS[i], RESPONSES[j]) for i, j in enumerate([4, 4, 1, 1, 3])]
    z0 = max(0.0, sum(x.sum().item() for x in slow_rewards(prm, mixed)) / 5)
    return sum((1 - sig(x - z0)) if y else (1 - sig(z0 - x)) for x, y in zip(r, LABELS, strict=True)) / 5


@pytest.mark.parametrize("budget", [16_384, 8])
@pytest.mark.parametrize("loss", ["ce", "dpo", "nca", "kto"])
def test_one_step_of_training_is_that_of_a_plain_reference(tokenizer, loss, budget):
    for beta_sign in (0, 1):  # both signs of KTO's reference point
        prm = model(tokenizer, seeds=(0, 1) if beta_sign else (1, 0), loss=loss, max_tokens_per_microbatch=budget)
        prm.beta = 0.05
        twin = copy.deepcopy(prm)
        want = slow_loss(twin, loss)
        optimiser = torch.optim.SGD(twin.policy.model.parameters(), lr=10.0)
        want.backward()
        torch.nn.utils.clip_grad_norm_(twin.policy.model.parameters(), 0.01)
        optimiser.step()
        # Plain descent shows the gradient itself, where Adam would blow up rounding of what is nearly 0.
        prm._optimiser = lambda lr, decay, prm=prm: torch.optim.SGD(prm.policy.model.parameters(), lr=lr)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prm.fit(PROMPTS, RESPONSES, LABELS, lr=10.0, grad_clip=0.01)
        assert prm.report.losses == pytest.approx([want.item()], abs=1e-7)
        for a, b in zip(prm.policy.model.parameters(), twin.policy.model.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("loss", ["ce", "dpo", "nca", "kto"])
def test_it_learns_to_tell_right_from_wrong(tokenizer, loss):
    prm = ImplicitPRM.from_policy(make(tokenizer), loss=loss)
    prompts, responses, labels = PROMPTS[:4] * 4, RESPONSES[:4] * 4, LABELS[:4] * 4
    prm.fit(prompts, responses, labels, lr=1e-2, epochs=20, batch_size=8)
    right, wrong, wrong2, right2 = prm.score(PROMPTS[:4], RESPONSES[:4], "sum")
    assert right > wrong and right2 > wrong2
    assert len(prm.report.losses) == 20 * (len(prompts) if loss in ("ce", "kto") else 32) // 8


def test_pairs_skip_prompts_with_one_class_and_say_so(tokenizer):
    prm = ImplicitPRM.from_policy(make(tokenizer), loss="dpo")
    with pytest.warns(UserWarning, match="1 of 3 prompts have no pair"):
        prm.fit(PROMPTS, RESPONSES, LABELS, lr=1e-3)
    assert (prm.report.skipped_prompts, prm.report.prompts, prm.report.examples) == (1, 3, 2)
    with pytest.raises(DataError, match="use loss='ce'"):
        prm.fit(PROMPTS, RESPONSES, [1] * 5)
    # All pairs of a prompt: 2 right x 2 wrong.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prm.fit([[4]] * 4, [[5, 1], [6, 1], [7, 1], [8, 1]], [1, 1, 0, 0], lr=1e-3)
    assert prm.report.examples == 4
    # One class is fine for single responses.
    ImplicitPRM.from_policy(make(tokenizer)).fit(PROMPTS, RESPONSES, [1] * 5, lr=1e-3)


def test_fit_is_repeatable_and_depends_on_the_seed(tokenizer):
    def run(seed):
        prm = ImplicitPRM.from_policy(make(tokenizer))
        prm.fit(PROMPTS, RESPONSES, LABELS, lr=1e-2, epochs=2, batch_size=2, seed=seed)
        return prm.score(PROMPTS, RESPONSES, "sum")

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_the_proposition_on_a_real_model_with_two_words():
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), eos_token="b", pad_token="b"
    )

    def lm(seed):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=2, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, initializer_range=1.0, max_position_embeddings=16, pad_token_id=1,
        )  # fmt: skip
        return LlamaForCausalLM(config).double()

    beta = 0.3
    prm = ImplicitPRM(lm(0), lm(1), words, beta=beta)
    everything = [list(y) for y in itertools.product((0, 1), repeat=3)]
    rewards = torch.stack(prm.token_rewards([[0]] * 8, everything))
    q = rewards.cumsum(1)
    assert q.abs().max() > 0.1
    ref = torch.stack([slow_logps(prm.reference, [0], y) for y in everything]).detach()
    for b, y in enumerate(everything):
        for t in range(3):
            same = [k for k, z in enumerate(everything) if z[: t + 1] == y[: t + 1]]
            mean = sum(float((ref[k, t + 1 :].sum() + rewards[k].sum() / beta).exp()) for k in same)
            assert float(q[b, t]) == pytest.approx(beta * math.log(mean), abs=1e-6)


# Text, steps, spans ---------------------------------------------------------------------------------------------------


def test_text_gets_the_template_and_the_end_token(tokenizer):
    prm = model(tokenizer)
    policy = prm.policy
    prompt = policy.render([{"role": "user", "content": "one plus"}])
    response = [*policy.encode("two is three"), tokenizer.eos_token_id]
    (got,) = prm.token_rewards(["one plus"], ["two is three"])
    assert torch.allclose(got, slow_rewards(prm, [(prompt, response)])[0])
    (same,) = prm.token_rewards([[{"role": "user", "content": "one plus"}]], [response])
    assert torch.equal(got, same)
    (said,) = prm.token_rewards(["one plus"], ["two is three<eos>"])
    assert torch.equal(got, said)  # an end token that is there already is not doubled


def test_steps_split_at_separators_which_close_the_step(tokenizer):
    prm = model(tokenizer)
    steps = ["one plus two", "is three", "done"]
    (tokens,) = prm.token_rewards(["go"], ["\n\n".join(steps)])
    (values,) = prm.step_rewards(["go"], [steps])
    (prefix,) = prm.step_rewards(["go"], [steps], mode="cumulative")
    assert (
        values.shape == (3,) and torch.allclose(values.sum(), tokens.sum()) and torch.allclose(values.cumsum(0), prefix)
    )
    # Token by token: the first step ends behind its separator, and the third begins with "done".
    said = prm.policy.encode("\n\n".join(steps))
    first = next(k for k in range(len(said)) if prm.policy.decode(said[:k]) == "one plus two\n\n")
    assert values[0].item() == pytest.approx(tokens[:first].sum().item())
    # Cut by a segmenter, the very same steps come out.
    (auto,) = prm.step_rewards([prm._trajectories(["go"], ["\n\n".join(steps)])[0]])
    assert torch.allclose(auto, values)
    assert prm.score(["go"], ["\n\n".join(steps)]).item() == pytest.approx(values.min().item())
    assert prm.score(["go"], ["\n\n".join(steps)], "mean").item() == pytest.approx(values.mean().item())
    assert prm.score(["go"], ["\n\n".join(steps)], mode="cumulative").item() == pytest.approx(prefix.min().item())
    (numbered,) = prm.step_rewards(["go"], [steps], prefix="Step {k}: ", separator="\n")
    text = "Step 1: one plus two\nStep 2: is three\nStep 3: done"
    assert numbered.sum().item() == pytest.approx(prm.token_rewards(["go"], [text])[0].sum().item())


def test_no_separator_is_one_step_and_empty_is_none(tokenizer):
    prm = model(tokenizer)
    (one,) = prm.step_rewards(["go"], [["one plus two"]])
    assert one.tolist() == pytest.approx([prm.token_rewards(["go"], ["one plus two"])[0].sum().item()])
    assert [r.tolist() for r in prm.step_rewards(["go"], [[]])] == [[]]
    assert prm.token_rewards(["go"], [""])[0].shape == (0,)
    score = prm.score(["go", "go"], ["", "one"])
    assert score[0] == 0 and torch.isfinite(score).all()
    assert prm.score([], []).shape == (0,) and prm.token_rewards([], []) == []
    with pytest.raises(DataError, match="step 1 of text-0 is blank"):
        prm.step_rewards(["go"], [["one", "  "]])
    # A step that shares its only token with its neighbour adds nothing and is still there.
    straddling = prm.step_rewards(["go"], [["th", "ree"]], separator="")[0]
    assert straddling.shape == (2,)


def conversation(prm, speaker_text):
    turns = []
    for speaker, text in speaker_text:
        ids = tuple(prm.policy.encode(text))
        ends = [len(prm.policy.decode(ids[: k + 1])) for k in range(len(ids))]
        logprobs = tuple(-1.0 for _ in ids) if speaker == "policy" else None
        turns.append(Turn(speaker, text, ids, logprobs, tuple(ends)))
    prompt = tuple(prm.policy.encode("go on"))
    return Trajectory(Task("talk", "go on"), tuple(turns), StopReason.DONE, prompt_ids=prompt)


def test_environment_tokens_are_context_only(tokenizer):
    prm = model(tokenizer)
    t = conversation(prm, [("policy", "one plus"), ("environment", " two is"), ("policy", " three")])
    (rewards,) = prm.token_rewards([t])
    ids = [i for turn in t.turns for i in turn.token_ids]
    want = slow_rewards(prm, [(list(t.prompt_ids), ids)])[0]
    a, b = len(t.turns[0]), len(t.turns[0]) + len(t.turns[1])
    assert torch.allclose(rewards[:a], want[:a]) and torch.allclose(rewards[b:], want[b:])
    assert bool((rewards[a:b] == 0).all()) and bool((want[a:b] != 0).all())
    (steps,) = prm.step_scores([t], Segmenter("turns"))
    assert steps.tolist() == pytest.approx([want[:a].sum().item(), want[b:].sum().item()])
    # Training reads the same sums.
    prm.fit([t, t], labels=[1, 1], lr=1e-9)
    assert prm.report.losses[0] == pytest.approx(-math.log(1 / (1 + math.exp(-rewards.sum().item()))))


def test_trajectories_of_another_tokenizer_are_refused(tokenizer):
    prm = model(tokenizer)
    t = conversation(prm, [("policy", "one plus")])
    turn = t.turns[0]
    other = Trajectory(t.task, (Turn("policy", "five", turn.token_ids),), StopReason.DONE, prompt_ids=t.prompt_ids)
    with pytest.raises(DataError, match="do not spell its text"):
        prm.score([other])
    far = Trajectory(t.task, (Turn("policy", "five", (100_000,)),), StopReason.DONE, prompt_ids=t.prompt_ids)
    with pytest.raises(DataError, match="outside the vocabulary"):
        prm.score([far])
    bare = Trajectory(t.task, (Turn("policy", "five"),), StopReason.DONE, prompt_ids=t.prompt_ids)
    with pytest.raises(DataError, match="no token ids"):
        prm.score([bare])
    with pytest.raises(DataError, match="no prompt ids"):
        prm.score([Trajectory(t.task, t.turns, StopReason.DONE)])
    with pytest.raises(DataError, match="trajectories are expected"):
        prm.score(["text"])


# Refusals -------------------------------------------------------------------------------------------------------------


def test_the_reference_must_be_another_model_with_the_same_words(tokenizer):
    policy = make(tokenizer)
    with pytest.raises(ConfigError, match="shares trained weights"):
        ImplicitPRM(policy, policy, None)
    with pytest.raises(ConfigError, match="shares trained weights"):
        ImplicitPRM(policy.model, policy.model, tokenizer)
    with pytest.raises(ConfigError, match="another tokenizer"):
        ImplicitPRM(policy, tiny_policy(train_bpe(["zzz yyy"] * 3, 300, atoms=("<x>",)), hidden=16, heads=2), None)
    with pytest.raises(ConfigError, match="vocabularies"):
        small = train_bpe(TEXTS, 270, atoms=())
        ImplicitPRM(policy.model, tiny_policy(tokenizer=small, hidden=16, heads=2).model, small)
    with pytest.raises(ConfigError, match="embeddings for the"):
        ImplicitPRM(tiny_policy(train_bpe(TEXTS, 270, atoms=()), hidden=16, heads=2).model, None, tokenizer)
    with pytest.raises(ConfigError, match="without a tokenizer"):
        ImplicitPRM(policy.model, None, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0}, "beta"),
        ({"beta": math.inf}, "beta"),
        ({"loss": "mse"}, "loss"),
        ({"max_tokens_per_microbatch": 0}, "max_tokens"),
    ],
)
def test_settings_out_of_range(tokenizer, settings, message):
    with pytest.raises(ConfigError, match=message):
        ImplicitPRM.from_policy(make(tokenizer), **settings)


def test_bad_training_data(tokenizer):
    prm = ImplicitPRM.from_policy(make(tokenizer))
    before = [p.clone() for p in prm.policy.model.parameters()]
    for labels, message in [([1, 0, 0.5, 1, 1], "label 2 is 0.5"), ([1, 0], r"shape \(2,\) for 5"), (None, "missing"),
                            ([1, 0, 2, 1, 1], "label 2 is 2"), ([1, 0, math.nan, 1, 1], "label 2 is nan")]:  # fmt: skip
        with pytest.raises(DataError, match=message):
            prm.fit(PROMPTS, RESPONSES, labels)
    with pytest.raises(DataError, match="no response has a token"):
        prm.fit(["go"], [""], [1])
    with pytest.raises(DataError, match="more than max_length=4"):
        prm.fit(PROMPTS, RESPONSES, LABELS, max_length=4)
    with pytest.raises(DataError, match="2 responses for 1 prompts"):
        prm.fit(["a"], ["b", "c"], [1, 0])
    with pytest.raises(DataError, match="single text"):
        prm.score("prompt", "response")
    with pytest.raises(DataError, match="text, chat messages, or token ids"):
        prm.score([[3.5]], ["a"])
    with pytest.raises(DataError, match="text, chat messages, or token ids"):
        prm.step_rewards([7], [["a"]])
    with pytest.raises(DataError, match="labels must be numbers"):
        prm.fit(PROMPTS, RESPONSES, ["yes"] * 5)
    with pytest.raises(ConfigError, match="must be positive"):
        prm.fit(PROMPTS, RESPONSES, LABELS, epochs=0)
    with pytest.raises(ConfigError, match="mode"):
        prm.step_rewards(["a"], [["b"]], mode="sum")
    with pytest.raises(DataError, match="2 responses for 1 prompts"):
        prm.step_rewards(["a"], [["b"], ["c"]])
    with pytest.raises(ValueError, match="min, sum or mean"):
        prm.score(["a"], ["b"], "max")
    assert all(torch.equal(a, b) for a, b in zip(before, prm.policy.model.parameters(), strict=True))


def test_a_loss_that_is_not_finite_changes_nothing(tokenizer):
    prm = ImplicitPRM.from_policy(make(tokenizer))
    with torch.no_grad():
        prm.policy.model.get_input_embeddings().weight[8] = math.nan
    before = [p.clone() for p in prm.policy.model.parameters()]
    with pytest.raises(TrainingError, match="not finite; no weight was changed"):
        prm.fit(PROMPTS, RESPONSES, LABELS)
    for a, b in zip(before, prm.policy.model.parameters(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_state_belongs_to_its_reference_and_settings(tokenizer):
    prm = ImplicitPRM.from_policy(make(tokenizer)).fit(PROMPTS, RESPONSES, LABELS, lr=1e-2)
    fresh = ImplicitPRM.from_policy(make(tokenizer))
    fresh.load_state_dict(prm.state_dict())
    assert torch.equal(fresh.score(PROMPTS, RESPONSES), prm.score(PROMPTS, RESPONSES))
    with pytest.raises(CheckpointError, match="reference"):
        ImplicitPRM.from_policy(make(tokenizer, seed=5)).load_state_dict(prm.state_dict())
    with pytest.raises(CheckpointError, match="beta"):
        ImplicitPRM.from_policy(make(tokenizer), beta=0.1).load_state_dict(prm.state_dict())


def test_with_adapters_only_they_learn(tokenizer, tmp_path):
    make(tokenizer).save(tmp_path / "base")
    policy = load_policy(str(tmp_path / "base"), lora=LoraSpec(r=2), device="cpu")
    prm = ImplicitPRM.from_policy(policy)
    assert all(bool((r.abs() < 1e-6).all()) for r in prm.token_rewards(PROMPTS, RESPONSES))
    prm.fit(PROMPTS, RESPONSES, LABELS, lr=1e-2, epochs=3)
    assert all("lora" in name for name in prm.state_dict()["weights"])
    assert any(bool((r.abs() > 1e-6).any()) for r in prm.token_rewards(PROMPTS, RESPONSES))
    frozen = ImplicitPRM.from_policy(make(tokenizer))
    frozen.policy.model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter that requires a gradient"):
        frozen.fit(PROMPTS, RESPONSES, LABELS)
