"""Pools of specialists: skills, names, and which of both are held out for the test of unseen members."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import prod

import numpy as np

from guerdon.environments.worldfacts.facts import DOMAINS
from guerdon.environments.worldfacts.questions import CORE_DOMAINS, Register
from guerdon.environments.worldfacts.specialists import Skill
from guerdon.errors import ConfigError

__all__ = [
    "FIRST",
    "NAMES",
    "SECOND",
    "Entry",
    "PoolSampler",
    "chain_accuracy",
    "descriptor",
    "held_out_names",
    "held_out_pairs",
    "is_generalist",
    "read_descriptor",
]

FIRST = ("nova", "atlas", "orbit", "pixel", "quark", "raven", "sigma", "terra")
SECOND = ("1", "2", "3")
NAMES: tuple[str, ...] = tuple(f"{a}-{b}" for a, b in product(FIRST, SECOND))
"""All names; the first parts are unique within a pool."""


def held_out_names() -> tuple[str, ...]:
    """Names that training never shows: one combination for each first part, made of parts that it does show."""
    return tuple(f"{a}-{SECOND[k % len(SECOND)]}" for k, a in enumerate(FIRST))


def held_out_pairs(domains: Sequence[str] = CORE_DOMAINS) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two pairs of domains that no specialist has in training; they share no domain."""
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
    if is_generalist(skill):
        return f"A large generalist. Knows {', '.join(skill.domains[:-1])} and {skill.domains[-1]} reasonably well."
    return f"A specialist in {' and '.join(skill.domains)}. Reliable there, and unreliable in anything else."


def read_descriptor(text: str) -> tuple[str, ...]:
    """The domains that a descriptor names, in its order, in either register."""
    return tuple(w for w in re.findall(r"\w+", text.lower()) if w in DOMAINS)


def is_generalist(skill: Skill) -> bool:
    """Whether a skill is the generalist's."""
    return len(skill.domains) > 2


def chain_accuracy(domains: Sequence[str], choose: Callable[[str], Skill]) -> float:
    """Probability that asking ``choose(domain)`` hop by hop ends with the right answer.

    Args:
        domains: one per hop.
        choose: which skill is asked in a domain.

    Returns:
        The product of the hops' accuracies. A wrong bridge that leads to the right answer by luck (both
        countries use the euro) is not counted, so that measured figures lie a little above.
    """
    return prod(choose(d).accuracy_in(d) for d in domains)


