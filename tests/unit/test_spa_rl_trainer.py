"""Credit from rewards of turns, against slow float64 references, and in the trainer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from guerdon.environments.gridworld_text import GridWorld, ReachGoal, grid_tasks, grid_words
from guerdon.errors import ConfigError, RewardError
from guerdon.policies import tiny_policy, train_bpe
from guerdon.reward_models import ProgressEstimator, ProgressReward, TurnReward
from guerdon.rollout import TransformersEngine
from guerdon.training import OnlineConfig, OnlineTrainer
from guerdon.training.rules.progress import ProgressCredit, adapt_kl, update_offline
from guerdon.training.streams import Streams, collect
from guerdon.types import Group, Score, Span, StopReason, Task, Trajectory, Turn

torch.set_num_threads(1)


def trajectory(*lengths: int) -> Trajectory:
    """Policy turns of these lengths, each followed by two tokens of the environment."""
    turns = []
    for n in lengths:
        turns.append(Turn("policy", "p" * n, tuple(range(n)), (-1.0,) * n))
        turns.append(Turn("environment", "ee", (7, 8)))
    return Trajectory(Task("t", "go"), tuple(turns), StopReason.DONE, prompt_ids=(1, 2))


def score(made: Trajectory, *steps: float, value: float = 99.0) -> Score:
    spans, at = [], 0
    for turn in made.turns:
        if turn.speaker == "policy":
            spans.append(Span(at, at + len(turn)))
        at += len(turn)
    return Score(value, steps, tuple(spans))


def config(algorithm: str = "ppo", **values) -> OnlineConfig:
    base = {"algorithm": algorithm, "steps": 2, "prompts_per_step": 2, "group_size": 2, "max_tokens": 2, "max_turns": 4}
    if algorithm == "ppo":
        base |= {"gamma": 0.9, "lam": 0.8}
    return OnlineConfig(**{**base, **values})


def slow_gae(rewards, values, gamma, lam):
    out, running, after = [0.0] * len(rewards), 0.0, 0.0
    for t in range(len(rewards) - 1, -1, -1):
        running = rewards[t] + gamma * after - values[t] + gamma * lam * running
        out[t], after = running, values[t]
    return out


def two():
    a, b = trajectory(2, 1), trajectory(3)
    experience = collect([Group(a.task, (a, b))], [score(a, 0.5, -0.2), score(b, 1.5)])
    experience.values = torch.linspace(-0.3, 0.4, len(experience.action))
    experience.old = experience.sampled
    return experience


def test_with_a_critic_rewards_stand_on_turn_ends_and_the_outcome_is_not_paid():
    experience = two()
    made = ProgressCredit()(experience, config())
    assert isinstance(made, Streams)
    # a: policy tokens at 0, 1 and 4; b begins at 7 and has 7, 8, 9.
    for at, rewards in (([0, 1, 4], [0.0, 0.5, -0.2]), ([7, 8, 9], [0.0, 0.0, 1.5])):
        values = experience.values[at].double().tolist()
        want = slow_gae(rewards, values, 0.9, 0.8)
        assert made.advantage[at].tolist() == pytest.approx(want, abs=1e-6)
        assert made.target[at].tolist() == pytest.approx([w + v for w, v in zip(want, values, strict=True)], abs=1e-6)
    off = [i for i in range(len(experience.action)) if not experience.action[i]]
    for stream in (made.advantage, made.policy, made.entropy, made.kl, made.value, made.target):
        assert stream[off].abs().sum() == 0, "the environment's tokens are no steps"


def test_the_kl_penalty_is_paid_per_token_and_its_coefficient_adapted():
    experience = two()
    experience.reference = experience.old - torch.linspace(0.0, 0.1, len(experience.action))
    settings = config(kl_coef=0.5, kl_in="reward", kl_kind="k1", gamma=1.0, lam=1.0)
    plain = ProgressCredit()(two(), config(gamma=1.0, lam=1.0))
    rule = ProgressCredit(kl_target=0.02, kl_horizon=12.0)
    assert list(rule.conflicts(settings)) == [] and "kl_coef > 0" in next(iter(rule.conflicts(config())))
    made = rule(experience, settings)
    kl = (experience.old - experience.reference).double()
    # With gamma = lambda = 1 the first token of b loses the sum of what all of b's tokens pay.
    assert float(plain.advantage[7] - made.advantage[7]) == pytest.approx(0.5 * float(kl[7:10].sum()), abs=1e-6)
    mean = float(kl[[0, 1, 4, 7, 8, 9]].mean())
    want = 0.5 * (1 + max(-0.2, min(0.2, mean / 0.02 - 1)) * 6 / 12)
    assert rule.kl_coef == pytest.approx(want) and want > 0.5
    again = rule(experience, settings)
    assert float(plain.advantage[7] - again.advantage[7]) == pytest.approx(want * float(kl[7:10].sum()), abs=1e-6)
    other = ProgressCredit(kl_target=0.02)
    other.load_state_dict(rule.state_dict())
    assert other.kl_coef == rule.kl_coef


def test_adapt_kl():
    assert adapt_kl(0.1, 0.02, 0.02, 100, 1000) == pytest.approx(0.1)
    assert adapt_kl(0.1, 9.0, 0.02, 100, 1000) == pytest.approx(0.1 * 1.02), "at most a fifth per horizon"
    assert adapt_kl(0.1, 0.0, 0.02, 10**9, 1000) == pytest.approx(0.08), "and never below zero"


def slow_group(rows, gamma):
    """Return-to-go minus the others' mean return-to-go from the same turn on, 0 for those that had ended."""
    togo = []
    for row in rows:
        out, running = [], 0.0
        for r in reversed(row):
            running = r + gamma * running
            out.insert(0, running)
        togo.append(out)
    return [
        [
            g[t] - sum(togo[j][t] if t < len(togo[j]) else 0.0 for j in range(len(rows)) if j != i) / (len(rows) - 1)
            for t in range(len(g))
        ]
        for i, g in enumerate(togo)
    ]


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_against_the_group_every_token_of_a_turn_gets_its_return_to_go(gamma):
    made = [trajectory(2, 1), trajectory(3), trajectory(1, 1, 2)]
    rows = [[0.5, -0.2], [1.5], [0.1, 0.0, 0.4]]
    scores = [score(t, *r) for t, r in zip(made, rows, strict=True)]
    experience = collect([Group(made[0].task, tuple(made))], scores)
    advantage = ProgressCredit("group", gamma=gamma)(experience, config("grpo"))
    want = slow_group(rows, gamma)
    expected = np.zeros(len(experience.action))
    for b, (one, row) in enumerate(zip(scores, want, strict=True)):
        for span, a in zip(one.step_spans, row, strict=True):
            expected[experience.offsets[b] + span.start : experience.offsets[b] + span.stop] = a
    assert advantage.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    scaled = ProgressCredit("group", gamma=gamma, scale=True)(experience, config("grpo"))
    std = float(np.std([sum(r) for r in rows], ddof=1))
    assert scaled.tolist() == pytest.approx((expected / (std + 1e-6)).tolist(), abs=1e-6)


