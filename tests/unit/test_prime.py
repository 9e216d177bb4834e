"""PRIME's online reward model and its rule in the trainer: order of update, masks, filter, exact resume, refusals."""

from __future__ import annotations

import copy
import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch

from guerdon.credit import normalize_by_max_return, rloo_with_process
from guerdon.errors import CheckpointError, ConfigError, DataError, RewardError, TrainingError
from guerdon.policies import tiny_policy
from guerdon.reward_models import ImplicitPRM, PrimeReward
from guerdon.rollout import TransformersEngine
from guerdon.training import OnlineConfig, OnlineTrainer
from guerdon.training.rules.prime import INSTRUCTIONS, PrimeCredit, PrimeLog, PromptBuffer, prime_config
from guerdon.training.streams import collect
from guerdon.training.toys import Echo, Say, toy_tasks, toy_texts
from guerdon.types import Group, Score, StopReason, Task, Trajectory, Turn

torch.set_num_threads(1)


def policy(seed: int = 0):
    return tiny_policy(texts=toy_texts(), hidden=16, layers=1, heads=2, seed=seed)


PROMPTS = [[5, 6], [5, 6], [7], [7]]
RESPONSES = [[8, 9, 1], [10, 1], [11, 1], [12, 13, 14, 1]]
OUTCOMES = [1.0, 0.0, 0.0, 1.0]


def prime(seed: int = 0, **settings) -> PrimeReward:
    return PrimeReward(policy(seed), policy(seed + 1), None, **{"lr": 1e-2, **settings})


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.mark.parametrize("minibatch", [256, 3])
def test_after_gives_the_rewards_from_before_the_update(minibatch):
    prm = prime(minibatch_size=minibatch)
    want = padded(prm.token_rewards(PROMPTS, RESPONSES))
    got = prm.step(PROMPTS, RESPONSES, OUTCOMES)
    assert got.shape == (4, 4) and not got.requires_grad and torch.allclose(got, want, atol=1e-6)
    assert prm.updates == (1 if minibatch == 256 else 2)
    assert not torch.allclose(padded(prm.token_rewards(PROMPTS, RESPONSES)), want)


def test_before_updates_first_and_then_computes_the_rewards():
    prm, twin = prime(order="before"), prime(order="after")
    got = prm.step(PROMPTS, RESPONSES, OUTCOMES)
    twin.step(PROMPTS, RESPONSES, OUTCOMES)
    assert torch.allclose(got, padded(twin.token_rewards(PROMPTS, RESPONSES)), atol=1e-6)


def test_the_update_is_one_pass_of_cross_entropy():
    prm = prime(grad_clip=10.0)
    twin = ImplicitPRM(policy(0), policy(1), None)
    twin.fit(PROMPTS, RESPONSES, OUTCOMES, lr=1e-2, grad_clip=10.0)
    prm.step(PROMPTS, RESPONSES, OUTCOMES)
    assert prm.metrics["loss"] == pytest.approx(twin.report.losses[0], abs=1e-6)
    for a, b in zip(prm.policy.model.parameters(), twin.policy.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("order", ["after", "before"])
def test_a_fixed_scorer_gives_rewards_and_learns_nothing(order):
    prm = prime(order=order, measure_after=True)
    prm.learning = False
    before = [p.clone() for p in prm.policy.model.parameters()]
    got = prm.step(PROMPTS, RESPONSES, OUTCOMES)
    assert torch.allclose(got, padded(prm.token_rewards(PROMPTS, RESPONSES)), atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, prm.policy.model.parameters(), strict=True))
    assert prm.updates == 0 and "loss" not in prm.metrics and "accuracy_before" in prm.metrics


def test_a_share_of_passed_tests_is_an_outcome_too():
    prm = prime()
    prm.step(PROMPTS, RESPONSES, [0.25, 0.5, 0.0, 1.0])
    r = [x.sum().item() for x in prime().token_rewards(PROMPTS, RESPONSES)]
    want = [
        -(o * math.log(1 / (1 + math.exp(-x))) + (1 - o) * math.log(1 - 1 / (1 + math.exp(-x))))
        for x, o in zip(r, [0.25, 0.5, 0.0, 1.0], strict=True)
    ]
    assert prm.metrics["loss"] == pytest.approx(np.mean(want), abs=1e-6)


