"""The update against an independent plain-torch reference, and what may never change it.

The reference computes every trajectory alone, unpacked, in float64, with loops over tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from guerdon.policies import tiny_policy
from guerdon.training.batching import rows_to_share
from guerdon.training.config import OnlineConfig
from guerdon.training.learner import Learner
from guerdon.training.optimise import TrainingError
from guerdon.training.streams import Experience, collect, grpo_streams, normalise, ppo_streams, weigh
from guerdon.training.timing import Phases
from guerdon.training.toys import toy_texts
from guerdon.types import Group, Score, StopReason, Task, Trajectory, Turn

TEMPERATURE = 0.8


def float64_policy(seed: int):
    made = tiny_policy(texts=toy_texts(), hidden=32, layers=2, heads=2, seed=seed, value_head=True)
    made.model.double()
    made.value_head.double()
    return made


@pytest.fixture(scope="module")
def policy():
    return float64_policy(1)


def logits_and_values(policy, trajectory: Trajectory):
    """[T, V] logits and [T] values that predict each response token, from one plain forward pass."""
    response = [i for turn in trajectory.turns for i in turn.token_ids]
    ids = torch.tensor([[*trajectory.prompt_ids, *response]])
    out = policy.model(input_ids=ids, output_hidden_states=True)
    cut = slice(len(trajectory.prompt_ids) - 1, -1)
    return out.logits[0, cut], policy.value_head(out.hidden_states[-1][0, cut]).squeeze(-1), torch.tensor(response)


def make_groups(policy, *, groups=3, size=4, noise=0.0, seed=0, trailing=False) -> list[Group]:
    """Random trajectories: policy, environment, policy (and, with ``trailing``, environment again)."""
    rng = np.random.default_rng(seed)
    vocabulary = policy.model.config.vocab_size
    out = []
    for g in range(groups):
        prompt = tuple(int(i) for i in rng.integers(0, vocabulary, 3 + g))
        rows = []
        for _ in range(size):
            speakers = ["policy", "environment", "policy"] + ["environment"] * trailing
            turns = [
                Turn(s, "x", ids := tuple(int(i) for i in rng.integers(0, vocabulary, rng.integers(1, 6))),
                     logprobs=(0.0,) * len(ids) if s == "policy" else None)
                for s in speakers
            ]  # fmt: skip
            rows.append(Trajectory(Task(f"t{g}", "q"), tuple(turns), StopReason.DONE, prompt_ids=prompt))
        out.append(Group(rows[0].task, tuple(record(policy, row, noise, rng) for row in rows)))
    return out


@torch.no_grad()
def record(policy, trajectory: Trajectory, noise: float, rng) -> Trajectory:
    """Fill in sampling log-probabilities: the policy's own, displaced by ``noise``."""
    logits, _, response = logits_and_values(policy, trajectory)
    logprobs = torch.log_softmax(logits / TEMPERATURE, -1).gather(1, response[:, None])[:, 0].tolist()
    turns, at = [], 0
    for turn in trajectory.turns:
        own = [x + noise * float(rng.normal()) for x in logprobs[at : at + len(turn)]]
        at += len(turn)
        turns.append(replace(turn, logprobs=tuple(own)) if turn.speaker == "policy" else turn)
    return replace(trajectory, turns=tuple(turns))


def rewards_for(groups, seed=5) -> list[Score]:
    rng = np.random.default_rng(seed)
    return [Score(float(rng.normal())) for g in groups for _ in g.trajectories]


def spied(policy, config: OnlineConfig, groups, scores, *, critic=None, reference=None, edit=None, **collecting):
    """Run one update whose optimiser only looks; return its row and the gradients by name."""
    learner = Learner(policy, config, critic=critic, reference=reference)
    experience = collect(groups, scores, credit_all=config.whiten == "response", **collecting)
    mismatch = learner.prepare(experience, Phases())
    streams = {"grpo": grpo_streams, "ppo": ppo_streams}[config.algorithm](experience, config)
    if edit is not None:
        edit(streams, experience)
    gradients: dict[str, torch.Tensor] = {}

    def look(scale: float, *, where: str) -> dict[str, float]:
        for name, parameter in [*policy.model.named_parameters(), *policy.value_head.named_parameters(prefix="head")]:
            if parameter.grad is not None:
                gradients[name] = gradients.get(name, 0) + parameter.grad.clone()
        return {}

    learner.optimiser.step = look  # type: ignore[method-assign]
    row = learner.update(experience, streams, mismatch, step=0, total=config.steps, phases=Phases())
    learner.optimiser.zero_grad()
    return SimpleNamespace(row=row, gradients=gradients, experience=experience, streams=streams)


