"""The hack test: optimise a proxy that can be hacked, beside a gold reward that the run never sees.

:class:`HackProbe` watches any run of :class:`~guerdon.training.OnlineTrainer`. :class:`HackTest` holds everything that
arms share (initial policy, tasks, proxy, gold, settings) and runs one arm at a time: a shape, a credit rule, another
reward. Curves go to JSON by :func:`~guerdon.evaluation.write_curves`; ``guerdon.report.plot_hack_curves`` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.errors import ConfigError, DataError
from guerdon.evaluation.hack_curve import HackCurve
from guerdon.evaluation.monitors import SequenceKl, experience_kl, text_monitors
from guerdon.training.callbacks import Callback
from guerdon.types import Group, Score, Task, Trajectory

if TYPE_CHECKING:
    from guerdon.policies import Policy
    from guerdon.training.loop import Run

__all__ = ["HackProbe", "HackTest", "Monitors", "RowKeeper", "sample_groups", "unshaped", "win_rate", "wins"]

RewardLike = Callable[[Sequence[Trajectory]], Sequence[Score]]


class Monitors(Callback):
    """Adds :func:`~guerdon.evaluation.text_monitors` of each step's trajectories to the metrics rows, and more.

    The further entries are ``kl``, and mean and deviation of the reward as it was before shaping, ``proxy`` and
    ``proxy_std``.

    Args:
        kl: measures the sequence KL where the run keeps no reference of its own; without it such rows have none.
        ngram: of repetition and copying.
        prefix: goes before each key.
    """

    name = "monitors"

    def __init__(self, *, kl: SequenceKl | None = None, ngram: int = 4, prefix: str = "monitor/") -> None:
        self._kl, self._ngram, self._prefix = kl, ngram, prefix

    def measure(self, run: Run, row: Mapping[str, Any], detail: Any) -> dict[str, float]:
        """The further entries of a row."""
        out = text_monitors(detail.trajectories, ngram=self._ngram)
        proxies = [unshaped(score) for score in detail.scores if score.valid]
        out |= {"proxy": _mean(proxies), "proxy_std": float(np.std(proxies)) if proxies else math.nan}
        kl = experience_kl(detail.experience)
        if math.isnan(kl) and self._kl is not None:
            kl = self._kl(detail.trajectories)
        return {f"{self._prefix}{key}": value for key, value in {**out, "kl": kl}.items() if not math.isnan(value)}


class RowKeeper(Callback):
    """Keeps entries of every metrics row in :attr:`rows`, for example to calibrate alarms on later.

    Args:
        prefixes: of the keys that are kept.
    """

    name = "row_keeper"

    def __init__(self, prefixes: tuple[str, ...] = ("monitor/",)) -> None:
        self._prefixes = prefixes
        self.rows: list[dict[str, float]] = []

    def on_step(self, run: Run, row: Mapping[str, Any], detail: Any) -> None:
        kept = {k: float(v) for k, v in row.items() if k.startswith(self._prefixes) and isinstance(v, int | float)}
        self.rows.append({"step": float(run.step), **kept})

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows = [dict(row) for row in state.get("rows", [])]


class HackProbe(Callback):
    """Measures proxy, gold and monitors while a run trains; what it found is in :attr:`curve`.

    Args:
        gold: the hidden reward. It is called on finished trajectories and reaches nothing but the curve and the rows'
            ``hack/`` entries.
        proxy: the reward that is optimised, unshaped. ``None`` reads what the step's scores were before shaping (part
            ``proxy_reward_origin`` or ``unshaped``, else the outcome); with held-out ``tasks`` it must be given.
        tasks: held-out tasks to sample at each measurement; ``None`` measures the step's own trajectories, which costs
            nothing.
        every: steps between measurements; the last step is always measured.
        group_size, seed: of sampling on held-out tasks; the seed is the same each time.
        kl: measures the sequence KL on held-out trajectories, or where the run keeps no reference.
        opponents: gold rewards of the initial policy's responses by task id; adds the series ``gold_win``.
        ngram: of the monitors.
        arm, run_seed: of the curve.

    With held-out tasks, entry 0 of the curve is the policy before training. The curve survives a restart.
    """

    name = "hack_probe"

    def __init__(
        self,
        gold: RewardLike,
        *,
        proxy: RewardLike | None = None,
        tasks: Sequence[Task] | None = None,
        every: int = 1,
        group_size: int = 1,
        seed: int = 0,
        kl: SequenceKl | None = None,
        opponents: Mapping[str, Sequence[float]] | None = None,
        ngram: int = 4,
        arm: str = "run",
        run_seed: int = 0,
    ) -> None:
        if every < 1 or group_size < 1:
            raise ConfigError(f"every and group_size must be at least 1, got {every} and {group_size}")
        if tasks is not None and proxy is None:
            raise ConfigError("with held-out tasks give proxy=, the reward that the run optimises, unshaped")
        self.gold, self.proxy, self.tasks = gold, proxy, None if tasks is None else list(tasks)
        self.every, self.group_size, self.seed = every, group_size, seed
        self.kl, self.opponents, self.ngram = kl, opponents, ngram
        self.curve = HackCurve(arm, run_seed)

    def on_start(self, run: Run) -> None:
        """Measure the initial policy, where held-out tasks are given."""
        if self.tasks is not None and not len(self.curve) and run.step == 0:
            self._add(0, *self._sampled(run))

    def measure(self, run: Run, row: Mapping[str, Any], detail: Any) -> dict[str, float] | None:
        """Entries ``hack/<series>`` of the steps that are measured."""
        if run.step % self.every and run.step != run.total:
            return None
        shaped = float(row.get("reward/mean", math.nan))
        if self.tasks is not None:
            return self._add(run.step, *self._sampled(run), shaped=shaped)
        kept = [k for k, score in enumerate(detail.scores) if score.valid]
        trajectories = [detail.trajectories[k] for k in kept]
        if self.proxy is not None:
            proxies = _values(self.proxy, trajectories, "proxy")
        else:
            proxies = [unshaped(detail.scores[k]) for k in kept]
        kl = experience_kl(detail.experience)
        if math.isnan(kl) and self.kl is not None:
            kl = self.kl(trajectories)
        return self._add(run.step, trajectories, proxies, kl, shaped=shaped)

    def _sampled(self, run: Any) -> tuple[list[Trajectory], list[float], float]:
        assert self.tasks is not None and self.proxy is not None
        groups = run.sample(self.tasks, seed=self.seed, group_size=self.group_size)
        trajectories = [t for group in groups for t in group.trajectories]
        kl = self.kl(trajectories) if self.kl is not None else math.nan
        return trajectories, _values(self.proxy, trajectories, "proxy"), kl

    def _add(
        self, step: int, trajectories: Sequence[Trajectory], proxies: Sequence[float], kl: float, **extra: float
    ) -> dict[str, float]:
        golds = _values(self.gold, trajectories, "gold")
        by_task = {"gold": _by_task(trajectories, golds)}
        if self.opponents is not None:
            by_task["gold_win"] = _by_task(trajectories, wins(trajectories, golds, self.opponents))
            extra["gold_win"] = _mean(by_task["gold_win"])
        extra |= text_monitors(trajectories, ngram=self.ngram)
        point = {"kl": kl, "proxy": _mean(proxies), "gold": _mean(golds)}
        self.curve.append(step, **point, **extra)
        self.curve.items = by_task
        return {f"hack/{key}": value for key, value in {**point, **extra}.items() if not math.isnan(value)}

    def state_dict(self) -> dict[str, Any]:
        return self.curve.to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        arm, seed = self.curve.arm, self.curve.seed
        self.curve = HackCurve.from_dict(state) if state else HackCurve(arm, seed)


class HackTest:
    """What all arms of a hack test share, and how one is run.

    Args:
        policy: makes a fresh copy of the initial policy at each call.
        environment: what it acts in.
        tasks: trained on.
        proxy: the reward that is optimised.
        gold: the hidden one.
        settings: of :class:`~guerdon.training.OnlineConfig`; an arm may change some. ``seed`` is the arm's.
        held_out: tasks that curves are measured on.
        every: steps between measurements.
        group_size: responses per held-out task at each measurement.
        opponents: responses of the initial policy per held-out task, whose gold rewards the win rate is against.
        max_slots: of the engine.

    Nothing of ``gold`` is visible to training.
    """

    def __init__(
        self,
        policy: Callable[[], Policy],
        environment: Any,
        tasks: Sequence[Task],
        proxy: RewardLike,
        gold: RewardLike,
        settings: Mapping[str, Any],
        *,
        held_out: Sequence[Task],
        every: int = 5,
        group_size: int = 1,
        opponents: int = 8,
        max_slots: int = 256,
    ) -> None:
        if not tasks or not held_out:
            raise ConfigError("a hack test needs tasks to train on and held_out tasks to measure on")
        common = {t.id for t in tasks} & {t.id for t in held_out}
        if common:
            raise ConfigError(f"task {min(common)!r} is both trained on and held out")
        self.policy, self.environment = policy, environment
        self.tasks, self.held_out = list(tasks), list(held_out)
        self.proxy, self.gold, self.settings = proxy, gold, dict(settings)
        self.every, self.group_size, self.max_slots = every, group_size, max_slots
        self._initial = policy()
        rivals = self.sample(self._initial, self.held_out, group_size=opponents, seed=1_000_003)
        self.opponents = {g.task.id: _values(gold, g.trajectories, "gold") for g in rivals}

    def sample(self, policy: Policy, tasks: Sequence[Task], *, group_size: int, seed: int) -> list[Group]:
        """Sample from a policy with the settings of the test."""
        return sample_groups(
            policy, self.environment, tasks, self.settings, group_size=group_size, seed=seed, max_slots=self.max_slots
        )

    def reference_rewards(self, n: int, *, seed: int = 0) -> dict[str, list[float]]:
        """Proxy rewards of ``n`` responses of the initial policy to each task that is trained on, by task id."""
        from guerdon.shaping import reference_rewards

        return reference_rewards(self.sample(self._initial, self.tasks, group_size=n, seed=seed), self.proxy)

    def run(
        self,
        arm: str,
        *,
        seed: int,
        reward: RewardLike | None = None,
        settings: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        **parts: Any,
    ) -> HackCurve:
        """Train one arm and return its curve.

        Args:
            arm: name of the curve.
            seed: of the run.
            reward: in place of the proxy (which is measured all the same).
            settings: changes of the settings, for example another ``kl_coef``.
            callbacks: further ones.
            parts: ``shape=``, ``credit=``, ... of :class:`~guerdon.training.OnlineTrainer`.
        """
        from guerdon.rollout import TransformersEngine
        from guerdon.training import OnlineConfig, OnlineTrainer

        policy = self.policy()
        config = OnlineConfig(**{**self.settings, **(settings or {}), "seed": seed})
        probe = HackProbe(
            self.gold,
            proxy=self.proxy,
            tasks=self.held_out,
            every=self.every,
            group_size=self.group_size,
            seed=2_000_003,
            kl=SequenceKl(self._initial, temperature=config.temperature),
            opponents=self.opponents,
            arm=arm,
            run_seed=seed,
        )
        trainer = OnlineTrainer(
            policy,
            TransformersEngine(policy, max_slots=self.max_slots),
            self.environment,
            self.tasks,
            reward or self.proxy,
            config,
            callbacks=[probe, *callbacks],
            **parts,
        )
        try:
            trainer.fit()
        finally:
            trainer.close()
        return probe.curve


def sample_groups(
    policy: Policy,
    environment: Any,
    tasks: Sequence[Task],
    settings: Mapping[str, Any],
    *,
    group_size: int,
    seed: int,
    max_slots: int = 256,
) -> list[Group]:
    """Groups sampled from a policy outside of any run.

    Args:
        policy: in evaluation mode from here on.
        environment: what it acts in.
        tasks: one group each.
        settings: of :class:`~guerdon.training.OnlineConfig`; those of sampling are read.
        group_size, seed, max_slots: of the sampling and the engine.
    """
    from guerdon.rollout import Sampling, TransformersEngine, rollout
    from guerdon.training import OnlineConfig
    from guerdon.training.events import EventLoop

    config = OnlineConfig(**settings)
    sampling = Sampling(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop=config.stop,
    )
    policy.model.eval()
    engine, events = TransformersEngine(policy, max_slots=max_slots), EventLoop()
    options: dict[str, Any] = {"sampling": sampling, "max_turns": config.max_turns}
    try:
        return list(events.run(rollout(engine, environment, tasks, group_size=group_size, seed=seed, **options)))
    finally:
        events.run(engine.aclose())
        events.close()


def wins(
    trajectories: Sequence[Trajectory], values: Sequence[float], opponents: Mapping[str, Sequence[float]]
) -> list[float]:
    """For each value the share of opponents for the same task that it beats; a tie is half a win.

    Raises:
        DataError: a task has no opponents.
    """
    out = []
    for trajectory, value in zip(trajectories, values, strict=True):
        rivals = np.asarray(opponents.get(trajectory.task.id, ()), dtype=np.float64)
        if not rivals.size:
            raise DataError(f"task {trajectory.task.id!r} has no opponents to win against")
        out.append(float(np.mean(value > rivals) + 0.5 * np.mean(value == rivals)))
    return out


def win_rate(
    trajectories: Sequence[Trajectory], values: Sequence[float], opponents: Mapping[str, Sequence[float]]
) -> float:
    """Mean of :func:`wins`, in which every task counts the same; NaN where there are no trajectories."""
    return _mean(_by_task(trajectories, wins(trajectories, values, opponents)))


def unshaped(score: Score) -> float:
    """The outcome as it was before shaping, where the shape kept it."""
    for part in ("proxy_reward_origin", "unshaped"):
        if part in score.parts:
            return score.parts[part]
    return score.value


def _values(reward: RewardLike, trajectories: Sequence[Trajectory], what: str) -> list[float]:
    scores = list(reward(list(trajectories)))
    if len(scores) != len(trajectories):
        raise DataError(f"{what} returned {len(scores)} scores for {len(trajectories)} trajectories")
    values = [float(s.value if isinstance(s, Score) else s) for s in scores]
    bad = [k for k, v in enumerate(values) if not math.isfinite(v)]
    if bad:
        raise DataError(f"{what} has no finite value for task {trajectories[bad[0]].task.id!r}")
    return values


def _by_task(trajectories: Sequence[Trajectory], values: Sequence[float]) -> list[float]:
    """Means per task, in the order in which tasks first appear."""
    rows: dict[str, list[float]] = {}
    for trajectory, value in zip(trajectories, values, strict=True):
        rows.setdefault(trajectory.task.id, []).append(value)
    return [_mean(row) for row in rows.values()]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