def test_whole_puts_the_sum_on_the_last_token():
    token, whole = (
        prime().step(PROMPTS, RESPONSES, OUTCOMES),
        prime(granularity="whole").step(PROMPTS, RESPONSES, OUTCOMES),
    )
    assert torch.allclose(token.sum(1), whole.sum(1))
    assert [int(r.nonzero()[0]) for r in whole] == [2, 1, 1, 3] and whole.ne(0).sum() == 4


def test_recorded_log_probabilities_may_stand_in_for_the_reference():
    prm = prime(reference="sampled")
    old = [[-1.0] * len(r) for r in RESPONSES]
    got = prm.step(PROMPTS, RESPONSES, OUTCOMES, old_logprobs=old)
    bare = padded([r + 0.05 for r in prime().token_rewards(PROMPTS, RESPONSES, use_reference=False)])
    assert torch.allclose(got, torch.where(got != 0, bare, 0.0), atol=1e-6)
    with pytest.raises(DataError, match="recorded at sampling"):
        prm.step(PROMPTS, RESPONSES, OUTCOMES)
    with pytest.raises(DataError, match="3 tokens but 1 old"):
        prm.step(PROMPTS, RESPONSES, OUTCOMES, old_logprobs=[[-1.0]] * 4)
    with pytest.raises(ConfigError, match="reference='sampled' only"):
        prime().step(PROMPTS, RESPONSES, OUTCOMES, old_logprobs=old)


def test_pairwise_accuracy_is_measured_before_and_after():
    prm = PrimeReward.from_policy(policy(), lr=1e-2, measure_after=True)
    prm.step(PROMPTS, RESPONSES, OUTCOMES)
    assert prm.metrics["accuracy_before"] == 0.5 and prm.metrics["accuracy_after"] == 1.0
    plain = prime()
    plain.step(PROMPTS, RESPONSES, OUTCOMES)
    assert "accuracy_after" not in plain.metrics


def test_empty_responses_and_empty_batches():
    prm = prime()
    out = prm.step([[5], [5]], [[], [8, 1]], [1.0, 0.0])
    assert out.shape == (2, 2) and bool((out[0] == 0).all()) and torch.isfinite(out).all()
    before = [p.clone() for p in prm.policy.model.parameters()]
    assert prm.step([[5]], [[]], [1.0]).shape == (1, 0) and prm.step([], [], []).shape == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, prm.policy.model.parameters(), strict=True))


def test_bad_outcomes_and_settings():
    prm = prime()
    for bad, message in [
        ([1, 0, 2, 0], "label 2 is 2"),
        ([1, math.nan, 0, 0], "label 1 is nan"),
        ([1], "for 4"),
        (None, "missing"),
    ]:
        with pytest.raises(DataError, match=message):
            prm.step(PROMPTS, RESPONSES, bad)
    with pytest.raises(DataError, match="group has 1 entries"):
        prm.step(PROMPTS, RESPONSES, OUTCOMES, group=[0])
    for settings in (
        {"order": "x"},
        {"granularity": "x"},
        {"reference": "x"},
        {"lr": 0},
        {"minibatch_size": 0},
        {"grad_clip": 0},
    ):
        with pytest.raises(ConfigError):
            prime(**settings)
    with torch.no_grad():
        prm.policy.model.get_input_embeddings().weight[8] = math.nan
    with pytest.raises(TrainingError, match="no weight was changed"):
        prm.step(PROMPTS, RESPONSES, OUTCOMES)


def test_a_resumed_model_goes_on_exactly():
    whole = prime()
    for _ in range(3):
        last = whole.step(PROMPTS, RESPONSES, OUTCOMES)
    half = prime()
    half.step(PROMPTS, RESPONSES, OUTCOMES)
    state = copy.deepcopy(half.state_dict())
    half.step(PROMPTS, RESPONSES, OUTCOMES)  # what comes later does not reach into the saved state
    fresh = prime()
    fresh.load_state_dict(state)
    for _ in range(2):
        again = fresh.step(PROMPTS, RESPONSES, OUTCOMES)
    assert torch.equal(last, again) and fresh.updates == 3
    with pytest.raises(CheckpointError, match="reference"):
        prime(seed=3).load_state_dict(state)