def reference_gradients(policy, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict([*policy.model.named_parameters(), *policy.value_head.named_parameters(prefix="head")])
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert {k for k, g in a.items() if g.abs().max() > 1e-9} == {k for k, g in b.items() if g.abs().max() > 1e-9}
    scale = max(float(g.abs().max()) for g in b.values())
    for name in b:
        if name in a:
            assert float((a[name] - b[name]).abs().max()) < tolerance * scale, name


def per_token(policy, trajectory: Trajectory):
    """Lists over response tokens: log-probability, entropy, value, whether the policy said it, sampled."""
    logits, values, response = logits_and_values(policy, trajectory)
    logs = torch.log_softmax(logits / TEMPERATURE, -1)
    action = [t.speaker == "policy" for t in trajectory.turns for _ in t.token_ids]
    sampled = [x for t in trajectory.turns for x in (t.logprobs or (0.0,) * len(t))]
    return logs.gather(1, response[:, None])[:, 0], -(logs.exp() * logs).sum(-1), values, action, sampled


def test_grpo_loss_and_gradient_equal_the_plain_reference(policy) -> None:
    groups = make_groups(policy, noise=0.3)
    scores = rewards_for(groups)
    other = float64_policy(9)
    config = OnlineConfig(
        temperature=TEMPERATURE, clip_low=0.1, clip_high=0.3, kl_coef=0.05, kl_kind="k3", entropy_coef=0.02
    )
    got = spied(policy, config, groups, scores, reference=other)

    policy_sum = entropy_sum = kl_sum = torch.zeros((), dtype=torch.float64)
    count, index = 0, 0
    for group in groups:
        values = [scores[index + k].value for k in range(len(group))]
        mean = sum(values) / len(values)
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        index += len(group)
        for value, trajectory in zip(values, group.trajectories, strict=True):
            advantage = (value - mean) / std
            logprobs, entropy, _, action, sampled = per_token(policy, trajectory)
            with torch.no_grad():
                theirs = per_token(other, trajectory)[0]
            for t in [t for t, said in enumerate(action) if said]:
                ratio = (logprobs[t] - sampled[t]).exp()
                clipped = ratio.clamp(0.9, 1.3)
                policy_sum = policy_sum - torch.minimum(ratio * advantage, clipped * advantage)
                entropy_sum = entropy_sum + entropy[t]
                away = theirs[t] - logprobs[t]
                kl_sum = kl_sum + away.exp() - 1 - away
                count += 1
    loss = (policy_sum - 0.02 * entropy_sum + 0.05 * kl_sum) / count
    assert got.row["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert got.row["clip_fraction"] > 0.05
    assert_same(got.gradients, reference_gradients(policy, loss), 1e-4)


def test_ppo_equals_the_spec_with_clip_value_clip_and_kl_in_the_reward(policy) -> None:
    groups = make_groups(policy, groups=2, size=3, noise=0.3, seed=3)
    scores = rewards_for(groups, seed=8)
    other = float64_policy(9)
    gamma, lam, beta = 0.9, 0.8, 0.1
    config = OnlineConfig(
        algorithm="ppo", temperature=TEMPERATURE, gamma=gamma, lam=lam, kl_coef=beta, kl_in="reward", kl_kind="k1",
        value_clip=0.5, value_coef=0.7, clip_low=0.2, clip_high=0.2,
    )  # fmt: skip
    shift = 0.8  # as if the critic had moved since sampling, so that its clip is at work

    def displace(streams, experience) -> None:
        experience.values = experience.values + shift

    got = spied(policy, config, groups, scores, critic=policy, reference=other, edit=displace)

    total_policy = total_value = torch.zeros((), dtype=torch.float64)
    count = 0
    for trajectory, score in zip([t for g in groups for t in g.trajectories], scores, strict=True):
        logprobs, _, values, action, sampled = per_token(policy, trajectory)
        with torch.no_grad():
            theirs = per_token(other, trajectory)[0]
        steps = [t for t, said in enumerate(action) if said]
        rewards = [-beta * (sampled[t] - float(theirs[t])) for t in steps]
        rewards[-1] += score.value
        old_values = [float(values[t].detach()) for t in steps]
        advantages, running = [0.0] * len(steps), 0.0
        for k in reversed(range(len(steps))):
            following = old_values[k + 1] if k + 1 < len(steps) else 0.0
            running = rewards[k] + gamma * following - old_values[k] + gamma * lam * running
            advantages[k] = running
        for k, t in enumerate(steps):
            ratio = (logprobs[t] - sampled[t]).exp()
            total_policy = total_policy - torch.minimum(ratio * advantages[k], ratio.clamp(0.8, 1.2) * advantages[k])
            target = advantages[k] + old_values[k]
            anchor = old_values[k] + shift
            near = anchor + (values[t] - anchor).clamp(-0.5, 0.5)
            total_value = total_value + 0.5 * torch.maximum((values[t] - target) ** 2, (near - target) ** 2)
            count += 1
    loss = (total_policy + 0.7 * total_value) / count
    assert got.row["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert_same(got.gradients, reference_gradients(policy, loss), 1e-4)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_loss_and_gradient_do_not_depend_on_the_micro_batches(policy, aggregation: str, algorithm: str) -> None:
    groups = make_groups(policy, noise=0.2)
    scores = rewards_for(groups)
    base = {
        "algorithm": algorithm,
        "temperature": TEMPERATURE,
        "entropy_coef": 0.01,
        "aggregation": aggregation,
        **({"aggregation_length": 32} if aggregation == "constant" else {}),
    }
    critic = policy if algorithm == "ppo" else None
    whole = spied(policy, OnlineConfig(**base), groups, scores, critic=critic)
    for change in ({"max_tokens_per_microbatch": 40}, {"share_prompt": False}, {"max_tokens_per_microbatch": 1}):
        other = spied(policy, OnlineConfig(**base, **change), groups, scores, critic=critic)
        assert other.row["loss"] == pytest.approx(whole.row["loss"], rel=1e-5)
        assert_same(other.gradients, whole.gradients, 1e-5)


def test_environment_tokens_get_no_gradient_whatever_they_are_worth(policy) -> None:
    groups = make_groups(policy, noise=0.1, trailing=True)
    scores = rewards_for(groups)
    config = OnlineConfig(temperature=TEMPERATURE, entropy_coef=0.01)
    plain = spied(policy, config, groups, scores)

    def tempt(streams, experience: Experience) -> None:
        streams.advantage[~torch.from_numpy(experience.action)] = 1e6

    tempted = spied(policy, config, groups, scores, edit=tempt)
    # A last environment turn is a target and nobody's context: other tokens there must change nothing.
    swapped = [
        Group(g.task, tuple(replace(t, turns=(*t.turns[:-1], replace(t.turns[-1], token_ids=(1,) * len(t.turns[-1]))))
                            for t in g.trajectories))
        for g in groups
    ]  # fmt: skip
    other = spied(policy, config, swapped, scores)
    for result in (tempted, other):
        assert_same(result.gradients, plain.gradients, 1e-6)
    assert int(plain.row["update/tokens"]) == int(plain.experience.action.sum())


def test_groups_without_variance_are_skipped_without_changing_the_gradient(policy) -> None:
    groups = make_groups(policy)
    scores = rewards_for(groups)
    scores[4:8] = [Score(0.7)] * 4
    kept = spied(policy, OnlineConfig(temperature=TEMPERATURE, skip_zero_variance=False), groups, scores)
    skipped = spied(policy, OnlineConfig(temperature=TEMPERATURE), groups, scores)
    assert skipped.streams.skip.tolist() == [False] * 4 + [True] * 4 + [False] * 4
    assert skipped.row["update/tokens"] < kept.row["update/tokens"]
    assert_same(skipped.gradients, kept.gradients, 1e-5)


def test_a_step_without_any_variance_changes_nothing(policy) -> None:
    groups = make_groups(policy)
    got = spied(policy, OnlineConfig(temperature=TEMPERATURE), groups, [Score(1.0)] * 12)
    assert got.row["update/steps"] == 0 and got.row["update/skipped"] == 1 and not got.gradients


def test_a_constant_added_to_a_groups_rewards_changes_nothing(policy) -> None:
    groups = make_groups(policy)
    scores = rewards_for(groups)
    moved = [Score(s.value + (10.0 if k < 4 else -3.0)) for k, s in enumerate(scores)]
    config = OnlineConfig(temperature=TEMPERATURE)
    assert_same(spied(policy, config, groups, moved).gradients, spied(policy, config, groups, scores).gradients, 1e-5)


def test_invalid_failed_truncated_and_silent_trajectories_are_out_of_loss_and_statistics(policy) -> None:
    groups = make_groups(policy, groups=2, size=6)
    scores = rewards_for(groups)
    rows = list(groups[0].trajectories)
    rows[1] = replace(rows[1], stop=StopReason.ERROR)
    rows[2] = replace(rows[2], stop=StopReason.MAX_TURNS)
    rows[3] = replace(rows[3], turns=(rows[3].turns[1],))
    scores[0] = Score.invalid("the judge timed out")
    groups[0] = Group(groups[0].task, tuple(rows))
    got = collect(groups, scores, mask_truncated=True)
    assert got.kept.tolist() == [False] * 4 + [True] * 8
    streams = grpo_streams(got, OnlineConfig(scale="none"))
    mean = (scores[4].value + scores[5].value) / 2
    first = streams.advantage[got.offsets[4]]
    assert float(first) == pytest.approx(scores[4].value - mean, rel=1e-5)
    for b in range(4):
        assert not streams.policy[got.offsets[b] : got.offsets[b + 1]].any()
    assert collect(groups, scores).kept.tolist() == [False, False, True, False] + [True] * 8


def test_each_term_is_divided_by_its_own_count(policy) -> None:
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 0.0])
    owner = torch.tensor([0, 0, 0, 1, 1, 2])
    assert normalise(weight, owner, "token").tolist() == pytest.approx([1 / 3, 0, 2 / 3, 1 / 3, 0, 0])
    assert normalise(weight, owner, "sequence").tolist() == pytest.approx([1 / 4, 0, 2 / 4, 1 / 2, 0, 0])
    assert normalise(weight, owner, "constant", 10).tolist() == pytest.approx([1 / 20, 0, 2 / 20, 1 / 20, 0, 0])
    assert not normalise(torch.zeros(3), owner[:3], "token").any()


def test_entropy_weights_choose_the_tokens_of_the_bonus(policy) -> None:
    groups = make_groups(policy, groups=1, size=3)
    scores = [Score(1.0), Score(0.0), Score(0.5)]
    config = OnlineConfig(temperature=TEMPERATURE, entropy_coef=0.5)

    def first_token_only(trajectory: Trajectory) -> list[float]:
        return [2.0] + [0.0] * (len(trajectory) - 1)

    got = spied(
        policy, config, groups, scores,
        edit=lambda streams, experience: weigh(streams.entropy, experience, first_token_only, "entropy"),
    )  # fmt: skip
    expected = sum(2.0 * float(per_token(policy, t)[1][0].detach()) for t in groups[0].trajectories) / 3
    assert got.row["entropy/bonus"] == pytest.approx(expected, rel=1e-5)


def test_wrong_number_of_token_weights_is_an_error(policy) -> None:
    experience = collect(make_groups(policy, groups=1), rewards_for(make_groups(policy, groups=1)))
    streams = grpo_streams(experience, OnlineConfig())
    with pytest.raises(
        ValueError, match=r"token_weights\['entropy'\] gave 1 weights for \d+ response tokens of task 't0'"
    ):
        weigh(streams.entropy, experience, lambda t: [1.0], "entropy")


def test_a_broken_stream_is_named_and_no_weight_moves(policy) -> None:
    groups = make_groups(policy, groups=1)
    scores = rewards_for(groups)
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}

    def poison(streams, experience) -> None:
        streams.advantage[0] = math.nan

    with pytest.raises(TrainingError, match=r"step 1: 1 of \d+ values of the advantage stream are not finite"):
        spied(policy, OnlineConfig(temperature=TEMPERATURE), groups, scores, edit=poison)
    for k, v in policy.model.state_dict().items():
        assert torch.equal(v, before[k])


