"""What a run does beyond plain steps: groups replaced or filtered, weights corrected, runs without signal, exact resume."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from guerdon.errors import ConfigError, RewardError
from guerdon.policies import tiny_policy
from guerdon.rewards import Progress, Reward
from guerdon.rollout import TransformersEngine
from guerdon.training import (
    Callback,
    FilterConfig,
    OnlineConfig,
    OnlineTrainer,
    SftConfig,
    SftTrainer,
    TrajectoryWriter,
)
from guerdon.training.data import further_indices
from guerdon.training.groups import informative
from guerdon.training.recompute import recomputing
from guerdon.training.toys import SaidIt, Say, babble, toy_tasks, toy_texts
from guerdon.types import Group, Score, StopReason, Task, Trajectory

torch.set_num_threads(1)


def trainer(reward, *, policy=None, tasks=8, out=None, callbacks=(), **settings) -> OnlineTrainer:
    policy = policy or tiny_policy(texts=toy_texts(), hidden=32, layers=2, heads=2, seed=0)
    base = {"steps": 3, "prompts_per_step": 2, "group_size": 4, "max_tokens": 2, "optimiser": {"lr": 1e-3}}
    config = OnlineConfig(**{**base, **settings})
    return OnlineTrainer(
        policy, TransformersEngine(policy, max_slots=16), Say(), toy_tasks(tasks), reward, config, out=out,
        callbacks=callbacks,
    )  # fmt: skip


class ByTask(Reward):
    """Flat (all equal) for the named tasks, and counting up within a group for the others."""

    def __init__(self, flat: Sequence[str], value: float = 0.0) -> None:
        super().__init__(name="by_task")
        self.flat, self.value, self.seen = set(flat), value, []

    def score(self, trajectories):
        self.seen.append([t.task.id for t in trajectories])
        return [
            Score(self.value if t.task.id in self.flat else k % 4 / 4, parts={"right": float(k % 4 > 0)})
            for k, t in enumerate(trajectories)
        ]


# Dynamic sampling and filters -------------------------------------------------------------------------------------------


def test_groups_without_variance_are_replaced_by_other_tasks() -> None:
    flat = [f"say-{k}" for k in range(7)]  # all but one
    reward = ByTask(flat)
    run = trainer(reward, dynamic_sampling=4, prompts_per_step=2)
    row, detail = run.train_step()
    sampled = [g.task.id for g in detail.groups]
    assert len(set(sampled)) == len(sampled)  # no task twice in a step
    assert row["groups/sampled"] == len(sampled) and row["groups/excluded"] == sum(t in flat for t in sampled)
    # Rounds ask for what is missing, and only for that.
    missing = 2
    for ids in reward.seen:
        groups = len(ids) // 4
        assert groups == missing
        missing -= sum(t not in flat for t in ids[::4])
    kept = detail.experience.kept.reshape(-1, 4)
    assert kept.all(1).tolist() == [t not in flat for t in sampled]
    assert row["reward/mean"] == pytest.approx(np.mean([s.value for s in detail.scores]))  # of all that was sampled


def test_the_rounds_are_bounded_and_a_step_may_end_with_nothing() -> None:
    reward = ByTask([f"say-{k}" for k in range(40)])
    run = trainer(reward, tasks=40, dynamic_sampling=3)
    row, _ = run.train_step()
    assert len(reward.seen) == 4 and row["groups/sampled"] == 8 and row["groups/excluded"] == 8
    assert row["trajectories/kept"] == 0 and row["update/steps"] == 0
    few = ByTask([f"say-{k}" for k in range(4)])
    run = trainer(few, tasks=4, dynamic_sampling=10)
    assert run.train_step()[0]["groups/sampled"] == 4  # there are no other tasks


def test_replaced_groups_are_in_no_denominator() -> None:
    """With dynamic sampling a step learns as if the flat groups had never been sampled."""
    run = trainer(ByTask(["say-0"]), dynamic_sampling=0, prompts_per_step=8, filter={"min_std": 1e-6})
    row, detail = run.train_step()
    assert row["groups/excluded"] == 1 and row["trajectories/kept"] == 28
    parts = run.learner._minibatches(detail.experience, 0, 0)
    assert sorted(np.concatenate(parts).tolist()) == np.flatnonzero(detail.experience.kept).tolist()
    weights = run.learner._weights(detail.experience, detail.streams, parts[0], 0.0)["policy"]
    assert float(weights.sum()) == pytest.approx(1.0)


def test_minibatches_cover_what_is_learned_from_and_nothing_else() -> None:
    run = trainer(ByTask(["say-0", "say-3"]), prompts_per_step=8, minibatch_size=8, filter={"min_std": 0.01})
    row, _ = run.train_step()
    assert row["update/steps"] == 3  # 24 trajectories that count, not 32


def groups_of(values: Sequence[Sequence[float]]) -> tuple[list[Group], list[Score]]:
    groups, scores = [], []
    for g, row in enumerate(values):
        task = Task(f"t{g}", "q")
        groups.append(Group(task, tuple(Trajectory(task, (), StopReason.DONE) for _ in row)))
        scores += [Score.invalid("x") if v != v else Score(v, parts={"right": float(v > 0.5)}) for v in row]
    return groups, scores


def test_groups_are_judged_by_variance_accuracy_and_deviation() -> None:
    nan = float("nan")
    groups, scores = groups_of([[0, 0], [0, 1], [nan, 1], [nan, nan], [0.4, 0.6], [1, 1]])
    assert informative(groups, scores, None, variance=True) == [False, True, False, False, True, False]
    assert informative(groups, scores, None, variance=False) == [True, True, True, False, True, True]
    band = FilterConfig(accuracy=(0.2, 0.8))
    assert informative(groups, scores, band, variance=False) == [False, True, False, False, True, False]
    edge = FilterConfig(accuracy=(0.5, 0.5 + 1e-12))
    assert informative(groups, scores, edge, variance=False) == [False, True, False, False, True, False]
    part = FilterConfig(accuracy=(0.9, 1.0), part="right")
    assert informative(groups, scores, part, variance=False) == [False, False, True, False, False, True]
    wide = FilterConfig(min_std=0.5)
    assert informative(groups, scores, wide, variance=False) == [False, True, False, False, False, False]
    with pytest.raises(
        RewardError, match=r"filter\.part='wrong': the score of task 't0' has no such part; its parts are right"
    ):
        informative(groups, scores, FilterConfig(accuracy=(0, 1), part="wrong"), variance=False)


def test_further_tasks_are_others_and_depend_on_the_seed_alone() -> None:
    first = further_indices(10, 4, [1, 2, 3], seed=(0, 5, 1))
    assert len(set(first)) == 4 and not set(first) & {1, 2, 3}
    assert (
        first == further_indices(10, 4, [1, 2, 3], seed=(0, 5, 1)) != further_indices(10, 4, [1, 2, 3], seed=(0, 5, 2))
    )
    assert sorted(further_indices(5, 9, [0], seed=(1,))) == [1, 2, 3, 4]


# Without signal ---------------------------------------------------------------------------------------------------------


def test_a_run_without_any_variance_is_warned_of_and_then_ended_with_advice(tmp_path, capsys) -> None:
    everywhere = ByTask([f"say-{k}" for k in range(8)])
    run = trainer(everywhere, steps=20, no_signal_steps=4, out=tmp_path)
    result = run.fit()
    assert (result.step, result.stopped) == (4, "no_signal") and result.checkpoint is not None
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith("step 2: no group had any variance for 2 steps (all rewards of the last step are 0)")
    assert "take easier tasks" in errors[0] and errors[1].startswith("stopped: no group had any variance for 4 steps")
    # The folder knows that the run has ended, and nothing of it is lost.
    assert trainer(everywhere, steps=20, no_signal_steps=4, out=tmp_path).fit().step == 4


def test_the_count_begins_anew_with_every_signal_survives_a_restart_and_can_be_off(tmp_path) -> None:
    class Now(Reward):
        def score_one(self, one: Trajectory, progress: Progress | None = None) -> float:
            assert progress is not None
            return float(len(one)) * (progress.step == 2) + random.random() * (progress.step == 2)

    assert trainer(Now(), steps=5, no_signal_steps=3).fit().stopped == "done"
    flat = ByTask([f"say-{k}" for k in range(8)])
    for steps in (1, 2):
        trainer(flat, steps=9, no_signal_steps=3, out=tmp_path).fit(steps)
    assert trainer(flat, steps=9, no_signal_steps=3, out=tmp_path).fit().step == 3
    assert trainer(flat, steps=5, no_signal_steps=None).fit().step == 5
    # Credit that compares nothing has a signal without variance.
    assert (
        trainer(ByTask([], 1.0), steps=4, no_signal_steps=2, credit={"name": "reinforce", "baseline": "none"})
        .fit()
        .step
        == 4
    )


# Sampler and trainer ----------------------------------------------------------------------------------------------------


def test_recorded_and_recomputed_log_probabilities_agree_and_the_difference_is_measured() -> None:
    for more in ({}, {"old_logprobs": "recomputed"}):
        for row in trainer(ByTask([]), **more).fit().history:
            assert row["mismatch/max"] < 1e-3


@pytest.mark.parametrize("cut", [{"top_p": 0.7}, {"top_k": 5}])
def test_a_cut_support_is_corrected_by_truncated_weights(cut: dict) -> None:
    """Under top-p the sampler's probabilities are larger by the kept mass, so weights are below 1."""
    run = trainer(ByTask([]), old_logprobs="recomputed", importance_cap=2.0, **cut)
    row, detail = run.train_step()
    experience, action = detail.experience, torch.from_numpy(detail.experience.action)
    want = (experience.old - experience.sampled).exp().clamp(max=2.0)[action]
    assert torch.allclose(detail.streams.policy[action], want) and not detail.streams.policy[~action].any()
    assert row["mismatch/weight_mean"] == pytest.approx(float(want.mean())) and row["mismatch/weight_mean"] < 1.0
    assert row["mismatch/weight_capped"] == 0.0 and row["kl_old"] == pytest.approx(0.0, abs=1e-6)


