"""Sampling and scoring in Ray actors: a fleet that samples ahead of the learner within a bound, and divided rewards.

A unit of work is one task of one step, with a seed of its own, so that it gives the same trajectories wherever and
however often it is played. The trainer hands out the units of a step and of the ``staleness`` steps after it, waits for
those of the step, and keeps each unit's result exactly once. When an actor dies, another one takes its place with the
latest weights, and the units it had are handed out again; results that had arrived stay.
"""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from guerdon.errors import ConfigError, EngineError, MissingDependency
from guerdon.rewards.base import Progress, Reward, as_reward
from guerdon.types import Group, Score, Task, Trajectory

if TYPE_CHECKING:
    from guerdon.policies import Policy

__all__ = ["Fleet", "RayReward", "Unit", "connect"]

_DEATHS = 3
"""How often the actors that play one unit may die before it is the unit that is suspected."""


def connect() -> Any:
    """The ``ray`` module, connected to the cluster of ``RAY_ADDRESS``, else to one that is started on this machine.

    Raises:
        MissingDependency: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingDependency(
            "distributed.samplers and reward_workers need Ray: pip install 'guerdon[ray]', or set both to 0"
        ) from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    return ray


@dataclass(frozen=True, slots=True)
class Unit:
    """One task of one step to be played.

    Args:
        key: tells it from all others of the run, for example ``(step, round, place)``.
        task: what is played.
        seed: of the step; the trajectories depend on it, the task's id and the place in the group.
    """

    key: tuple[int, ...]
    task: Task
    seed: int


class _Sampler:
    """What runs in an actor: a copy of the policy, an engine on it, and rollouts, several at once."""

    def __init__(
        self, policy: Any, environment: Any, make_engine: Callable[[Any], Any], options: Mapping[str, Any]
    ) -> None:
        import torch

        torch.set_num_threads(max(1, int(options["threads"])))
        if options["gpu"]:
            policy.model.to("cuda")
        self._policy, self._environment, self._options = policy, environment, dict(options["rollout"])
        self._engine = make_engine(policy)
        self._version = 0
        self._playing = 0
        self._changed = asyncio.Condition()
        self._loading = False

    async def load(self, version: int, weights: Mapping[str, Any]) -> int:
        """Take new weights once what is being played is over; what comes later waits."""
        import torch

        async with self._changed:
            await self._changed.wait_for(lambda: not self._loading)
            self._loading = True
            await self._changed.wait_for(lambda: self._playing == 0)
            if version > self._version:
                named = dict(_trained(self._policy))
                with torch.no_grad():
                    for name, array in weights.items():
                        named[name].copy_(torch.from_numpy(array.copy()).to(named[name].dtype))
                update = getattr(self._engine, "update_weights", None)
                if update is not None:
                    done = update(self._policy)
                    if asyncio.iscoroutine(done):
                        await done
                self._version = version
            self._loading = False
            self._changed.notify_all()
        return self._version

    async def play(self, unit: Unit, group_size: int, least: int) -> tuple[int, Group]:
        """Play a unit; returns the version of the weights it was played with, and its group.

        Calls may overtake one another on their way here, so a unit says which weights it waits for (``least``).
        """
        from guerdon.rollout import rollout

        async with self._changed:
            await self._changed.wait_for(lambda: not self._loading and self._version >= least)
            self._playing += 1
            version = self._version
        try:
            self._policy.model.eval()
            (group,) = await rollout(
                self._engine, self._environment, [unit.task], group_size=group_size, seed=unit.seed, **self._options
            )
        finally:
            async with self._changed:
                self._playing -= 1
                self._changed.notify_all()
        return version, group


@dataclass
class _Pending:
    """A unit that has been handed out."""

    unit: Unit
    actor: Any
    reference: Any
    deaths: int = 0


@dataclass
class _Known:
    """Units in flight and results that nobody has asked for yet."""

    pending: dict[tuple[int, ...], _Pending] = field(default_factory=dict)
    done: dict[tuple[int, ...], tuple[int, Group]] = field(default_factory=dict)


class Fleet:
    """Sampling actors.

    Args:
        policy: copied into every actor; later only what is trained is sent.
        environment: copied into every actor.
        size: actors.
        group_size: trajectories of a unit.
        rollout: further arguments of :func:`guerdon.rollout.rollout`.
        make_engine: builds the engine on an actor's policy; default: transformers.
        resources: what each actor reserves, as Ray takes it; default: one CPU.
        concurrency: units that one actor plays at a time; its engine batches them.

    Attributes:
        version: of the latest weights; :meth:`update` counts it up.
        deaths: actors that were replaced.

    Raises:
        ConfigError: the policy or the environment cannot be sent to another process.
    """

    def __init__(
        self,
        policy: Policy,
        environment: Any,
        *,
        size: int,
        group_size: int,
        rollout: Mapping[str, Any] | None = None,
        make_engine: Callable[[Any], Any] | None = None,
        resources: Mapping[str, float] | None = None,
        concurrency: int = 64,
    ) -> None:
        self._ray = connect()
        self._group_size = group_size
        reserved = {"num_cpus": 1, **(resources or {})}
        self._class = self._ray.remote(_Sampler).options(max_concurrency=concurrency + 1, **_options(reserved))
        settings = {
            "threads": int(reserved["num_cpus"]),
            "gpu": reserved.get("num_gpus", 0) > 0,
            "rollout": dict(rollout or {}),
        }
        try:
            sent = (self._ray.put(_on_cpu(policy)), self._ray.put(environment))
            self._parts = (*sent, make_engine or _transformers, settings)
        except TypeError as error:
            raise ConfigError(
                f"policy, environment and rollout options are sent to sampling actors, and one of them cannot be: {error}"
            ) from error
        self.version = 0
        self.deaths = 0
        self._weights: Any = None
        self._known = _Known()
        self._actors = [self._start() for _ in range(size)]

    def submit(self, units: Iterable[Unit]) -> None:
        """Hand out units; those that are known already are left as they are."""
        for unit in units:
            if unit.key not in self._known.pending and unit.key not in self._known.done:
                self._hand_out(_Pending(unit, None, None))

    def collect(self, units: Sequence[Unit]) -> list[tuple[int, Group]]:
        """Wait for units; returns for each the version of the weights it was sampled with, and its group.

        Raises:
            EngineError: sampling failed, or a unit's actors died again and again.
        """
        self.submit(units)
        wanted = {unit.key for unit in units}
        while missing := [p for key, p in self._known.pending.items() if key in wanted]:
            by_reference = {p.reference: p for p in missing}
            ready, _ = self._ray.wait(list(by_reference), num_returns=1)
            for reference in ready:
                self._take(by_reference[reference])
        return [self._known.done.pop(unit.key) for unit in units]

    def update(self, policy: Policy) -> None:
        """Send the policy's trained weights to all actors; units handed out from now on are played with them."""
        self.version += 1
        self._weights = self._ray.put(
            {name: p.detach().float().cpu().numpy() for name, p in _trained(policy)}
        )  # fmt: skip
        for actor in self._actors:
            actor.load.remote(self.version, self._weights)

    def close(self) -> None:
        """End the actors. Idempotent."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        self._known = _Known()

    def _start(self) -> Any:
        actor = self._class.remote(*self._parts)
        if self._weights is not None:
            actor.load.remote(self.version, self._weights)
        return actor

    def _hand_out(self, pending: _Pending) -> None:
        """Give a unit to the actor that has the fewest."""
        load = Counter(id(p.actor) for p in self._known.pending.values())
        pending.actor = min(self._actors, key=lambda actor: load[id(actor)])
        pending.reference = pending.actor.play.remote(pending.unit, self._group_size, self.version)
        self._known.pending[pending.unit.key] = pending

    def _take(self, pending: _Pending) -> None:
        """Keep a unit's result, or hand it out again where its actor has died."""
        key = pending.unit.key
        try:
            result = self._ray.get(pending.reference)
        except self._ray.exceptions.RayActorError:
            self._replace(pending.actor)
            return
        except self._ray.exceptions.RayTaskError as error:
            raise EngineError(f"sampling of task {pending.unit.task.id!r} failed in an actor: {error}") from error
        del self._known.pending[key]
        self._known.done[key] = result

    def _replace(self, dead: Any) -> None:
        """Start another actor in place of a dead one, and hand out again what it had."""
        if all(actor is not dead for actor in self._actors):
            return
        self.deaths += 1
        lost = [p for p in self._known.pending.values() if p.actor is dead]
        arrived, _ = self._ray.wait([p.reference for p in lost], num_returns=len(lost), timeout=0)
        self._actors = [self._start() if actor is dead else actor for actor in self._actors]
        for pending in lost:
            if pending.reference in arrived and self._arrived(pending):
                continue
            pending.deaths += 1
            if pending.deaths >= _DEATHS:
                raise EngineError(
                    f"task {pending.unit.task.id!r} was played by {_DEATHS} actors and each died; "
                    "look at the environment, or at the memory that distributed.sampler_resources gives"
                )
            del self._known.pending[pending.unit.key]
            self._hand_out(pending)

    def _arrived(self, pending: _Pending) -> bool:
        """Keep the result of a unit that was finished before its actor died."""
        try:
            result = self._ray.get(pending.reference)
        except self._ray.exceptions.RayError:
            return False
        del self._known.pending[pending.unit.key]
        self._known.done[pending.unit.key] = result
        return True