def test_a_gradient_that_overflows_is_refused_before_the_step() -> None:
    made = tiny_policy(texts=toy_texts(), hidden=32, layers=1, heads=2, seed=1, value_head=True)
    groups = make_groups(made, groups=1)
    learner = Learner(made, OnlineConfig(temperature=TEMPERATURE))
    experience = collect(groups, rewards_for(groups))
    learner.prepare(experience, Phases())
    streams = grpo_streams(experience, OnlineConfig())
    hook = next(made.model.parameters()).register_hook(lambda g: g * math.inf)
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    with pytest.raises(TrainingError, match="step 1, epoch 1, minibatch 1: the gradient of the policy is not finite"):
        learner.update(experience, streams, {}, step=0, total=1, phases=Phases())
    hook.remove()
    for k, v in made.model.state_dict().items():
        assert torch.equal(v, before[k])


def test_mismatch_between_sampler_and_trainer_is_measured(policy) -> None:
    exact = spied(policy, OnlineConfig(temperature=TEMPERATURE), groups := make_groups(policy), rewards_for(groups))
    assert exact.row["mismatch/max"] < 1e-5
    off = make_groups(policy, noise=0.5)
    noisy = spied(policy, OnlineConfig(temperature=TEMPERATURE), off, rewards_for(off))
    assert noisy.row["mismatch/mean"] == pytest.approx(0.5 * math.sqrt(2 / math.pi), rel=0.3)


