"""Sampling ahead of the learner: while it learns from one step, a fleet of actors plays the next ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from guerdon.errors import EngineError
from guerdon.types import Group, Task

if TYPE_CHECKING:
    from guerdon.training.online import OnlineTrainer
    from guerdon.training.ray_workers import Fleet, Unit

__all__ = ["Ahead", "start_ahead"]


class Ahead:
    """Gives each step its groups, sampled with weights that are at most ``staleness`` updates old.

    The units of a step are handed out that many steps before it, so what they were sampled with is bounded by
    construction; it is measured all the same.

    Args:
        fleet: plays units.
        tasks: of the run.
        drawn: numbers of the tasks that a step begins with, which depend on the step alone.
        seed: of a step and a round of it.
        staleness: steps to hand out ahead.
        total: steps of the run.
    """

    def __init__(
        self,
        fleet: Fleet,
        tasks: Sequence[Task],
        *,
        drawn: Callable[[int], Sequence[int]],
        seed: Callable[[int, int], int],
        staleness: int,
        total: int,
    ) -> None:
        self.fleet = fleet
        self._tasks, self._drawn, self._seed = tasks, drawn, seed
        self._staleness, self._total = staleness, total
        self._lags: list[int] = []

    def groups(self, step: int, chosen: Sequence[int] | None = None, turn: int = 0) -> list[Group]:
        """The groups of a step.

        Args:
            step: counts from 0; steps are asked for in order.
            chosen: numbers of further tasks, which only this step has; default: those that it begins with.
            turn: the step's round in which they are sampled.

        Raises:
            EngineError: sampling failed, or weights were older than allowed.
        """
        if chosen is None:
            for later in range(step, min(step + self._staleness + 1, self._total)):
                self.fleet.submit(self._units(later, self._drawn(later), 0))
            chosen = self._drawn(step)
        played = self.fleet.collect(self._units(step, chosen, turn))
        lags = [self.fleet.version - version for version, _ in played]
        if max(lags, default=0) > self._staleness:
            raise EngineError(
                f"step {step + 1} was sampled with weights {max(lags)} updates old, more than staleness={self._staleness}"
            )
        self._lags += lags
        return [group for _, group in played]

    def _units(self, step: int, chosen: Sequence[int], turn: int) -> list[Unit]:
        from guerdon.training.ray_workers import Unit

        seed = self._seed(step, turn)
        return [Unit((step, turn, k), self._tasks[i], seed) for k, i in enumerate(chosen)]

    def row(self) -> dict[str, float]:
        """How many updates behind the weights were, over the trajectories since the last call."""
        lags, self._lags = self._lags, []
        if not lags:
            return {}
        return {"staleness/mean": sum(lags) / len(lags), "staleness/max": float(max(lags))}


def start_ahead(
    trainer: OnlineTrainer,
    rollout: Mapping[str, Any],
    *,
    drawn: Callable[[int], Sequence[int]],
    seed: Callable[[int, int], int],
) -> Ahead:
    """Start the actors that a trainer's settings ask for, on its present weights."""
    from guerdon.training.engines import make_engine
    from guerdon.training.ray_workers import Fleet

    config = trainer._settings
    settings = config.distributed
    fleet = Fleet(
        trainer.policy,
        trainer.environment,
        size=settings.samplers,
        group_size=config.group_size,
        rollout=rollout,
        make_engine=partial(make_engine, kind=settings.engine),
        resources=settings.sampler_resources,
    )
    return Ahead(fleet, trainer.tasks, drawn=drawn, seed=seed, staleness=settings.staleness, total=trainer.total)
