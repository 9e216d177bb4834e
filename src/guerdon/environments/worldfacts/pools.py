"""Pools of specialists: skills, names, and which of both are held out for the test of unseen members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

from guerdon.environments.worldfacts.questions import CORE_DOMAINS, Register
from guerdon.environments.worldfacts.specialists import Skill
from guerdon.errors import ConfigError

__all__ = ["NAMES", "Entry", "PoolSampler", "descriptor", "held_out_names", "held_out_pairs"]

FIRST = ("nova", "atlas", "orbit", "pixel", "quark", "raven", "sigma", "terra")
SECOND = ("1", "2", "3", "4", "5", "6", "7", "8")
NAMES: tuple[str, ...] = tuple(f"{a}-{b}" for a, b in product(FIRST, SECOND))
"""All names; the first parts are unique within a pool."""


def held_out_names() -> tuple[str, ...]:
    """Names that training never shows: two combinations for each first part, made of parts that it does show."""
    return tuple(f"{a}-{SECOND[(k + shift) % len(SECOND)]}" for k, a in enumerate(FIRST) for shift in (0, 3))


def held_out_pairs(domains: Sequence[str] = CORE_DOMAINS) -> tuple[tuple[str, ...], ...]:
    """Two pairs of domains that no specialist has in training; together they cover four domains."""
    return ((domains[0], domains[2]), (domains[1], domains[3]))


@dataclass(frozen=True, slots=True)
class Entry:
    """A member of a pool: its name and its skill."""

    name: str
    skill: Skill


def descriptor(skill: Skill, register: Register) -> str:
    """What the router is told about a skill; prices are shown by the prompt itself."""
    if register == "compact":
        return " , ".join(skill.domains)
    if len(skill.domains) > 2:
        return f"A large generalist. Knows {', '.join(skill.domains[:-1])} and {skill.domains[-1]} reasonably well."
    return f"A specialist in {' and '.join(skill.domains)}. Reliable there, and unreliable in anything else."


@dataclass(frozen=True, slots=True)
class PoolSampler:
    """Draws pools of five specialists and one dear generalist, with names shuffled from pool to pool.

    Every domain is known by at least one specialist. The generalist knows three of the four domains less
    reliably, and is the dearest and the most verbose.

    Args:
        domains: four domains.
        held_out: False draws names and pairs for training; True puts both held-out pairs and only
            held-out names into every pool.
        accuracy, outside: of specialists.
        general_accuracy: of the generalist.
        general_price: USD per million output tokens; specialists cost 1 (one domain) to 4.
    """

    domains: tuple[str, ...] = CORE_DOMAINS
    held_out: bool = False
    accuracy: float = 0.95
    outside: float = 0.05
    general_accuracy: float = 0.85
    general_price: float = 20.0

    def __post_init__(self) -> None:
        if len(self.domains) != 4:
            raise ConfigError(f"a pool is drawn over four domains, got {len(self.domains)}")

    def sample(self, rng: np.random.Generator) -> list[Entry]:
        """Draw a pool of six."""
        names = self._names(rng)
        skills = self._skills(rng)
        order = rng.permutation(len(skills))
        return [Entry(name, skills[k]) for name, k in zip(names, order, strict=True)]

    def _names(self, rng: np.random.Generator) -> list[str]:
        reserved = set(held_out_names())
        allowed = [n for n in NAMES if (n in reserved) == self.held_out]
        firsts = rng.permutation(FIRST)[:6]
        return [str(rng.choice([n for n in allowed if n.startswith(f"{first}-")])) for first in firsts]

    def _skills(self, rng: np.random.Generator) -> list[Skill]:
        reserved = {frozenset(p) for p in held_out_pairs(self.domains)}
        pairs = [p for p in combinations(self.domains, 2) if frozenset(p) not in reserved]
        if self.held_out:
            chosen = [tuple(p) for p in held_out_pairs(self.domains)]
        else:
            first = pairs[int(rng.integers(len(pairs)))]
            # Its complement, so that the two pairs together cover all four domains.
            chosen = [first, tuple(d for d in self.domains if d not in first)]
        extra = pairs[int(rng.integers(len(pairs)))]
        singles = [self.domains[int(k)] for k in rng.permutation(4)[:2]]
        skills = [self._skill(rng, d) for d in (*chosen, extra)] + [self._skill(rng, (d,)) for d in singles]
        missing = int(rng.integers(4))
        known = tuple(d for k, d in enumerate(self.domains) if k != missing)
        return [*skills, Skill(known, self.general_accuracy, self.outside, self.general_price, 14)]

    def _skill(self, rng: np.random.Generator, domains: tuple[str, ...]) -> Skill:
        price = float(rng.integers(1, 3)) if len(domains) == 1 else float(rng.integers(2, 5))
        shuffled = tuple(str(d) for d in rng.permutation(domains))
        return Skill(shuffled, self.accuracy, self.outside, price, int(rng.integers(5, 9)))


def is_generalist(skill: Skill) -> bool:
    """Whether a skill is the generalist's."""
    return len(skill.domains) > 2
