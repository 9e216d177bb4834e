"""Texts on which a small tokenizer can be trained without seeing an entity of the other splits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from guerdon.environments.worldfacts.facts import BASIC_RELATIONS, World
from guerdon.environments.worldfacts.pools import NAMES, Entry, PoolSampler, descriptor, held_out_names
from guerdon.environments.worldfacts.questions import CORE_DOMAINS, FRAMES, Register, make_tasks
from guerdon.environments.worldfacts.scripts import scripted_rollout
from guerdon.environments.worldfacts.specialists import Skill, Specialist
from guerdon.errors import ConfigError

__all__ = ["text_corpus"]


def text_corpus(
    world: World,
    *,
    register: Register = "compact",
    domains: Sequence[str] = CORE_DOMAINS,
    relations: Sequence[str] = BASIC_RELATIONS,
    rollouts: int = 500,
    seed: int = 0,
) -> list[str]:
    """Questions, member lines and scripted rollouts of the train split, with digits, pieces of names and prices.

    The members of these rollouts answer everything rightly: a wrong answer could be the name of a test entity.

    Args:
        world: the facts.
        register, domains, relations, seed: as for :func:`make_tasks`.
        rollouts: how many scripted rollouts.

    Returns:
        One text per question, member line and rollout.
    """
    if rollouts < 0:
        raise ConfigError(f"rollouts must be >= 0, got {rollouts}")
    frames = FRAMES if register == "natural" else 1
    tasks = make_tasks(
        world, "train", register=register, domains=domains, relations=relations, seed=seed, frames=frames
    )
    texts = [f"Question: {t.question}" for t in tasks]
    texts += sorted({q for t in tasks for q in t.meta["sub_questions"]})
    texts += [" ".join(map(str, range(31))), " ".join(n for n in NAMES if n not in held_out_names())]
    rng = np.random.default_rng([seed, 31])
    sampler = PoolSampler(tuple(domains))
    for _ in range(rollouts):
        pool = sampler.sample(rng)
        texts += [f"- {e.name} : {descriptor(e.skill, register)} ; $ {e.skill.price:.0f}" for e in pool]
        task = tasks[int(rng.integers(len(tasks)))]
        members = {e.name: Specialist(_faultless(e), world, register, seed) for e in pool}

        def ask(name: str, query: str, members: dict[str, Specialist] = members) -> str:
            return members[name](query)[0]

        segments = scripted_rollout(task, pool, ask, rng, wrap=_wrap)
        texts.append("".join(s.text for s in segments))
    return texts


def _faultless(entry: Entry) -> Skill:
    return Skill(entry.skill.domains, 1.0, 1.0, entry.skill.price, entry.skill.verbosity)


def _wrap(reply: str) -> str:
    return f"\n\n<information>{reply}</information>\n\n"
