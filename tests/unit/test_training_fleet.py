"""The bookkeeping of a fleet of actors, on a Ray that is made up: who has which unit, deaths, and what arrives once."""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import ConfigError, EngineError, MissingDependency
from guerdon.rewards import Reward
from guerdon.training import ray_workers
from guerdon.training.ahead import Ahead
from guerdon.training.ray_workers import Fleet, RayReward, Unit
from guerdon.types import Group, Score, StopReason, Task, Trajectory, Turn


class RayError(Exception):
    """Base of the errors of the made-up Ray."""


class ActorDied(RayError):
    """An actor is gone."""


class TaskFailed(RayError):
    """A method raised."""

    cause: BaseException | None = None


class MadeUpRay:
    """Actors that answer at once, in any order, until they are told to die.

    Args:
        seed: of the order in which results arrive.
        deaths: how many method calls each actor that is made answers before it dies; None: all.
    """

    exceptions = SimpleNamespace(RayError=RayError, RayActorError=ActorDied, RayTaskError=TaskFailed)

    def __init__(self, seed: int = 0, deaths: tuple[int | None, ...] = ()) -> None:
        self.random = random.Random(seed)
        self.deaths = iter(deaths)
        self.results: dict[int, Any] = {}
        self.numbers = itertools.count()
        self.started = 0
        self.played: Counter[Any] = Counter()

    def put(self, value: Any) -> Any:
        if isinstance(value, threading.Thread) or isinstance(getattr(value, "lock", None), threading.Thread):
            raise TypeError("cannot pickle a thread")
        return value

    def remote(self, kind: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *parts: Actor(self, kind, parts)))

    def kill(self, actor: Actor) -> None:
        actor.dead = True

    def wait(
        self, references: list[int], num_returns: int, timeout: float | None = None
    ) -> tuple[list[int], list[int]]:
        ready = self.random.sample(references, min(num_returns, len(references)))
        return ready, [r for r in references if r not in ready]

    def get(self, reference: int) -> Any:
        result = self.results[reference]
        if isinstance(result, Exception):
            raise result
        return result


class Actor:
    """One of them."""

    def __init__(self, ray: MadeUpRay, kind: type, parts: tuple[Any, ...]) -> None:
        self.ray, self.dead, self.version = ray, False, 0
        self.left = next(ray.deaths, None)
        self.inner = kind(*parts) if kind is ray_workers._Scorer else None
        ray.started += 1

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self.call(name, *arguments))

    def call(self, name: str, *arguments: Any) -> int:
        reference = next(self.ray.numbers)
        if self.left is not None:
            self.dead = self.dead or self.left <= 0
            self.left -= 1
        if self.dead:
            self.ray.results[reference] = ActorDied()
        elif name == "load":
            self.version = arguments[0]
            self.ray.results[reference] = self.version
        elif name == "play":
            unit, group_size, least = arguments
            assert self.version >= least
            self.ray.played[unit.key] += 1
            self.ray.results[reference] = self.version, group_of(unit, group_size)
        else:
            self.ray.results[reference] = getattr(self.inner, name)(*arguments)
        return reference


def group_of(unit: Unit, size: int) -> Group:
    return Group(
        unit.task, tuple(Trajectory(unit.task, (), StopReason.DONE, info={"key": unit.key}) for _ in range(size))
    )


def fleet_on(monkeypatch: pytest.MonkeyPatch, ray: MadeUpRay, size: int = 2) -> Fleet:
    monkeypatch.setattr(ray_workers, "connect", lambda: ray)
    policy: Any = SimpleNamespace(
        device=SimpleNamespace(type="cpu"), model=SimpleNamespace(named_parameters=lambda: [])
    )  # fmt: skip
    return Fleet(policy, None, size=size, group_size=2)