# As a shape, and as a rule --------------------------------------------------------------------------------------------


def talk(task: str, ids, *, middle=(), logprobs=True) -> Trajectory:
    speaker = policy()
    turns = [Turn("policy", speaker.decode(ids), tuple(ids), (-1.0,) * len(ids) if logprobs else None)]
    if middle:
        turns += [
            Turn("environment", speaker.decode(middle), tuple(middle)),
            Turn("policy", speaker.decode(ids), tuple(ids), (-1.0,) * len(ids)),
        ]
    return Trajectory(Task(task, task), tuple(turns), StopReason.DONE, prompt_ids=(5, 6))


def test_as_a_shape_it_adds_token_values_to_valid_scores_only():
    prm = prime()
    trajectories = [talk("a", [8, 9], middle=[10, 11, 12]), talk("a", [10]), talk("b", [11])]
    scores = [Score(1.0, parts={"x": 2.0}), Score(0.0), Score.invalid("no verdict")]
    want = prm.token_rewards(trajectories)
    out = prm(trajectories, scores)
    assert out[0].value == 1.0 and out[0].parts["x"] == 2.0 and out[2] is scores[2]
    assert out[0].tokens == pytest.approx(want[0].tolist(), abs=1e-6) and out[0].tokens[2:5] == (0.0, 0.0, 0.0)
    assert out[0].parts["prime/process"] == pytest.approx(want[0].sum().item(), abs=1e-6)
    with pytest.raises(DataError, match="2 scores for 3"):
        prm(trajectories, scores[:2])
    with pytest.raises(DataError, match="between 0 and 1"):
        prm(trajectories, [Score(2.0), Score(0.0), Score(1.0)])


def experience(values, *, groups=2, parts=None, tokens=None):
    k = len(values) // groups
    gs, scores = [], []
    for g in range(groups):
        made = [
            talk(f"t{g}", [8, 9] if (g + m) % 2 else [10, 11, 12], middle=[20, 21] if m == 0 else ()) for m in range(k)
        ]
        gs.append(Group(made[0].task, tuple(made)))
    for n, (t, v) in enumerate(zip([t for g in gs for t in g.trajectories], values, strict=True)):
        extra = {} if tokens is None else {"tokens": tuple(float(n + i) for i in range(len(t)))}
        scores.append(Score.invalid("none") if v is None else Score(v, parts=parts or {}, **extra))
    return collect(gs, scores)


CONFIG = OnlineConfig(group_size=4, prompts_per_step=2)