def test_a_group_of_one_and_a_dropped_member_get_nothing():
    a, b = trajectory(1), trajectory(2)
    experience = collect([Group(a.task, (a, b))], [score(a, 1.0), Score.invalid("no")])
    for scale in (False, True):
        advantage = ProgressCredit("group", scale=scale)(experience, config("grpo"))
        assert advantage.abs().sum() == 0 and bool(torch.isfinite(advantage).all())
    nothing = collect([], [])
    assert ProgressCredit("group", scale=True)(nothing, config("grpo")).shape == (0,)


def test_the_rule_says_what_it_needs_and_refuses_the_rest():
    assert ProgressCredit().needs == {"steps", "critic"} and ProgressCredit("group").needs == {"steps", "group"}
    with pytest.raises(ConfigError, match="baseline"):
        ProgressCredit("mean")
    with pytest.raises(ConfigError, match="baseline='critic'"):
        ProgressCredit("group", kl_target=0.1)
    with pytest.raises(ConfigError, match="baseline='group'"):
        ProgressCredit(gamma=0.5)
    with pytest.raises(ConfigError, match="kl_target"):
        ProgressCredit(kl_target=0.0)
    with pytest.raises(ConfigError, match="gamma"):
        ProgressCredit("group", gamma=1.5)
    experience = two()
    experience.values = None
    with pytest.raises(ConfigError, match="critic"):
        ProgressCredit()(experience, config())
    with pytest.raises(ConfigError, match="kl_coef > 0"):
        ProgressCredit(kl_target=0.1)(two(), config())
    a = trajectory(1)
    with pytest.raises(RewardError, match="no step values"):
        ProgressCredit("group")(collect([Group(a.task, (a, a))], [Score(1.0)] * 2), config("grpo"))


# In the trainer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words():
    known = grid_words()
    return train_bpe(["\n"], vocab_size=258 + len(known), atoms=(), words=known)


def trainer(words, reward, algorithm="ppo", **options):
    policy = tiny_policy(words, hidden=16, layers=1, heads=2, max_context=128, value_head=algorithm == "ppo", seed=1)
    critic = "shared" if algorithm == "ppo" else None
    rule = ProgressCredit("critic" if algorithm == "ppo" else "group")
    settings = config(algorithm, optimiser={"lr": 1e-3}, **options)
    return OnlineTrainer(
        policy, TransformersEngine(policy, max_slots=8), GridWorld(max_steps=4), grid_tasks(4), reward, settings,
        critic=critic, credit=rule,
    )  # fmt: skip


def rewards(words):
    policy = tiny_policy(words, hidden=16, layers=1, heads=2, max_context=128)
    estimator = ProgressEstimator(policy)
    torch.nn.init.normal_(estimator.head[-1].weight)
    return ProgressReward(estimator, ReachGoal())


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_it_trains_and_reports_grounding(words, algorithm):
    run = trainer(words, rewards(words), algorithm)
    before = {k: v.clone() for k, v in run.policy.model.state_dict().items()}
    rows = run.fit().history
    run.close()
    assert len(rows) == 2 and all(math.isfinite(r["loss"]) for r in rows)
    assert {"reward/grounding", "reward/contribution", "reward/executed"} <= rows[0].keys()
    assert any(not torch.equal(before[k], v) for k, v in run.policy.model.state_dict().items())


def test_a_reward_without_steps_is_refused(words):
    with pytest.raises((ConfigError, RewardError), match="step"):
        run = trainer(words, ReachGoal())
        run.fit()


def test_offline_the_explored_trajectories_are_the_batch(words):
    run = trainer(words, TurnReward(ReachGoal(), lambda t, r: [1.0] * t.info["steps"], beta=0.0))
    groups = run.sample(grid_tasks(2, seed=5), seed=3, group_size=2)
    flat = [t for g in groups for t in g.trajectories]
    before = {k: v.clone() for k, v in run.policy.model.state_dict().items()}
    row = update_offline(run, groups, run.reward(flat), run.credit)
    run.close()
    assert row["update/steps"] == 1 and run.step == 0
    assert any(not torch.equal(before[k], v) for k, v in run.policy.model.state_dict().items())
