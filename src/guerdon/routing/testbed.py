"""The world-facts testbed as the router sees it: pools per episode, scripted warm-start data, fair baselines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from guerdon.environments.worldfacts import (
    CORE_DOMAINS,
    DOMAINS,
    NAMES,
    Entry,
    PoolSampler,
    Specialist,
    World,
    descriptor,
    is_generalist,
    load_world,
    lookup_drill,
    make_tasks,
    parse,
    practice_task,
    read_answer,
    scripted_rollout,
    sub_question,
    vocabulary,
)
from guerdon.errors import ConfigError
from guerdon.rollout.loop import derive_seed
from guerdon.routing import protocol
from guerdon.routing.backends import CallableBackend
from guerdon.routing.env import RoutingEnv
from guerdon.routing.ledger import Ledger
from guerdon.routing.member import Member
from guerdon.routing.pool import Pool
from guerdon.routing.prompt import compact_prompt, router_prompt
from guerdon.types import StopReason, Task, Trajectory, Turn

__all__ = ["WorldFactsTestbed"]


@dataclass(frozen=True)
class WorldFactsTestbed:
    """Questions over real facts and a pool of six simulated specialists, whose names change from episode to episode.

    Args:
        register: ``"compact"`` for tiny policies, ``"natural"`` for real language models.
        domains: four domains.
        held_out: draw unseen names and unseen pairs of skills.
        shuffled: draw another pool for every question, so that only descriptors tell who knows what. False
            keeps one pool, as a platform has it; a policy may then also learn it by heart.
        seed: of the split, the pools and the specialists' errors.
    """

    register: Any = "compact"
    domains: tuple[str, ...] = CORE_DOMAINS
    held_out: bool = False
    shuffled: bool = True
    seed: int = 0
    ledger: Ledger = field(default_factory=lambda: Ledger(keep=1000, by_trajectory=False), compare=False)

    @cached_property
    def world(self) -> World:
        """The facts."""
        return load_world()

    @cached_property
    def sampler(self) -> PoolSampler:
        """Where pools come from."""
        return PoolSampler(self.domains, held_out=self.held_out)

    def tasks(self, split: Any, *, hops: Sequence[int] = (1, 2), frames: int = 1) -> list[Task]:
        """All questions of a split."""
        return make_tasks(
            self.world, split, register=self.register, domains=self.domains, hops=hops, seed=self.seed, frames=frames
        )

    def balanced(self, split: Any, n: int, *, seed: int = 0) -> list[Task]:
        """``n`` tasks, one half of them two-hop, with ids of their own.

        Questions are drawn without replacement until a kind is used up and then anew; a repeated question
        meets another pool.
        """
        rng = np.random.default_rng([self.seed, seed, derive_seed(split) & 0xFFFF])
        out: list[Task] = []
        for hops, count in ((1, n - n // 2), (2, n // 2)):
            pool = self.tasks(split, hops=(hops,))
            order: list[int] = []
            while len(order) < count:
                order += rng.permutation(len(pool)).tolist()
            out += [
                Task(f"{pool[i].id}#{k}", pool[i].prompt, pool[i].reference, pool[i].meta)
                for k, i in enumerate(order[:count])
            ]
        return [out[i] for i in rng.permutation(len(out))]

    def entries(self, task: Task, group: int) -> list[Entry]:
        """The pool of one group of episodes, as skills; it depends on the task's id and the group's number alone."""
        if not self.shuffled:
            return self.sampler.sample(np.random.default_rng([self.seed, 6]))
        return self.sampler.sample(np.random.default_rng([self.seed, derive_seed(task.id, group)]))

    def pool(self, entries: Sequence[Entry]) -> Pool:
        """A priced pool with these members."""
        return Pool(
            [
                (
                    Member(
                        name=e.name,
                        descriptor=descriptor(e.skill, self.register),
                        input_price=0.0,
                        output_price=e.skill.price,
                        price_date="simulated",
                        size_b=100.0 if is_generalist(e.skill) else 3.0 * len(e.skill.domains),
                        max_concurrency=10_000,
                    ),
                    CallableBackend(
                        Specialist(e.skill, self.world, self.register, self.seed), identity=f"specialist:{e.skill}"
                    ),
                )
                for e in entries
            ],
            ledger=self.ledger,
        )

    def pool_for(self, task: Task, group: int) -> Pool:
        """The pool of one group of episodes."""
        return self.pool(self.entries(task, group))

    def env(self, **options: Any) -> RoutingEnv:
        """The routing environment over these pools."""
        settings: dict[str, Any] = {
            "pool_for": self.pool_for,
            "prompt": compact_prompt if self.register == "compact" else router_prompt,
            "helper_prompt": None,
        }
        return RoutingEnv(**(settings | options))

    # Warm start -------------------------------------------------------------------------------------------------------

    @property
    def words(self) -> tuple[str, ...]:
        """Words that a tiny policy's tokenizer holds as single tokens."""
        return vocabulary(self.world, self.domains)

    def scripts(
        self,
        policy: Any,
        n: int,
        *,
        per_prompt: int = 4,
        practice: float = 0.5,
        drills: float = 0.0,
        prices: bool = True,
        seed: int = 0,
    ) -> list[Trajectory]:
        """Scripted rollouts: valid in form, random in the choice of members and the number of calls.

        Args:
            policy: whose tokenizer is used.
            n: how many.
            per_prompt: rollouts for one question and pool; they share the prompt's computation in training.
            practice: share of prompts about arbitrary names with arbitrary replies, so that copying does not
                depend on which names the training split happens to hold.
            drills: share of look-up drills among them (compact register only).
            prices: the prompt shows prices.
            seed: of the script.
        """
        if n < 1:
            raise ConfigError(f"the warm start needs at least one scripted rollout, got {n}")
        rng = np.random.default_rng([self.seed, seed, 7])
        by_hops = [self.tasks("train", hops=(h,)) for h in (1, 2)]
        names = sorted(
            {name for f in self.world.facts if f.domain in self.domains for name in (f.subject, f.objects[0])}
        )
        out: list[Trajectory] = []
        env = self.env()
        while len(out) < n:
            if rng.random() < drills:
                # As many as a prompt has rollouts, so that the share is the stated one.
                count = min(per_prompt, n - len(out))
                drawn = (lookup_drill([*names, *DOMAINS], NAMES, rng, prices=prices) for _ in range(count))
                out += [_drill(policy, drill) for drill in drawn]
                continue
            kind = by_hops[int(rng.integers(2))]
            task = kind[int(rng.integers(len(kind)))]
            entries = self.sampler.sample(rng) if self.shuffled else self.entries(task, 0)
            members = {e.name: Specialist(e.skill, self.world, self.register, self.seed) for e in entries}
            ask = partial(_ask, members)
            if rng.random() < practice:
                task, ask = practice_task(task, names, rng)
            prompt = env.prompt(task.question, list(self.pool(entries).values()), prices=prices, budget_usd=None)
            prompt_ids = tuple(policy.render([{"role": "user", "content": prompt}]))
            for _ in range(min(per_prompt, n - len(out))):
                segments = scripted_rollout(task, entries, ask, rng, wrap=protocol.observation)
                turns = tuple(Turn(s.speaker, s.text, tuple(policy.encode(s.text))) for s in segments)
                out.append(Trajectory(task, turns, StopReason.DONE, prompt_ids=prompt_ids))
        return out

    # Judgement and baselines ------------------------------------------------------------------------------------------

    def competence(self, trajectory: Trajectory, call: Any) -> bool | None:
        """Whether the member that was asked knows the domain of what it was asked; None for a senseless query."""
        fact = parse(call.query, self.world)
        if fact is None:
            return None
        member = call.reply.member
        for listed in trajectory.info.get("roster", ()):
            if listed.name == member:
                return fact.domain in listed.descriptor
        return None

    def best_member(self, query: str, pool: Pool, rng: np.random.Generator) -> str:
        """The cheapest specialist in the domain of ``query``, found by reading descriptors with perfect parsing.

        What a router that understands question and descriptors perfectly would choose.
        """
        fact = parse(query, self.world)
        known = [m for m in pool.values() if fact is not None and fact.domain in m.descriptor]
        special = [m for m in known if m.output_price < max(x.output_price for x in pool.values())]
        return min(special or known or list(pool.values()), key=lambda m: m.output_price).name

    def decompose(self, task: Task, earlier: Sequence[str]) -> str | None:
        """The next sub-question of a question's chain, with the answers so far filled in."""
        chain = task.meta["chain"]
        k = len(earlier)
        if k >= len(chain):
            return None
        subject = chain[0].subject if k == 0 else earlier[-1]
        return sub_question(chain[k].relation, subject, self.register)

    read = staticmethod(read_answer)


def _drill(policy: Any, drill: Any) -> Trajectory:
    turns = tuple(
        turn
        for cue, answer in drill.lookups
        for turn in (
            Turn("environment", cue, tuple(policy.encode(cue))),
            Turn("policy", answer, tuple(policy.encode(answer))),
        )
    )
    prompt_ids = tuple(policy.render([{"role": "user", "content": drill.roster}]))
    task = Task("drill", drill.roster, None)
    return Trajectory(task, turns, StopReason.DONE, prompt_ids=prompt_ids)


def _ask(members: dict[str, Specialist], name: str, query: str) -> str:
    return members[name](query)[0]


def run(coroutine: Any) -> Any:
    """Run a coroutine from plain code."""
    return asyncio.run(coroutine)