class _Scorer:
    """What runs in a reward actor."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward

    def assess(
        self, trajectories: Sequence[Trajectory], progress: Progress | None
    ) -> tuple[list[Score], list[bool], Counter[tuple[str, str]]]:
        """Scores, which of them are fatal, and the failures of this call."""
        before = self._reward.failure_counts()
        scores, fatal = self._reward.assess(trajectories, progress=progress)
        return scores, fatal, self._reward.failure_counts() - before


class RayReward(Reward):
    """A reward whose batches are divided among actors, each with a copy of it.

    Args:
        reward: has no state that one score leaves to the next: the copies would go apart.
        workers: actors.
        resources: what each actor reserves; default: one CPU.

    Raises:
        ConfigError: the reward has state, or cannot be sent to another process.
    """

    def __init__(self, reward: Any, workers: int, *, resources: Mapping[str, float] | None = None) -> None:
        self._inner = as_reward(reward)
        super().__init__(name=self._inner.name)
        self.on_error, self.range, self.gives = self._inner.on_error, self._inner.range, self._inner.gives
        if self._inner.state_dict():
            raise ConfigError(
                f"reward {self._inner.name!r} has state, which copies of it would not share; set distributed.reward_workers=0"
            )
        self._ray = connect()
        self._class = self._ray.remote(_Scorer).options(**_options({"num_cpus": 1, **(resources or {})}))
        try:
            self._sent = self._ray.put(self._inner)
        except TypeError as error:
            raise ConfigError(f"reward {self._inner.name!r} cannot be sent to another process: {error}") from error
        self._actors = [self._class.remote(self._sent) for _ in range(workers)]
        self._counts: Counter[tuple[str, str]] = Counter()

    def score(self, trajectories: Sequence[Trajectory], progress: Progress | None = None) -> list[Score]:
        """Divide, score, and put together in order."""
        return self.assess(trajectories, progress=progress)[0]

    def assess(
        self, trajectories: Sequence[Trajectory], *, progress: Progress | None = None
    ) -> tuple[list[Score], list[bool]]:
        """As :meth:`Reward.assess`; a part whose actor dies is scored by another."""
        count = min(len(self._actors), len(trajectories))
        cuts = [len(trajectories) * k // count for k in range(count + 1)] if count else [0]
        parts = [list(trajectories[a:b]) for a, b in pairwise(cuts)]
        results: dict[int, tuple[list[Score], list[bool], Counter[tuple[str, str]]]] = {}
        for _ in range(_DEATHS):
            # Each part has an actor of its own, so that the parts of a dead one are never scored twice.
            asked = {
                k: self._actors[k].assess.remote(part, progress) for k, part in enumerate(parts) if k not in results
            }
            for k, reference in asked.items():
                try:
                    results[k] = self._ray.get(reference)
                except self._ray.exceptions.RayActorError:
                    self._actors[k] = self._class.remote(self._sent)
                except self._ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, Exception) else error from None
            if len(results) == len(parts):
                break
        else:
            raise EngineError(f"the workers of reward {self.name!r} died {_DEATHS} times on the same trajectories")
        scores: list[Score] = []
        fatal: list[bool] = []
        for k in sorted(results):
            part, ends, failures = results[k]
            scores += part
            fatal += ends
            self._counts += failures
        return scores, fatal

    def failure_counts(self) -> Counter[tuple[str, str]]:
        """Failures in all workers."""
        return Counter(self._counts)

    def close(self) -> None:
        """End the actors. Idempotent."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []


def _trained(policy: Any) -> Iterable[tuple[str, Any]]:
    """Named parameters that training changes; a value head says nothing while sampling."""
    return [(name, p) for name, p in policy.model.named_parameters() if p.requires_grad]


def _on_cpu(policy: Policy) -> Policy:
    """The policy, or a copy where it lives on a GPU, which another process may not have."""
    if policy.device.type == "cpu":
        return policy
    made = copy.copy(policy)
    made.model = copy.deepcopy(policy.model).cpu()
    made.value_head = None
    return made


def _transformers(policy: Any) -> Any:
    from guerdon.rollout import TransformersEngine

    return TransformersEngine(policy)


def _options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Named resources of Ray beside its own keywords."""
    own = ("num_cpus", "num_gpus", "memory")
    options: dict[str, Any] = {key: value for key, value in resources.items() if key in own}
    others = {key: value for key, value in resources.items() if key not in own}
    return {**options, "resources": others} if others else options
