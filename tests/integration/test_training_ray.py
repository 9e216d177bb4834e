"""A local Ray: sampling and scoring in actors, one of which dies in the middle."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from guerdon.policies import tiny_policy
from guerdon.rewards import Reward
from guerdon.rollout import TransformersEngine
from guerdon.training import OnlineConfig, OnlineTrainer
from guerdon.training.toys import Say, toy_tasks, toy_texts
from guerdon.types import Score, StopReason, Task, Trajectory, Turn

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'guerdon[ray]'")
from guerdon.training.ray_workers import RayReward  # noqa: E402 - needs Ray

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


class Letters(Reward):
    """Share of a letter in what was said; every call is written down by the process that made it."""

    def __init__(self, log: str = "", crash: str = "") -> None:
        super().__init__(name="letters")
        self.log, self.crash = log, crash

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        if self.crash and not os.path.exists(self.crash):
            with open(self.crash, "w", encoding="utf-8"):
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        values = [sum(i % 7 for turn in t.turns for i in turn.token_ids) / 50 for t in trajectories]
        if self.log:
            with open(self.log, "a", encoding="utf-8") as file:
                file.writelines(f"{t.task.id}\n" for t in trajectories)
        return [Score(v) for v in values]


class Slow:
    """:class:`Say`, but each episode takes a while: time to be killed in."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def start(self, task: Any, *, seed: int, group: int, member: int) -> Any:
        episode = Say().start(task, seed=seed, group=group, member=member)
        step, seconds = episode.step, self.seconds

        async def slowly(action: str) -> Any:
            import asyncio

            await asyncio.sleep(seconds)
            return await step(action)

        episode.step = slowly
        return episode


def small_policy():
    return tiny_policy(texts=toy_texts(), hidden=32, layers=1, heads=2, vocab_size=300)


def trainer_of(environment: Any, reward: Any, **distributed: Any) -> OnlineTrainer:
    policy = small_policy()
    config = OnlineConfig(
        steps=4, prompts_per_step=3, group_size=4, max_tokens=6, optimiser={"lr": 1e-2, "eps": 1e-4},
        distributed=distributed,
    )  # fmt: skip
    return OnlineTrainer(policy, TransformersEngine(policy), environment, toy_tasks(8), reward, config)


def test_an_actor_dies_in_the_middle_of_a_step(tmp_path) -> None:
    """The run equals one without actors: nothing is lost, nothing counts twice, and learning goes on."""
    plain = trainer_of(Say(), Letters())
    expected = [plain.train_step()[1] for plain.step in range(3)]
    log = tmp_path / "scored"
    trainer = trainer_of(Slow(0.4), Letters(str(log)), samplers=2, reward_workers=1)
    found, rows = [], []
    for step in range(3):
        trainer.step = step
        if step == 1:
            fleet = trainer._ahead.fleet
            threading.Timer(0.2, ray.kill, (fleet._actors[0],)).start()
        row, detail = trainer.train_step()
        found.append(detail)
        rows.append(row)
    assert fleet.deaths == 1 and len(fleet._actors) == 2
    assert not fleet._known.pending and not fleet._known.done
    assert [row["staleness/max"] for row in rows] == [0.0, 0.0, 0.0]
    for ours, theirs in zip(found, expected, strict=True):
        assert [g.task.id for g in ours.groups] == [g.task.id for g in theirs.groups]
        assert [len(g) for g in ours.groups] == [4, 4, 4]
        assert [t.turns[0].token_ids for t in ours.trajectories] == [t.turns[0].token_ids for t in theirs.trajectories]
        assert [s.value for s in ours.scores] == pytest.approx([s.value for s in theirs.scores])
    sampled = Counter(t.task.id for detail in found for t in detail.trajectories)
    assert Counter(log.read_text().split()) == sampled
    for ours, theirs in zip(trainer.policy.model.parameters(), plain.policy.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    trainer.close()
    plain.close()


def test_a_reward_worker_dies_and_its_part_is_scored_once(tmp_path) -> None:
    trajectories = [Trajectory(Task(f"t{k}", "q"), (Turn("policy", "x", (k,)),), StopReason.EOS) for k in range(7)]
    log = tmp_path / "scored"
    reward = RayReward(Letters(str(log), crash=str(tmp_path / "crashed")), 2)
    scores = reward(trajectories)
    assert [s.value for s in scores] == [s.value for s in Letters()(trajectories)]
    assert (tmp_path / "crashed").exists()
    assert len(log.read_text().split()) == len(trajectories)
    reward.close()