def units(count: int, step: int = 0) -> list[Unit]:
    return [Unit((step, 0, k), Task(f"t{k}", "q"), 7) for k in range(count)]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 12),
    st.integers(1, 4),
    st.lists(st.one_of(st.none(), st.integers(2, 6)), max_size=2),
    st.integers(0, 10**6),
)
def test_whatever_dies_every_unit_arrives_exactly_once(
    count: int, size: int, deaths: list[Any], seed: int
) -> None:  # a third death would end it, see below
    with pytest.MonkeyPatch.context() as monkeypatch:
        ray = MadeUpRay(seed, tuple(deaths))
        fleet = fleet_on(monkeypatch, ray, size)
        wanted = units(count)
        fleet.submit(wanted[: count // 2])
        fleet.submit(wanted)  # those that are on their way are not handed out again
        found = fleet.collect(wanted)
        assert [group.task.id for _, group in found] == [unit.task.id for unit in wanted]
        assert [t.info["key"] for _, g in found for t in g.trajectories] == [u.key for u in wanted for _ in range(2)]
        assert not fleet._known.pending and not fleet._known.done
        assert len(fleet._actors) == size
        assert ray.started == size + fleet.deaths


def test_a_unit_whose_actors_die_again_and_again_is_named(monkeypatch) -> None:
    fleet = fleet_on(monkeypatch, MadeUpRay(0, (0, 0, 0, 0)), size=1)
    with pytest.raises(EngineError, match="'t0' was played by 3 actors and each died"):
        fleet.collect(units(1))


def test_an_error_while_playing_names_the_task(monkeypatch) -> None:
    ray = MadeUpRay()
    fleet = fleet_on(monkeypatch, ray)
    fleet.submit(units(1))
    ray.results = {reference: TaskFailed("no such tool") for reference in ray.results}
    with pytest.raises(EngineError, match="task 't0' failed in an actor: no such tool"):
        fleet.collect(units(1))


def test_replaced_actors_begin_with_the_latest_weights(monkeypatch) -> None:
    ray = MadeUpRay(0, (2, None))
    fleet = fleet_on(monkeypatch, ray, size=1)
    policy: Any = SimpleNamespace(model=SimpleNamespace(named_parameters=lambda: []))
    fleet.update(policy)
    fleet.update(policy)
    assert [version for version, _ in fleet.collect(units(3))] == [2, 2, 2]
    assert fleet.deaths == 1


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_sampling_ahead_stays_within_its_bound(monkeypatch, staleness: int) -> None:
    ray = MadeUpRay()
    fleet = fleet_on(monkeypatch, ray)
    tasks = [Task(f"t{k}", "q") for k in range(6)]
    ahead = Ahead(
        fleet, tasks, drawn=lambda step: [step % 6, (step + 1) % 6], seed=lambda step, turn: step, staleness=staleness,
        total=5,
    )  # fmt: skip
    policy: Any = SimpleNamespace(model=SimpleNamespace(named_parameters=lambda: []))
    for step in range(5):
        groups = ahead.groups(step)
        assert [g.task.id for g in groups] == [f"t{step % 6}", f"t{(step + 1) % 6}"]
        further = ahead.groups(step, [5], turn=1)
        assert [g.task.id for g in further] == ["t5"]
        assert ahead.row()["staleness/max"] == min(step, staleness)
        waiting = {key[0] for key in [*fleet._known.pending, *fleet._known.done]}
        assert waiting == set(range(step + 1, min(step + staleness + 1, 5)))
        fleet.update(policy)
    assert ray.played == {(s, 0, k): 1 for s in range(5) for k in range(2)} | {(s, 1, 0): 1 for s in range(5)}
    assert ahead.row() == {}


def test_older_weights_than_allowed_are_refused(monkeypatch) -> None:
    fleet = fleet_on(monkeypatch, MadeUpRay())
    ahead = Ahead(fleet, [Task("t", "q")], drawn=lambda step: [0], seed=lambda step, turn: 0, staleness=0, total=3)
    fleet.submit(ahead._units(0, [0], 0))
    fleet.version += 1  # an update that the unit on its way has not seen
    with pytest.raises(EngineError, match="1 updates old, more than staleness=0"):
        ahead.groups(0)


class Count(Reward):
    """The number in a task's id, and -1 where it is asked to fail."""

    def score(self, trajectories: Any) -> list[Any]:
        return [None if t.task.id == "bad" else float(t.task.id) for t in trajectories]


def named(*names: str) -> list[Trajectory]:
    return [Trajectory(Task(name, "q"), (Turn("policy", "x"),), StopReason.DONE) for name in names]


@pytest.mark.parametrize("count", [0, 1, 3, 8])
@pytest.mark.parametrize("deaths", [(), (0,), (0, 0, None), (None, 0, 0)])
def test_divided_scores_come_back_in_order_whoever_dies(monkeypatch, count: int, deaths: tuple) -> None:
    monkeypatch.setattr(ray_workers, "connect", lambda: MadeUpRay(0, deaths))
    reward = RayReward(Count(), 3)
    assert reward(named(*map(str, range(count)))) == [Score(float(k)) for k in range(count)]


def test_failures_in_workers_are_counted_under_their_own_names(monkeypatch) -> None:
    monkeypatch.setattr(ray_workers, "connect", lambda: MadeUpRay())
    reward = RayReward(Count(on_error="drop"), 2)
    for _ in range(2):
        scores, fatal = reward.assess(named("1", "bad", "3"))
        assert [s.valid for s in scores] == [True, False, True] and not any(fatal)
    assert reward.failure_counts() == {("Count", "none"): 2}


def test_workers_that_always_die_end_the_scoring(monkeypatch) -> None:
    monkeypatch.setattr(ray_workers, "connect", lambda: MadeUpRay(0, (0,) * 9))
    with pytest.raises(EngineError, match="died 3 times on the same trajectories"):
        RayReward(Count(), 1)(named("1"))


def test_what_cannot_be_sent_or_copied_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(ray_workers, "connect", lambda: MadeUpRay())

    class Running(Count):
        def state_dict(self) -> dict[str, Any]:
            return {"mean": 0.5}

    with pytest.raises(ConfigError, match="has state, which copies of it would not share"):
        RayReward(Running(), 2)
    locked = Count()
    locked.lock = threading.Thread()
    with pytest.raises(ConfigError, match="cannot be sent to another process"):
        RayReward(locked, 1)


def test_without_ray_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingDependency, match=r"guerdon\[ray\]"):
        ray_workers.connect()