@pytest.mark.parametrize(
    "settings", [{}, {"gamma": 0.9, "baseline": "official"}, {"whiten": False, "normalize": False}]
)
def test_the_rule_is_the_formula_on_the_kept_prompts(settings):
    e = experience([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    rule = PrimeCredit(prime(), **settings)
    tokens = prime().token_rewards(e.trajectories[:4])
    streams = rule(e, CONFIG)
    # By hand: the policy's tokens of the first four trajectories, to the left of a grid.
    rows = [torch.from_numpy(e.action[a:b]) for a, b in pairwise(e.offsets[:5])]
    process, mask = (
        padded([t[m] for t, m in zip(tokens, rows, strict=True)]),
        padded([torch.ones(int(m.sum())) for m in rows]),
    )
    given = {k: v for k, v in settings.items() if k != "normalize"}
    if settings.get("normalize", True):
        process = normalize_by_max_return(process, mask)
    want = rloo_with_process(process.double(), mask, torch.tensor([1.0, 0, 0, 1]), torch.zeros(4), **given)
    flat = torch.cat([w[m.bool()] for w, m in zip(want, mask, strict=True)]).float()
    action = torch.from_numpy(e.action & (e.trajectory < 4))
    assert torch.allclose(streams.advantage[action], flat, atol=1e-5)
    # The second prompt has no correct response: it is in no term, and environment tokens are in none either.
    assert bool((streams.advantage[~action] == 0).all())
    for term in (streams.policy, streams.entropy, streams.kl):
        assert torch.equal(term, action.float())
    assert streams.skip.tolist() == [False] * 4 + [True] * 4
    assert rule.metrics["prompts"] == 2 and rule.metrics["prompts_kept"] == 1


def test_the_reward_model_learns_from_kept_prompts_alone():
    e = experience([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    rule, twin = PrimeCredit(prime()), prime()
    rule(e, CONFIG)
    twin.step_trajectories(e.trajectories[:4], [1.0, 0.0, 0.0, 1.0])
    for a, b in zip(rule.reward.policy.model.parameters(), twin.policy.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_without_kept_prompts_trains_nothing_and_says_so():
    e = experience([1.0] * 4 + [0.0] * 4)
    rule = PrimeCredit(prime())
    before = [p.clone() for p in rule.reward.policy.model.parameters()]
    with pytest.warns(UserWarning, match="nothing is trained"):
        streams = rule(e, CONFIG)
    assert streams.policy.sum() == 0 and streams.advantage.abs().sum() == 0 and streams.skip.all()
    assert rule.metrics["prompts_kept"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, rule.reward.policy.model.parameters(), strict=True))


def test_groups_that_failures_left_alone_are_left_out():
    e = experience([1.0, None, None, None, 1.0, 0.0, None, 0.0])
    streams = PrimeCredit(prime())(e, CONFIG)
    assert streams.skip.tolist() == [True] * 4 + [False, False, True, False]
    assert torch.isfinite(streams.advantage).all()


def test_the_rule_reads_token_values_where_it_has_no_model():
    e = experience([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0], tokens=True)
    rule = PrimeCredit(whiten=False, normalize=False)
    assert rule.needs == {"group", "tokens"} and PrimeCredit(prime()).needs == {"group"}
    streams = rule(e, CONFIG)
    assert streams.advantage.abs().sum() > 0 and rule.state_dict() == {}
    with pytest.raises(RewardError, match="no token values"):
        rule(experience([1.0, 0.0, 0.0, 1.0] * 2), CONFIG)


def test_the_verdict_may_be_a_part_of_the_score():
    e = experience([3.0, 2.0, 3.0, 2.0] * 2, parts={"right": 0.5})
    assert PrimeCredit(prime(), outcome="right")(e, CONFIG).policy.sum() > 0
    with pytest.raises(RewardError, match=r"in \[0, 1\]"):
        PrimeCredit(prime())(e, CONFIG)
    with pytest.raises(RewardError, match="no part 'wrong'"):
        PrimeCredit(prime(), outcome="wrong")(e, CONFIG)


def test_what_makes_no_sense_is_refused():
    e = experience([1.0, 0.0] * 4)
    with pytest.raises(ConfigError, match="whiten twice"):
        PrimeCredit(prime())(e, OnlineConfig(group_size=4, whiten="action"))
    with pytest.raises(ConfigError, match="at least 2"):
        PrimeCredit(prime())(e, OnlineConfig(algorithm="ppo", group_size=1))
    for settings in ({"low": 0.9, "high": 0.1}, {"gamma": 2.0}, {"baseline": "none"}, {"low": -0.1}):
        with pytest.raises(ConfigError):
            PrimeCredit(**settings)


def trainer(out=None, steps=3, environment=None):
    speaker = tiny_policy(texts=toy_texts(), hidden=16, layers=1, heads=2, seed=0)
    rule = PrimeCredit(PrimeReward.from_policy(speaker, lr=1e-2), low=0.0, high=1.0)

    def verdict(trajectories):
        return [Score(float(sum(i for u in t.turns for i in u.token_ids) % 2)) for t in trajectories]

    config = prime_config(lr=1e-3, steps=steps, prompts_per_step=2, max_tokens=3, max_turns=2)
    return OnlineTrainer(
        speaker, TransformersEngine(speaker, max_slots=16), environment or Echo(), toy_tasks(4), verdict, config,
        credit=rule, callbacks=[PrimeLog(rule)], out=out,
    )  # fmt: skip


def test_in_a_trainer_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = trainer(tmp_path / "a")
    rows = whole.fit().history
    assert rows[0]["prime/prompts_kept"] == 2 and rows[0]["prime/accuracy_before"] == 0.5
    assert rows[0]["prime/loss"] == pytest.approx(math.log(2), abs=1e-5)
    trainer(tmp_path / "b").fit(1)
    again = trainer(tmp_path / "b")
    again.fit()
    for one, two in ((whole, again), (whole.credit.reward, again.credit.reward)):
        for a, b in zip(one.policy.model.parameters(), two.policy.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_with_another_estimator_the_rewards_enter_as_token_rewards():
    speaker = tiny_policy(texts=toy_texts(), hidden=16, layers=1, heads=2, seed=0)
    prm = PrimeReward.from_policy(speaker, lr=1e-2)
    config = OnlineConfig(steps=3, prompts_per_step=2, group_size=4, max_tokens=3, optimiser={"lr": 1e-3})
    run = OnlineTrainer(
        speaker, TransformersEngine(speaker, max_slots=16), Say(), toy_tasks(4),
        lambda ts: [Score(float(t.turns[0].token_ids[0] % 2)) for t in ts], config,
        shape=prm, credit={"name": "token_returns", "rewards": ["outcome", "tokens"]},
    )  # fmt: skip
    rows = run.fit().history
    assert prm.updates == 3 and rows[0]["reward/prime/process"] == 0.0 and rows[-1]["reward/prime/process"] != 0.0


def test_the_paper_settings():
    config = prime_config()
    assert (config.group_size, config.temperature, config.clip_low, config.clip_high) == (4, 1.0, 0.2, 0.2)
    assert (config.aggregation, config.epochs, config.kl_coef, config.optimiser.lr) == ("token", 1, 0.0, 5e-7)
    assert prime_config(lr=1e-3, group_size=8).group_size == 8
    assert "boxed" in INSTRUCTIONS["math"] and "fenced" in INSTRUCTIONS["code"]


def test_the_buffer_keeps_prompts_and_only_prompts():
    tasks = [Task(f"t{k}", "x") for k in range(12)]
    verdicts = {t.id: [1.0, 0.0] if k % 2 else [1.0, 1.0] for k, t in enumerate(tasks)}
    drawn, sampled = iter(tasks), []

    def draw(n):
        return [next(drawn) for _ in range(n)]

    def sample(chosen):
        sampled.append([t.id for t in chosen])
        return [Group(t, (talk(t.id, [8]), talk(t.id, [9]))) for t in chosen]

    def verify(trajectories):
        return verdicts[trajectories[0].task.id]

    buffer = PromptBuffer(tasks)
    kept = buffer.fill(3, draw, sample, verify)
    assert [g.task.id for g in kept] == ["t1", "t3", "t5"] and sampled == [["t0", "t1", "t2"], ["t3", "t4", "t5"]]
    kept = buffer.fill(1, draw, sample, verify)
    assert [g.task.id for g in kept] == ["t7"] and buffer.waiting == []
    buffer.waiting = [tasks[1], tasks[3]]
    fresh = PromptBuffer(tasks)
    fresh.load_state_dict(buffer.state_dict())
    assert fresh.waiting == [tasks[1], tasks[3]]
    kept = fresh.fill(1, draw, sample, verify)
    assert [g.task.id for g in kept] == ["t1"] and fresh.waiting == [tasks[3]]
    with pytest.raises(CheckpointError, match="not among the tasks"):
        PromptBuffer(tasks[5:]).load_state_dict(buffer.state_dict())
    verdicts = {t.id: [0.0, 0.0] for t in tasks}
    with pytest.warns(UserWarning, match="0 of 1 prompts"):
        assert PromptBuffer(tasks, rounds=2).fill(1, lambda n: tasks[:n], sample, verify) == []
    with pytest.raises(ConfigError, match="rounds"):
        PromptBuffer(tasks, rounds=0)


def test_surplus_prompts_wait():
    tasks = [Task(f"t{k}", "x") for k in range(4)]
    buffer = PromptBuffer(tasks)

    def sample(chosen):
        return [Group(t, (talk(t.id, [8]), talk(t.id, [9]))) for t in tasks]  # more groups than asked for

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = buffer.fill(3, lambda n: tasks[:n], sample, lambda ts: [1.0, 0.0])
    assert len(kept) == 3 and buffer.waiting == tasks[3:]


def test_it_works_with_one_turn_too():
    assert len(trainer(environment=Say(), steps=1).fit().history) == 1