def test_recomputed_old_logprobs_make_every_ratio_one(policy) -> None:
    groups = make_groups(policy, noise=0.5)
    config = OnlineConfig(temperature=TEMPERATURE, old_logprobs="recomputed")
    got = spied(policy, config, groups, rewards_for(groups))
    assert got.row["kl_old"] == pytest.approx(0.0, abs=1e-8) and got.row["clip_fraction"] == 0.0
    assert got.row["mismatch/mean"] > 0.2


@pytest.mark.parametrize("more", [{}, {"clip_high": 0.28, "entropy_coef": 0.02}])
def test_one_update_on_recomputed_log_probabilities_needs_no_pass_of_its_own(policy, monkeypatch, more) -> None:
    groups = make_groups(policy, noise=0.5)
    config = OnlineConfig(temperature=TEMPERATURE, old_logprobs="recomputed", **more)
    passes: list[str] = []
    forward = Learner._forward
    monkeypatch.setattr(Learner, "_forward", lambda self, *a, **k: (passes.append("extra"), forward(self, *a, **k))[1])
    short = spied(policy, config, groups, rewards_for(groups))
    assert passes == []
    monkeypatch.setattr(Learner, "_once", lambda self, experience: False)
    long = spied(policy, config, groups, rewards_for(groups))
    assert passes == ["extra"]
    assert_same(short.gradients, long.gradients)
    for key in ("loss", "mismatch/mean", "clip_fraction"):
        assert short.row[key] == pytest.approx(long.row[key], abs=1e-6), key


