"""The online trainer on small problems: it learns, records, refuses, and resumes exactly."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from guerdon.errors import CheckpointError, ConfigError, RewardError
from guerdon.policies import tiny_policy
from guerdon.rewards import Reward
from guerdon.rollout import TransformersEngine
from guerdon.training import (
    Callback,
    EarlyStopConfig,
    Evaluate,
    OnlineConfig,
    OnlineTrainer,
    SftConfig,
    SftTrainer,
    TrainingError,
    TrajectoryWriter,
)
from guerdon.training.toys import Echo, SaidIt, Say, babble, toy_tasks, toy_texts
from guerdon.types import Score, Trajectory


def small_policy(seed: int = 0, value_head: bool = False):
    return tiny_policy(texts=toy_texts(), hidden=32, layers=2, heads=2, seed=seed, value_head=value_head)


def settings(algorithm: str = "grpo", **values) -> OnlineConfig:
    base: dict = {
        "algorithm": algorithm, "steps": 4, "prompts_per_step": 2, "group_size": 4, "max_tokens": 2, "max_turns": 2,
        "optimiser": {"lr": 1e-3, "schedule": "linear", "warmup": 1 if values.get("steps", 4) > 1 else 0},
    }  # fmt: skip
    if algorithm == "ppo":
        base |= {"kl_coef": 0.01, "kl_in": "reward", "minibatch_size": 4, "epochs": 2, "whiten": "action"}
    return OnlineConfig(**{**base, **values})


def trainer(
    config: OnlineConfig, *, seed: int = 0, reward=None, environment=None, policy=None, **options
) -> OnlineTrainer:
    ppo = config.algorithm == "ppo"
    policy = policy or small_policy(seed, value_head=ppo)
    options = {"critic": "shared" if ppo else None, **options}
    return OnlineTrainer(
        policy,
        TransformersEngine(policy, max_slots=64),
        environment or Echo(),
        toy_tasks(6),
        reward or SaidIt(0.5),
        config,
        **options,
    )


def weights(policy) -> dict[str, torch.Tensor]:
    out = {k: v.clone() for k, v in policy.model.state_dict().items()}
    if policy.value_head is not None:
        out |= {f"head.{k}": v.clone() for k, v in policy.value_head.state_dict().items()}
    return out


def assert_equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def rows_of(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per_s/"))} for row in rows]


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_resumed_run_ends_with_the_weights_and_rows_of_an_uninterrupted_one(tmp_path, algorithm: str) -> None:
    config = settings(algorithm, save_every=1)
    whole = trainer(config, out=tmp_path / "whole")
    before = weights(whole.policy)
    assert any(row["update/steps"] for row in whole.fit().history)
    assert any(not torch.equal(before[key], value) for key, value in weights(whole.policy).items())
    for steps in (1, 3, None):
        part = trainer(config, out=tmp_path / "part")
        result = part.fit(steps)
    assert result.stopped == "done" and result.step == 4
    assert_equal_weights(weights(part.policy), weights(whole.policy))
    assert rows_of(tmp_path / "part" / "metrics.jsonl") == rows_of(tmp_path / "whole" / "metrics.jsonl")
    assert part.reward.scored == whole.reward.scored == 4 * 8


def test_a_run_that_is_done_does_nothing_more(tmp_path) -> None:
    config = settings(steps=2)
    first = trainer(config, out=tmp_path)
    first.fit()
    again = trainer(config, out=tmp_path)
    assert again.fit().history == []
    assert_equal_weights(weights(first.policy), weights(again.policy))


def test_two_seeds_differ_and_one_seed_repeats() -> None:
    runs = []
    for seed in (0, 0, 1):
        run = trainer(settings(seed=seed))
        run.fit()
        runs.append(weights(run.policy))
    assert_equal_weights(runs[0], runs[1])
    assert any(not torch.equal(runs[0][k], runs[2][k]) for k in runs[0])


def test_another_configuration_is_refused_in_the_same_folder(tmp_path) -> None:
    trainer(settings(steps=1), out=tmp_path).fit()
    with pytest.raises(ConfigError, match=r"group_size \(was 4, is 2\).*use another folder or the old settings"):
        trainer(settings(steps=1, group_size=2), out=tmp_path).fit()
    trainer(settings(steps=1, save_every=7), out=tmp_path).fit()


def test_a_longer_run_continues_unless_a_schedule_depends_on_the_length(tmp_path) -> None:
    constant = {"lr": 1e-3}
    trainer(settings(steps=1, optimiser=constant), out=tmp_path / "a").fit()
    assert trainer(settings(steps=2, optimiser=constant), out=tmp_path / "a").fit().step == 2
    trainer(settings(steps=2), out=tmp_path / "b").fit(1)
    with pytest.raises(ConfigError, match=r"steps \(was 2, is 3\)"):
        trainer(settings(steps=3), out=tmp_path / "b").fit()


def test_fit_beyond_the_configured_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="exceeds the run of 4 steps"):
        trainer(settings()).fit(5)


def test_the_row_says_what_happened() -> None:
    row = trainer(settings(steps=1), reward=Broken("fine")).fit().history[0]
    assert row["step"] == 1 and row["trajectories"] == 8 and row["update/steps"] == 1
    assert row["reward/mean"] == 0.5 and row["reward/odd"] == 0.5
    assert row["usage/calls"] == 8 and row["usage/usd"] == pytest.approx(0.008)
    assert row["mismatch/max"] < 1e-3
    assert row["length/response_mean"] > row["length/policy_mean"]
    for phase in ("sampling", "scoring", "forward", "backward", "optimiser"):
        assert row[f"time/{phase}"] > 0
    assert row["time/step"] == pytest.approx(
        sum(v for k, v in row.items() if k.startswith("time/") and k != "time/step")
    )


class Broken:
    """Scores like SaidIt, but spoils some."""

    name = "broken"

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self, trajectories: Sequence[Trajectory]) -> list:
        scores: list = [Score(float(k % 2), parts={"odd": float(k % 2)}) for k in range(len(trajectories))]
        match self.how:
            case "raises":
                raise TimeoutError("judge is away")
            case "nan":
                scores[0] = Score(math.nan)
            case "none":
                scores[0] = None
            case "string":
                scores[0] = "good"
            case "infinite":
                scores[0] = math.inf
            case "short":
                scores.pop()
        return scores


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", r"step 1: 8 of 8 .* reward 'broken' raised TimeoutError for task 'say-\d': judge is away"),
        ("nan", r"1 of 8 trajectories have no valid score; the first: reward 'broken' returned a non-finite value"),
        ("none", r"reward 'broken' returned NoneType for task 'say-"),
        ("string", r"reward 'broken' returned str"),
        ("infinite", r"non-finite"),
        ("short", r"'broken' returned 7 scores for 8 trajectories"),
    ],
)
def test_a_failing_reward_stops_the_run_and_is_named(how: str, words: str) -> None:
    run = trainer(settings(), reward=Broken(how))
    before = weights(run.policy)
    with pytest.raises(RewardError, match=words):
        run.fit()
    assert_equal_weights(weights(run.policy), before)


def test_a_failing_score_can_be_dropped_and_is_counted() -> None:
    run = trainer(settings(steps=1, on_reward_error="drop"), reward=Broken("nan"))
    row = run.fit().history[0]
    assert row["reward/invalid"] == 1 and row["trajectories/kept"] == 7 and math.isfinite(row["loss"])


def test_a_library_reward_that_drops_needs_no_second_word() -> None:
    class Picky(Reward):
        def __init__(self) -> None:
            super().__init__(on_error="drop")
            self.unreadable: Trajectory | None = None

        def score_one(self, trajectory: Trajectory) -> float:
            self.unreadable = self.unreadable or trajectory
            if trajectory is self.unreadable:
                raise ValueError("unreadable")
            return 1.0

    row = trainer(settings(steps=1), reward=Picky()).fit().history[0]
    assert row["reward/invalid"] == 1 and row["trajectories/kept"] == 7


def test_shape_sees_scores_before_credit() -> None:
    def flip(trajectories: Sequence[Trajectory], scores: Sequence[Score]) -> list[Score]:
        return [s.with_value(-s.value, flipped=1.0) for s in scores]

    row = trainer(settings(steps=1), shape=flip, reward=Broken("fine")).fit().history[0]
    assert row["reward/mean"] == -0.5 and row["reward/flipped"] == 1.0


@pytest.mark.parametrize(
    ("algorithm", "options", "words"),
    [
        ("ppo", {"critic": None}, "needs a critic"),
        ("grpo", {"critic": "shared"}, "uses no critic"),
        ("ppo", {"reference": None}, "needs a reference"),
        ("grpo", {"token_weights": {"loss": len}}, "got 'loss'"),
        ("grpo", {"token_weights": {"entropy": len}}, "no effect with entropy_coef=0"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_anything_runs(algorithm: str, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        trainer(settings(algorithm), **options)


def test_critic_without_a_head_and_too_few_or_repeated_tasks_are_refused() -> None:
    policy = small_policy()
    engine = TransformersEngine(policy)
    with pytest.raises(ConfigError, match="no value head; load it with value_head=True"):
        OnlineTrainer(policy, engine, Say(), toy_tasks(6), SaidIt(), settings("ppo"), critic="shared")
    with pytest.raises(ConfigError, match="exceeds the 1 tasks"):
        OnlineTrainer(policy, engine, Say(), toy_tasks(1), SaidIt(), settings())
    twice = [replace(t, id="same") for t in toy_tasks(4)]
    with pytest.raises(ConfigError, match="'same' occurs twice"):
        OnlineTrainer(policy, engine, Say(), twice, SaidIt(), settings())


def test_a_separate_critic_is_trained_and_resumed(tmp_path) -> None:
    def make(out):
        critic = small_policy(seed=5, value_head=True)
        return trainer(settings("ppo", steps=2), policy=small_policy(), critic=critic, out=out), critic

    run, critic = make(tmp_path / "a")
    before = weights(critic)
    run.fit()
    assert any(not torch.equal(before[k], v) for k, v in weights(critic).items())
    part, _ = make(tmp_path / "b")
    part.fit(1)
    rest, resumed = make(tmp_path / "b")
    rest.fit()
    assert_equal_weights(weights(resumed), weights(critic))


def test_reference_is_not_made_unless_the_penalty_is_on() -> None:
    assert trainer(settings()).learner.reference is None
    assert trainer(settings("ppo")).learner.reference is not None


def test_evaluation_callbacks_and_early_stop(tmp_path) -> None:
    seen: list[float] = []
    evaluate = Evaluate(lambda run: {"score": float(run.step)}, every=2)

    class Watch(Callback):
        name = "watch"

        def on_step(self, run, row, detail) -> None:
            seen.append(row.get("eval/score"))

    config = settings(steps=9, early_stop=EarlyStopConfig(metric="eval/score", target=4.0))
    result = trainer(config, callbacks=[Watch(), evaluate], out=tmp_path).fit()
    assert seen == [None, 2.0, None, 4.0]
    assert (result.step, result.stopped) == (4, "early")
    # A restart knows that the run has ended.
    assert trainer(config, callbacks=[Watch(), evaluate], out=tmp_path).fit().step == 4


def test_held_out_tasks_are_measured_the_same_way_every_time() -> None:
    from guerdon.training import HeldOut

    held = HeldOut(toy_tasks(4), SaidIt(0.5))
    run = trainer(settings(steps=2, eval_every=1, optimiser={"lr": 1e-9}), evaluate=held)
    first, second = run.fit().history
    for key in ("eval/reward/mean", "eval/reward/right", "eval/calls", "eval/usd", "eval/length"):
        assert first[key] == second[key]
    assert first["eval/calls"] == 1.0 and first["eval/usd"] == pytest.approx(0.001)
    with pytest.raises(ConfigError, match="belong together"):
        trainer(settings(eval_every=1))


def test_two_processes_do_not_train_in_one_folder(tmp_path) -> None:
    class Intruder(Callback):
        name = "intruder"

        def on_step(self, run, row, detail) -> None:
            with pytest.raises(CheckpointError, match="another process trains in this folder"):
                trainer(settings(), out=tmp_path).fit()

    trainer(settings(steps=1), callbacks=[Intruder()], out=tmp_path).fit()


def test_a_watched_metric_that_never_appears_is_reported(capsys) -> None:
    config = settings(steps=1, early_stop=EarlyStopConfig(metric="reward/meen", target=4.0))
    trainer(config).fit()
    assert "'reward/meen', which no metrics row had; did you mean reward/mean" in capsys.readouterr().err


class Failing(Echo):
    """Fails on some members of every group."""

    def __init__(self, members: set[int]) -> None:
        self.members = members

    def start(self, task, *, seed: int, group: int, member: int):
        episode = super().start(task, seed=seed, group=group, member=member)
        if member in self.members:

            async def step(action: str):
                raise ConnectionError("pool is down")

            episode.step = step  # type: ignore[method-assign]
        return episode


def test_failed_trajectories_are_left_out_counted_and_reported_once(capsys) -> None:
    history = trainer(settings(steps=2), environment=Failing({0}), reward=Broken("fine")).fit().history
    assert [row["trajectories/failed"] for row in history] == [2, 2]
    assert [row["trajectories/kept"] for row in history] == [6, 6]
    errors = capsys.readouterr().err
    assert errors.count("2 of 8 trajectories failed") == 1 and "ConnectionError: pool is down" in errors
    with pytest.raises(TrainingError, match=r"8 of 8 trajectories failed.*pool is down; nothing is left to learn from"):
        trainer(settings(), environment=Failing({0, 1, 2, 3})).fit()


def test_patience_survives_a_restart(tmp_path) -> None:
    config = settings(steps=9, early_stop=EarlyStopConfig(metric="eval/score", patience=3), optimiser={"lr": 1e-3})

    def make():
        return trainer(config, callbacks=[Evaluate(lambda run: {"score": 1.0}, every=1)], out=tmp_path)

    make().fit(2)
    assert make().fit().step == 4


def test_trajectories_are_recorded_once(tmp_path) -> None:
    config = settings(steps=3, save_every=1)
    for steps in (2, None):
        writer = TrajectoryWriter(tmp_path / "trajectories.jsonl", per_step=3)
        trainer(config, callbacks=[writer], out=tmp_path).fit(steps)
    rows = [json.loads(line) for line in (tmp_path / "trajectories.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1] * 3 + [2] * 3 + [3] * 3
    assert [t["speaker"] for t in rows[0]["turns"]] == ["policy", "environment", "policy"]
    assert rows[0]["usage"]["usd"] == 0.001


def test_records_that_vanished_are_noticed(tmp_path) -> None:
    config = settings(steps=3)
    trainer(config, out=tmp_path).fit(2)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl has 0 bytes"):
        trainer(config, out=tmp_path).fit()


def test_it_runs_inside_a_running_event_loop() -> None:
    run = trainer(settings(steps=1))

    async def notebook() -> int:
        return run.fit().step

    assert asyncio.run(notebook()) == 1
    run.close()


def test_lora_trains_the_adapter_alone_and_resumes(tmp_path) -> None:
    from guerdon.policies import LoraSpec, load_policy

    base = small_policy()
    base.save(tmp_path / "base")

    def make(out):
        policy = load_policy(str(tmp_path / "base"), lora=LoraSpec(r=4), device="cpu", seed=3)
        return trainer(
            settings(steps=2, kl_coef=0.01, optimiser={"lr": 1e-2}), policy=policy, reward=Broken("x"), out=out
        )

    run = make(tmp_path / "a")
    before = weights(run.policy)
    run.fit()
    changed = {k for k, v in weights(run.policy).items() if not torch.equal(v, before[k])}
    assert changed and all("lora" in k for k in changed)
    size = sum(f.stat().st_size for f in (tmp_path / "a").rglob("*.safetensors"))
    assert size < sum(f.stat().st_size for f in (tmp_path / "base").rglob("*.safetensors"))
    make(tmp_path / "b").fit(1)
    resumed = make(tmp_path / "b")
    resumed.fit()
    assert_equal_weights(weights(resumed.policy), weights(run.policy))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "environment"), [("grpo", Say()), ("ppo", Say()), ("grpo", Echo()), ("ppo", Echo())]
)
def test_it_learns(algorithm: str, environment) -> None:
    """From a warm start that babbles (return 1/4) to at least 0.9 (mean of the last five steps)."""
    ppo = algorithm == "ppo"
    turns = 1 if isinstance(environment, Say) else 2
    policy = tiny_policy(texts=toy_texts(), hidden=64, layers=2, heads=4, seed=0, value_head=ppo)
    warm = SftConfig(steps=40, batch_size=32, optimiser={"lr": 3e-3})
    SftTrainer(policy, babble(policy, 256, turns=turns), warm).fit()
    config = OnlineConfig(
        algorithm=algorithm, steps=100, prompts_per_step=8, group_size=8, max_tokens=2, max_turns=turns,
        optimiser={"lr": 1e-3, "critic_lr": 3e-3} if ppo else {"lr": 2e-3}, entropy_coef=0.01,
        **({"minibatch_size": 32, "epochs": 2, "whiten": "action"} if ppo else {}),
    )  # fmt: skip
    run = OnlineTrainer(
        policy, TransformersEngine(policy, max_slots=64), environment, toy_tasks(32), SaidIt(), config,
        critic="shared" if ppo else None,
    )  # fmt: skip
    history = run.fit().history
    assert 0.1 < sum(row["reward/mean"] for row in history[:3]) / 3 < 0.45
    assert sum(row["reward/mean"] for row in history[-5:]) / 5 >= 0.9