@dataclass(frozen=True, slots=True)
class PoolSampler:
    """Draws pools of specialists and one dear generalist, with names shuffled from pool to pool.

    Two-domain specialists that together know every domain come first, then a further pair, then specialists
    in one domain; no two have the same domains. The generalist knows three quarters of the domains, less
    reliably, and is the dearest and the most verbose.

    With the defaults (accuracy .95 and .05 outside, generalist .85) a right choice of specialists answers .95
    of one-hop and .90 of two-hop questions, the generalist alone .65 and .38 (.85 and .72 where it knows both
    domains, see ``needs`` of :meth:`sample`), members chosen at random .45 and .20; no single call answers a
    two-hop question. Lucky bridges, which :func:`chain_accuracy` leaves out, add one to three hundredths to
    two hops.

    Args:
        domains: at least four.
        held_out: False draws names and pairs for training; True puts both held-out pairs and only
            held-out names into every pool.
        accuracy, outside: of specialists.
        general_accuracy: of the generalist.
        general_price: USD per million output tokens, above 4; specialists cost 1 or 2 (one domain) to 4.
        specialists: how many, at most seven.

    Raises:
        ConfigError: sizes that do not fit together, or a generalist that is not the dearest.
    """

    domains: tuple[str, ...] = CORE_DOMAINS
    held_out: bool = False
    accuracy: float = 0.95
    outside: float = 0.05
    general_accuracy: float = 0.85
    general_price: float = 20.0
    specialists: int = 5

    def __post_init__(self) -> None:
        unknown = [d for d in self.domains if d not in DOMAINS]
        if unknown:
            raise ConfigError(f"unknown domain {unknown[0]!r}; choose from {', '.join(DOMAINS)}")
        if len(self.domains) < 4 or len(set(self.domains)) < len(self.domains):
            raise ConfigError(f"a pool is drawn over four or more different domains, got {', '.join(self.domains)}")
        least = -(-len(self.domains) // 2)
        if not least <= self.specialists < len(FIRST):
            raise ConfigError(
                f"specialists must be {least} to {len(FIRST) - 1} for {len(self.domains)} domains, "
                f"got {self.specialists}"
            )
        if self.general_price <= 4:
            raise ConfigError(f"general_price must be above 4, the dearest specialist's, got {self.general_price}")

    def sample(self, rng: np.random.Generator, needs: Sequence[str] = ()) -> list[Entry]:
        """Draw a pool.

        Args:
            rng: where randomness comes from.
            needs: domains that the generalist has to know (those of a task, say); at most as many as it knows.
        """
        skills = self._skills(rng, needs)
        names = self._names(rng, len(skills))
        order = rng.permutation(len(skills))
        return [Entry(name, skills[k]) for name, k in zip(names, order, strict=True)]

    def _names(self, rng: np.random.Generator, n: int) -> list[str]:
        reserved = set(held_out_names())
        allowed = [name for name in NAMES if (name in reserved) == self.held_out]
        firsts = rng.permutation(FIRST)[:n]
        return [str(rng.choice([name for name in allowed if name.startswith(f"{first}-")])) for first in firsts]

    def _skills(self, rng: np.random.Generator, needs: Sequence[str]) -> list[Skill]:
        reserved = [frozenset(p) for p in held_out_pairs(self.domains)]
        chosen = self._cover(rng, reserved)
        pairs = [p for p in combinations(self.domains, 2) if frozenset(p) not in (*chosen, *reserved)]
        if len(chosen) < self.specialists:
            chosen.append(frozenset(pairs[int(rng.integers(len(pairs)))]))
        singles = [frozenset((d,)) for d in rng.permutation(self.domains).tolist()]
        chosen += [s for s in singles if s not in chosen][: self.specialists - len(chosen)]
        skills = [self._skill(rng, domains) for domains in chosen]
        return [*skills, self._generalist(rng, needs)]

    def _cover(self, rng: np.random.Generator, reserved: list[frozenset[str]]) -> list[frozenset[str]]:
        """Pairs (and a single domain where their number is odd) that hold every domain once."""
        fixed = reserved if self.held_out else []
        rest = [d for d in self.domains if not any(d in p for p in fixed)]
        while True:
            drawn = rng.permutation(rest).tolist() if rest else []
            cover = [frozenset(drawn[k : k + 2]) for k in range(0, len(drawn), 2)]
            if not any(pair in reserved for pair in cover):
                return [*fixed, *cover]

    def _skill(self, rng: np.random.Generator, domains: frozenset[str]) -> Skill:
        price = float(rng.integers(1, 3)) if len(domains) == 1 else float(rng.integers(2, 5))
        shuffled = tuple(rng.permutation(sorted(domains)).tolist())
        return Skill(shuffled, self.accuracy, self.outside, price, int(rng.integers(5, 9)))

    def _generalist(self, rng: np.random.Generator, needs: Sequence[str]) -> Skill:
        spare = [d for d in self.domains if d not in needs]
        missing = len(self.domains) // 4
        if len(spare) < missing:
            raise ConfigError(
                f"the generalist knows {len(self.domains) - missing} of the domains {', '.join(self.domains)}, "
                f"so needs= may name no more than that, got {', '.join(needs)}"
            )
        unknown = set(rng.permutation(spare)[:missing].tolist())
        known = tuple(d for d in self.domains if d not in unknown)
        return Skill(known, self.general_accuracy, self.outside, self.general_price, 14)