def test_weights_are_capped() -> None:
    run = trainer(ByTask([]), old_logprobs="recomputed", importance_cap=0.5)
    row, detail = run.train_step()
    assert row["mismatch/weight_capped"] == 1.0 and row["mismatch/weight_mean"] == 0.5
    assert float(detail.streams.policy.max()) == 0.5


# Memory -----------------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_recomputes_layers_and_changes_no_gradient() -> None:
    def gradients(**more) -> tuple[dict[str, torch.Tensor], int]:
        run = trainer(ByTask([]), steps=1, share_prompt=False, **more)
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += torch.is_grad_enabled()

        for layer in run.policy.model.model.layers:
            layer.mlp.register_forward_pre_hook(count)  # recomputing stops early, inside the last product
        found = {}
        run.learner.optimiser.step = lambda scale, where: (
            found.update(  # type: ignore[method-assign]
                {n: p.grad.clone() for n, p in run.policy.model.named_parameters()}
            )
            or {}
        )
        run.fit()
        assert not any(m.training for m in run.policy.model.modules())
        return found, calls

    plain, once = gradients()
    recomputed, twice = gradients(gradient_checkpointing=True)
    assert twice == 2 * once > 0
    for name, gradient in plain.items():
        assert torch.allclose(gradient, recomputed[name], atol=1e-6), name
    with pytest.raises(ConfigError, match="no layers for gradient_checkpointing"), recomputing(torch.nn.Linear(2, 2)):
        pass