@pytest.mark.parametrize("more", [{"epochs": 2}, {"minibatch_size": 4}, {"importance_cap": 2.0}])
def test_old_log_probabilities_are_recomputed_before_several_updates(policy, monkeypatch, more) -> None:
    groups = make_groups(policy, groups=3, size=4)
    passes: list[str] = []
    forward = Learner._forward
    monkeypatch.setattr(Learner, "_forward", lambda self, *a, **k: (passes.append("extra"), forward(self, *a, **k))[1])
    config = OnlineConfig(temperature=TEMPERATURE, old_logprobs="recomputed", group_size=4, **more)
    spied(policy, config, groups, rewards_for(groups))
    assert passes == ["extra"]


def test_whitening_over_all_response_tokens_is_the_faithful_option(policy) -> None:
    groups = make_groups(policy, groups=2, size=3, seed=4)
    scores = rewards_for(groups)
    base = {"algorithm": "ppo", "temperature": TEMPERATURE}
    for how in ("action", "response"):
        got = spied(policy, OnlineConfig(**base, whiten=how), groups, scores, critic=policy)
        over = got.experience.action if how == "action" else np.ones_like(got.experience.action)
        chosen = got.streams.advantage[torch.from_numpy(over)]
        assert float(chosen.mean()) == pytest.approx(0.0, abs=1e-5)
        assert float(chosen.std()) == pytest.approx(1.0, abs=0.05)
        assert not got.streams.policy[~torch.from_numpy(got.experience.action)].any()


def test_minibatches_cover_every_trajectory_once_and_keep_groups_together(policy) -> None:
    groups = make_groups(policy, groups=4, size=4)
    config = OnlineConfig(prompts_per_step=4, group_size=4, minibatch_size=8, temperature=TEMPERATURE)
    learner = Learner(policy, config)
    experience = collect(groups, rewards_for(groups))
    first = learner._minibatches(experience, step=0, epoch=0)
    assert sorted(np.concatenate(first).tolist()) == list(range(16))
    assert all(len(set(experience.group[m])) == 2 for m in first)
    again = learner._minibatches(experience, step=0, epoch=0)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    other = learner._minibatches(experience, step=0, epoch=1)
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_rows_are_shared_where_that_saves_work() -> None:
    def rows(prompt: int, attention: float) -> list[int]:
        items = [([1] * prompt, [2] * n) for n in (9, 10, 11, 12)] + [([3] * prompt, [2] * 10)]
        return rows_to_share(items, [0, 0, 0, 0, 0], attention)

    shared = rows(prompt=500, attention=1e-4)
    assert len(set(shared[:4])) == 1 and shared[4] not in shared[:4]
    assert len(set(rows(prompt=2, attention=0.1))) == 5
    halves = rows(prompt=60, attention=0.01)
    assert len(set(halves[:4])) in (1, 2) and halves[4] not in halves[:4]
