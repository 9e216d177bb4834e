"""Measures a policy on held-out tasks while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from guerdon.rewards.base import Progress, as_reward
from guerdon.rollout.protocol import Environment, Sampling
from guerdon.types import Score, Task, Trajectory

if TYPE_CHECKING:
    from guerdon.training.online import OnlineTrainer

__all__ = ["HeldOut"]


class HeldOut:
    """Mean reward, its parts, calls, cost and length on fixed tasks, with the same seed every time.

    Invalid scores are left out of the means and counted; whether a failing reward ends the run is the reward's own
    ``on_error``.

    Args:
        tasks: not those trained on.
        reward: an instance of its own, since a stateful reward must not see training trajectories.
        environment: default: the one trained in.
        sampling: default: greedy, otherwise as in training.
        group_size: trajectories per task.
        seed: of sampling and episodes.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        reward: Callable[[Sequence[Trajectory]], Sequence[Score | float]],
        *,
        environment: Environment | None = None,
        sampling: Sampling | None = None,
        group_size: int = 1,
        seed: int = 0,
    ) -> None:
        self.tasks = list(tasks)
        self.reward = as_reward(reward)
        self.environment = environment
        self.sampling = sampling
        self.group_size = group_size
        self.seed = seed

    def __call__(self, run: OnlineTrainer) -> Mapping[str, float]:
        """Sample, score and average; invalid scores are left out of the means and counted."""
        options = {} if self.sampling is None else {"sampling": self.sampling}
        groups = run.sample(
            self.tasks,
            seed=self.seed,
            group_size=self.group_size,
            environment=self.environment,
            temperature=0.0,
            **options,
        )
        trajectories = [t for group in groups for t in group.trajectories]
        scores = self.reward(trajectories, progress=Progress(run.step, run.total))
        valid = [s for s in scores if s.valid]
        n = len(trajectories)
        row = {"reward/mean": _mean([s.value for s in valid]), "reward/invalid": float(n - len(valid))}
        for part in sorted({key for s in valid for key in s.parts}):
            row[f"reward/{part}"] = _mean([s.parts[part] for s in valid if part in s.parts])
        row["calls"] = _mean([t.usage.calls for t in trajectories])
        row["usd"] = _mean([t.usage.usd for t in trajectories])
        row["length"] = _mean([sum(len(u) for u in t.turns if u.speaker == "policy") for t in trajectories])
        row["truncated"] = _mean([t.stop.truncated for t in trajectories])
        return row


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