# Learning and resuming --------------------------------------------------------------------------------------------------


class Whimsical(Reward):
    """Everything a reward may remember or draw from: statistics of its own, progress, and three global generators."""

    def __init__(self) -> None:
        super().__init__(name="whimsical")
        self.mean = 0.0

    def score(self, trajectories, progress: Progress | None = None):
        assert progress is not None
        out = []
        for one in trajectories:
            letters = len(set(one.task.reference) & set(one.turns[-1].text))
            noise = random.random() + float(np.random.random()) + float(torch.rand(()))
            self.mean = 0.9 * self.mean + 0.1 * letters
            out.append(Score(letters - self.mean + 0.1 * noise * progress.fraction, parts={"letters": float(letters)}))
        return out

    def state_dict(self) -> dict:
        return {"mean": self.mean}

    def load_state_dict(self, state) -> None:
        self.mean = state["mean"]


class RunningShape:
    """A shape that subtracts a running mean, after those that need the scores as they were."""

    name = "running"

    def __init__(self) -> None:
        self.mean = 0.0

    def __call__(self, trajectories, scores):
        self.mean = 0.8 * self.mean + 0.2 * sum(s.value for s in scores) / len(scores)
        return [s.with_value(s.value - self.mean) for s in scores]

    def state_dict(self) -> dict:
        return {"mean": self.mean}

    def load_state_dict(self, state) -> None:
        self.mean = state["mean"]


