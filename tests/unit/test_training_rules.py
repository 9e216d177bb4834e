"""Credit rules on trajectories: where each token's advantage comes from, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from guerdon.errors import ConfigError, RewardError
from guerdon.parts import build
from guerdon.policies import tiny_policy
from guerdon.rollout import TransformersEngine
from guerdon.training import OnlineConfig, OnlineTrainer
from guerdon.training.streams import Experience, collect, grpo_streams, ppo_streams, with_credit
from guerdon.training.toys import SaidIt, Say, toy_tasks, toy_texts
from guerdon.types import Group, Score, Span, StopReason, Task, Trajectory, Turn


def trajectory(*lengths: int, task: str = "t") -> Trajectory:
    """Turns of these lengths, policy and environment in turn."""
    turns = []
    for k, n in enumerate(lengths):
        speaker = "policy" if k % 2 == 0 else "environment"
        turns.append(Turn(speaker, "x" * n, tuple(range(n)), (-1.0,) * n if speaker == "policy" else None))
    return Trajectory(Task(task, "q"), tuple(turns), StopReason.DONE, prompt_ids=(1, 2))


# a: 2 policy, 1 environment, 2 policy tokens; b: 3 policy tokens; c, alone in its group: 1 policy token
A, B, C = trajectory(2, 1, 2), trajectory(3), trajectory(1, task="u")


def experience(scores: list[Score], groups=None) -> Experience:
    groups = groups or [Group(A.task, (A, B)), Group(C.task, (C,))]
    out = collect(groups, scores)
    out.old = torch.zeros(len(out.action))
    return out


def advantages(rule, made: Experience, **settings) -> list[float]:
    streams = with_credit(build("credit", rule))(made, OnlineConfig(**settings))
    return [round(float(x), 5) for x in streams.advantage]


STEPPED = [
    Score(10.0, steps=(1.0, 3.0), step_spans=(Span(0, 2), Span(3, 5))),
    Score(20.0, steps=(2.0, 5.0), step_spans=(Span(0, 1), Span(1, 3))),
    Score(30.0, steps=(7.0,), step_spans=(Span(0, 1),)),
]


def test_the_named_rule_is_the_default_of_grpo() -> None:
    made = experience([Score(1.0), Score(4.0), Score(9.0)])
    for scale in ("std", "none"):
        plain = grpo_streams(made, OnlineConfig(scale=scale))
        named = with_credit(build("credit", {"name": "group_relative", "scale": scale == "std"}))(made, OnlineConfig())
        assert torch.equal(plain.advantage, named.advantage) and torch.equal(plain.policy, named.policy)
        assert plain.skip.tolist() == named.skip.tolist() == [False, False, True]


def test_outcomes_are_spread_over_the_policy_s_tokens() -> None:
    made = experience([Score(1.0), Score(4.0), Score(9.0)])
    assert advantages("leave_one_out", made) == [-3, -3, 0, -3, -3, 3, 3, 3, 0]
    assert advantages({"name": "reinforce", "baseline": "none"}, made) == [1, 1, 0, 1, 1, 4, 4, 4, 9]
    assert advantages({"name": "reinforce", "baseline": "batch"}, made) == [-5.5, -5.5, 0, -5.5, -5.5, -1, -1, -1, 6.5]


def test_a_running_baseline_knows_nothing_at_first_and_forgets_slowly() -> None:
    rule = build("credit", {"name": "reinforce", "baseline": "running", "decay": 0.5})
    config = OnlineConfig()
    first = rule(experience([Score(2.0), Score(4.0), Score(6.0)]), config)
    assert first[0] == 2.0 and rule.state_dict() == {"mean": 4.0}
    second = rule(experience([Score(0.0), Score(1.0), Score.invalid("x")]), config)
    assert second[0] == -4.0 and second[5] == -3.0 and second[8] == 0.0
    assert rule.state_dict() == {"mean": 0.5 * 4.0 + 0.5 * 0.5}
    again = build("credit", {"name": "reinforce", "baseline": "running"})
    again.load_state_dict(rule.state_dict())
    assert again(experience([Score(0.0)] * 3), config)[0] == -2.25


def test_channels_are_parts_of_the_score() -> None:
    scores = [Score(5.0, parts={"right": 1.0, "form": 0.0}), Score(6.0, parts={"right": 0.0, "form": 0.0}),
              Score(7.0, parts={"right": 1.0, "form": 1.0})]  # fmt: skip
    rule = {"name": "per_channel", "weights": {"right": 2.0, "form": 1.0}, "baseline": "leave_one_out"}
    assert advantages(rule, experience(scores)) == [2, 2, 0, 2, 2, -2, -2, -2, 0]
    rule["weights"] = {"value": 1.0}
    assert advantages(rule, experience(scores))[0] == -1.0
    rule["weights"] = {"wrong": 1.0}
    with pytest.raises(RewardError, match="the score of task 't' has no such part; its parts are right, form"):
        advantages(rule, experience(scores))


def test_process_supervision_by_hand() -> None:
    values = np.array([1.0, 3.0, 2.0, 5.0])
    z = (values - values.mean()) / (values.std(ddof=1) + 1e-6)
    want = [z[0] + z[1]] * 2 + [0.0] + [z[1]] * 2 + [z[2] + z[3]] + [z[3]] * 2 + [0.0]
    assert advantages("process_relative", experience(STEPPED)) == pytest.approx(want, abs=1e-5)


def test_steps_against_the_same_step_of_the_others() -> None:
    # returns-to-go: a 4, 3; b 7, 5; c 7, with nobody to compare with
    assert advantages("step_leave_one_out", experience(STEPPED)) == [-3, -3, 0, -2, -2, 3, 2, 2, 0]
    both = {"name": "step_leave_one_out", "rewards": ["steps", "outcome"], "gamma": 0.5}
    # a: 1 + 0.5 * 13, 13; b: 2 + 0.5 * 25, 25
    assert advantages(both, experience(STEPPED)) == [-7, -7, 0, -12, -12, 7, 12, 12, 0]
    only = {"name": "step_leave_one_out", "rewards": "outcome"}
    assert advantages(only, experience(STEPPED)) == [-10, -10, 0, -10, -10, 10, 10, 10, 0]


def test_a_member_that_has_stopped_counts_with_nothing_to_come() -> None:
    short = Score(0.0, steps=(4.0,), step_spans=(Span(0, 3),))
    assert advantages("step_leave_one_out", experience([STEPPED[0], short, STEPPED[2]])) == [0, 0, 0, 3, 3, 0, 0, 0, 0]


def test_tokens_that_belong_to_no_step_get_nothing() -> None:
    partial = [Score(0.0, steps=(1.0,), step_spans=(Span(3, 5),)), Score(0.0, steps=(), step_spans=()), STEPPED[2]]
    assert advantages("step_leave_one_out", experience(partial)) == [0, 0, 0, 1, 1, 0, 0, 0, 0]


def test_token_rewards_are_credited_with_what_follows_over_environment_turns() -> None:
    tokens = [
        Score(0.0, tokens=(1.0, 0.0, 99.0, 2.0, 4.0)), Score(0.0, tokens=(1.0, 1.0, 1.0)), Score(0.0, tokens=(5.0,)),
    ]  # fmt: skip
    made = experience(tokens)
    assert advantages({"name": "token_returns", "baseline": "none"}, made) == [7, 6, 0, 6, 4, 3, 2, 1, 5]
    assert advantages("token_returns", made) == [4, 4, 0, 5, 4, -4, -4, -5, 0]
    assert advantages({"name": "token_returns", "baseline": "total"}, made) == [4, 3, 0, 3, 1, -4, -5, -6, 0]
    half = advantages({"name": "token_returns", "baseline": "none", "gamma": 0.5}, made)
    assert half[:5] == [1 + 0.25 * 2 + 0.125 * 4, 0.5 * 2 + 0.25 * 4, 0, 4, 4]  # the environment's token takes no time


def test_every_granularity_can_be_paid_at_once() -> None:
    score = Score(10.0, (1.0, 3.0), (Span(0, 2), Span(3, 5)), (0.5, 0.0, 0.0, 0.0, 0.25))
    made = experience([score], [Group(A.task, (A,))])
    rule = {"name": "token_returns", "baseline": "none", "rewards": ["outcome", "steps", "tokens"]}
    assert advantages(rule, made) == [14.75, 14.25, 0, 13.25, 13.25]


def test_kl_in_the_reward_is_paid_per_response_or_per_token() -> None:
    made = experience([Score(1.0), Score(4.0), Score(9.0)])
    made.reference = torch.full((9,), -0.5)  # the policy's own is 0, so k1 is 0.5 a token
    config = {"kl_coef": 0.2, "kl_in": "reward", "kl_kind": "k1"}
    # 0.1 a token: a pays 0.4, b pays 0.3
    assert advantages("leave_one_out", made, credit="leave_one_out", **config)[0] == pytest.approx(0.6 - 3.7, abs=1e-5)
    streams = with_credit(build("credit", {"name": "token_returns", "rewards": ["outcome"], "baseline": "none"}))(
        made, OnlineConfig(credit={"name": "token_returns", "rewards": ["outcome"], "baseline": "none"}, **config)
    )
    assert streams.advantage.tolist() == pytest.approx([0.6, 0.7, 0.0, 0.8, 0.9, 3.7, 3.8, 3.9, 8.9], abs=1e-5)
    white = with_credit(build("credit", "reinforce_plus_plus"))(made, OnlineConfig(algorithm="reinforce++", **config))
    raw = np.array([0.6, 0.7, 0.8, 0.9, 3.7, 3.8, 3.9, 8.9])
    want = (raw - raw.mean()) / raw.std(ddof=1)
    assert white.advantage[torch.from_numpy(made.action)].tolist() == pytest.approx(want.tolist(), abs=1e-4)


def test_reinforce_plus_plus_may_subtract_the_group_first() -> None:
    made = experience([Score(1.0), Score(4.0), Score(9.0)])
    out = advantages({"name": "reinforce_plus_plus", "baseline": "group"}, made)
    raw = np.array([-1.5] * 4 + [1.5] * 3 + [0.0])
    want = (raw - raw.mean()) / raw.std(ddof=1)
    assert [x for x, a in zip(out, made.action, strict=True) if a] == pytest.approx(want.tolist(), abs=1e-4)


def test_a_critic_may_be_fed_by_outcomes_steps_and_tokens() -> None:
    made = experience(STEPPED)
    made.values = torch.tensor([0.1 * k for k in range(9)])
    config = OnlineConfig(algorithm="ppo", gamma=0.9, lam=0.8)
    named = build("credit", "gae")(made, config)
    plain = ppo_streams(made, config)
    assert torch.allclose(named.advantage, plain.advantage) and torch.allclose(named.target, plain.target)
    stepped = build("credit", {"name": "gae", "rewards": ["steps"], "gamma": 1.0, "lam": 1.0})(made, config)
    # return minus value: the step's reward is paid on its last token
    assert stepped.target.tolist() == pytest.approx([4, 4, 0, 3, 3, 7, 5, 5, 7])
    assert stepped.advantage.tolist() == pytest.approx(
        [4 - 0, 4 - 0.1, 0, 3 - 0.3, 3 - 0.4, 6.5, 4.4, 4.3, 6.2], abs=1e-5
    )


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("process_relative", "has no step values; use a reward that scores steps"),
        ({"name": "token_returns"}, "no token values"),
    ],
)
def test_what_a_score_lacks_is_named(rule, words: str) -> None:
    with pytest.raises(RewardError, match=words):
        advantages(rule, experience([Score(1.0)] * 3))


def test_rules_say_how_they_were_made() -> None:
    assert repr(build("credit", {"name": "step_leave_one_out", "gamma": 0.5})) == (
        "step_leave_one_out(gamma=0.5, rewards=('steps',))"
    )
    for bad in ({"gamma": 2.0}, {"baseline": "mean"}, {"rewards": []}, {"rewards": ["tokens", "tokens"]}):
        with pytest.raises(ConfigError, match="token_returns"):
            build("credit", {"name": "token_returns", **bad})


# In a trainer -----------------------------------------------------------------------------------------------------------


def trainer(**more) -> OnlineTrainer:
    policy = tiny_policy(texts=toy_texts(), hidden=32, layers=1, heads=2, seed=0)
    config = OnlineConfig(steps=1, prompts_per_step=2, group_size=4, max_tokens=2, optimiser={"lr": 1e-3})
    return OnlineTrainer(
        policy, TransformersEngine(policy, max_slots=8), Say(), toy_tasks(4), SaidIt(0.5), config, **more
    )


def test_streams_of_another_length_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"returned advantages of shape \(3,\), one per response token"):
        trainer(credit=lambda experience, config: torch.zeros(3)).fit()
    with pytest.raises(ConfigError, match="gave 1 weights for"):
        trainer(token_weights={"policy": lambda trajectory: [1.0]}).fit()


def test_a_reference_is_kept_for_whoever_reads_it_and_missed_where_it_is_not_there() -> None:
    def pull(logprobs, old_logprobs, advantages, *, reference_logprobs):
        return 0.5 * (logprobs - reference_logprobs) ** 2 - advantages * logprobs

    assert trainer().learner.reference is None
    run = trainer(objective=pull)
    assert run.learner.reference is not None and math.isfinite(run.fit().history[0]["reward/mean"])
    with pytest.raises(ConfigError, match="the objective reads a reference's log-probabilities"):
        trainer(objective=pull, reference=None)

    class Rule:
        name, needs = "distil", frozenset({"reference"})

        def __call__(self, experience, config):
            return experience.reference - experience.old

    with pytest.raises(ConfigError, match="credit 'distil' reads a reference's log-probabilities"):
        trainer(credit=Rule(), reference=None)
    run = trainer(credit=Rule())
    detail = run.train_step()[1]
    assert detail.experience.reference is not None