@pytest.mark.parametrize("how", ["between", "inside"])
def test_a_run_with_every_kind_of_state_resumes_bit_for_bit(tmp_path, how: str) -> None:
    """Running baselines, annealed weights, replaced groups, minibatch orders and all generators, interrupted twice."""

    class Crash(Callback):
        name = "crash"

        def __init__(self, at: int) -> None:
            self.at = at

        def on_step(self, run, row, detail) -> None:
            if run.step == self.at:
                raise KeyboardInterrupt

    def make(out: Path, crash: int = 0) -> OnlineTrainer:
        policy = tiny_policy(texts=toy_texts(), hidden=32, layers=1, heads=2, seed=0)
        config = OnlineConfig(
            steps=6, prompts_per_step=3, group_size=4, max_tokens=2, minibatch_size=4, epochs=2, save_every=1,
            credit={"name": "reinforce", "baseline": "running", "decay": 0.5}, filter={"min_std": 0.5}, dynamic_sampling=2,
            entropy_coef=0.05, entropy_final=0.0, kl_coef=0.01, old_logprobs="recomputed", importance_cap=1.5,
            optimiser={"lr": 3e-3, "schedule": "cosine", "warmup": 2},
        )  # fmt: skip
        return OnlineTrainer(
            policy, TransformersEngine(policy, max_slots=16), Say(), toy_tasks(12), Whimsical(), config, out=out,
            shape=[RunningShape(), RunningShape()],
            callbacks=[TrajectoryWriter(out / "trajectories.jsonl"), Crash(crash)],
        )  # fmt: skip

    def seed() -> None:
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(3)

    seed()
    whole = make(tmp_path / "whole")
    whole.fit()
    seed()
    for stop in (2, 4, None):
        if stop is not None and how == "inside":
            with pytest.raises(KeyboardInterrupt):
                make(tmp_path / "part", crash=stop + 1).fit()  # the step is done, but no longer saved
        else:
            part = make(tmp_path / "part")
            part.fit(stop)
        # Whoever starts the process again has other generators.
        random.seed()
        np.random.seed()
        torch.seed()
    assert part.step == 6
    for (name, a), b in zip(
        whole.policy.model.state_dict().items(), part.policy.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    for a, b in zip(whole.learner.optimiser.state_dict()["state"].values(),
                    part.learner.optimiser.state_dict()["state"].values(), strict=True):  # fmt: skip
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    assert whole.reward.mean == part.reward.mean and whole.credit.state_dict() == part.credit.state_dict()
    assert whole.shape.state_dict() == part.shape.state_dict() != {"0": {"mean": 0.0}, "1": {"mean": 0.0}}
    rows = [
        [{k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "tokens_per_s/"))}
         for line in (tmp_path / which / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "trajectories.jsonl") for which in ("whole", "part")
    ]  # fmt: skip
    assert rows[0] == rows[1] and len(rows[0]) == 6 and rows[2] == rows[3]
    assert any(row["groups/excluded"] for row in rows[0])


def test_a_tiny_policy_reaches_a_return_in_seconds() -> None:
    """From a warm start that babbles (return 1/4) to at least 0.9, in 80 steps on one core."""
    policy = tiny_policy(texts=toy_texts(), hidden=64, layers=2, heads=4, seed=0)
    SftTrainer(policy, babble(policy, 128, turns=1), SftConfig(steps=30, batch_size=32, optimiser={"lr": 3e-3})).fit()
    run = trainer(
        SaidIt(), policy=policy, tasks=32, steps=80, prompts_per_step=8, group_size=8, optimiser={"lr": 3e-3},
        credit="leave_one_out", entropy_coef=0.01,
    )  # fmt: skip
    history = run.fit().history
    assert 0.1 < sum(row["reward/mean"] for row in history[:2]) / 2 < 0.5
    assert sum(row["reward/mean"] for row in history[-5:]) / 5 >= 0.9
