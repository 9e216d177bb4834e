"""Questions over the facts: one and two hops, two registers, split by entity.

The *natural* register is English for real language models, the *compact* one a few words for tiny
policies (``currency of country of Paris``). Both are read back by :func:`parse`, which knows one-hop
questions only: a member cannot answer a composed one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from guerdon.environments.worldfacts.facts import RELATIONS, Fact, World
from guerdon.errors import ConfigError, DataError
from guerdon.types import Task

__all__ = ["CORE_DOMAINS", "Register", "make_tasks", "parse", "phrase", "split_entities", "sub_question"]

Register = Literal["compact", "natural"]
Split = Literal["train", "validation", "test"]

CORE_DOMAINS = ("geography", "economy", "language", "borders")
"""Four domains between which two-hop questions can be composed."""

_NOUN_PHRASE: Mapping[str, str] = {
    "capital": "the capital of {}",
    "country": "the country whose capital is {}",
    "continent": "the continent of {}",
    "currency": "the currency of {}",
    "language": "the main language of {}",
    "neighbour": "the most populous neighbour of {}",
    "population": "the population bracket of {}",
    "symbol": "the chemical symbol of {}",
    "number": "the atomic number of {}",
    "element": "the element with atomic number {}",
}
_FRAMES = ("What is {}?", "Please name {}.", "Do you know {}?", "Tell me {}.", "Which is {}?")
_FRAME_WORDS = re.compile(r"^(?:what is|what's|please name|do you know|tell me|which is|name|give me|state)\s+", re.IGNORECASE)
_COMPACT = re.compile(rf"^({'|'.join(RELATIONS)}) of (.+)$", re.IGNORECASE)
_NATURAL = {
    relation: re.compile("^" + re.escape(text.removeprefix("the ")).replace(r"\{\}", "(.+)") + "$", re.IGNORECASE)
    for relation, text in _NOUN_PHRASE.items()
}


@dataclass(frozen=True, slots=True)
class Hop:
    """One step of a question's chain, in the order in which it has to be answered."""

    relation: str
    subject: str
    objects: tuple[str, ...]

    @property
    def domain(self) -> str:
        """Domain of the relation."""
        return RELATIONS[self.relation]


def sub_question(relation: str, subject: str, register: Register) -> str:
    """The one-hop question ``relation of subject`` as the router would send it."""
    if register == "compact":
        return f"{relation} of {subject}"
    return f"What is {_NOUN_PHRASE[relation].format(subject)}?"


def phrase(chain: Sequence[Hop], register: Register, frame: int = 0) -> str:
    """The whole question of a chain."""
    text = chain[0].subject
    for hop in chain:
        text = f"{hop.relation} of {text}" if register == "compact" else _NOUN_PHRASE[hop.relation].format(text)
    return text if register == "compact" else _FRAMES[frame % len(_FRAMES)].format(text)


def parse(query: str, world: World) -> Fact | None:
    """The fact that a one-hop question asks for, or None: not understood, composed, or unknown.

    Case, articles, closing punctuation and polite frames do not matter; both registers are understood.
    """
    text = re.sub(r"\s+", " ", query).strip().strip("?.! ").strip()
    text = _FRAME_WORDS.sub("", text)
    text = re.sub(r"^the\s+", "", text, flags=re.IGNORECASE)
    for relation, subject in _readings(text):
        fact = world.get(relation, subject) or world.get(relation, re.sub(r"^the\s+", "", subject, flags=re.IGNORECASE))
        if fact is not None:
            return fact
    return None


def _readings(text: str) -> list[tuple[str, str]]:
    found = []
    if match := _COMPACT.match(text):
        found.append((match.group(1).lower(), match.group(2)))
    for relation, pattern in _NATURAL.items():
        if match := pattern.match(text):
            found.append((relation, match.group(1)))
    return found


def split_entities(
    world: World, seed: int = 0, shares: tuple[float, float, float] = (0.6, 0.1, 0.3)
) -> dict[str, Split]:
    """Assign every entity to train, validation or test, countries and elements each in these shares."""
    if abs(sum(shares) - 1) > 1e-9 or min(shares) < 0:
        raise ConfigError(f"shares must be three non-negative numbers with sum 1, got {shares}")
    out: dict[str, Split] = {}
    rng = np.random.default_rng([seed, 20])
    names: tuple[Split, ...] = ("train", "validation", "test")
    for kind in (False, True):
        entities = [e for e in world.entities if e.startswith("element ") == kind]
        cuts = np.cumsum([round(s * len(entities)) for s in shares[:2]])
        for rank, k in enumerate(rng.permutation(len(entities))):
            out[entities[k]] = names[int(np.searchsorted(cuts, rank, side="right"))]
    return out


def make_tasks(
    world: World,
    split: Split,
    *,
    register: Register = "compact",
    domains: Sequence[str] = CORE_DOMAINS,
    hops: Sequence[int] = (1, 2),
    seed: int = 0,
    frames: int = 1,
) -> list[Task]:
    """All questions of one split.

    A two-hop chain takes its relations from two different domains, and every entity in it, the bridge
    included, belongs to the split.

    Args:
        world: the facts.
        split: train, validation or test.
        register: of the question text.
        domains: whose relations may occur.
        hops: which lengths of chain.
        seed: of the split by entity.
        frames: phrasings per question (natural register; the compact one has a single phrasing).

    Returns:
        Tasks whose ``reference`` is the list of gold answers and whose ``meta`` holds ``hops``,
        ``domains``, ``chain`` (the :class:`Hop` objects), ``entity``, ``split`` and ``register``.

    Raises:
        ConfigError: unknown domain, split or register.
        DataError: no question fits.
    """
    unknown = set(domains) - set(RELATIONS.values())
    if unknown:
        raise ConfigError(f"unknown domain {sorted(unknown)[0]!r}; choose from {', '.join(dict.fromkeys(RELATIONS.values()))}")
    if split not in ("train", "validation", "test"):
        raise ConfigError(f"split must be train, validation or test, got {split!r}")
    if register not in ("compact", "natural"):
        raise ConfigError(f"register must be compact or natural, got {register!r}")
    where = split_entities(world, seed)
    owner = _owners(world)
    chains: list[tuple[Hop, ...]] = []
    for fact in world.facts:
        if fact.domain not in domains or where[fact.entity] != split:
            continue
        bridge = owner.get(fact.objects[0])
        if fact.relation in ("neighbour", "country") and (bridge is None or where[bridge] != split):
            continue
        first = Hop(fact.relation, fact.subject, fact.objects)
        if 1 in hops:
            chains.append((first,))
        if 2 not in hops:
            continue
        for relation, domain in RELATIONS.items():
            second = world.get(relation, fact.objects[0])
            if second is None or domain == fact.domain or domain not in domains or where[second.entity] != split:
                continue
            # Coming back to the start, or ending outside the split, would not be a clean second hop.
            ends = owner.get(second.objects[0])
            if second.objects[0].lower() == fact.subject.lower() or (relation == "neighbour" and ends and where[ends] != split):
                continue
            chains.append((first, Hop(relation, fact.objects[0], second.objects)))
    if not chains:
        raise DataError(f"no {register} question of split {split!r} uses the domains {', '.join(domains)}")
    tasks = []
    for chain in chains:
        for frame in range(frames if register == "natural" else 1):
            text = phrase(chain, register, frame)
            meta = {
                "hops": len(chain),
                "domains": tuple(h.domain for h in chain),
                "chain": chain,
                "entity": world.get(chain[0].relation, chain[0].subject).entity,  # type: ignore[union-attr]
                "split": split,
                "register": register,
            }
            tasks.append(Task(f"{split}/{text}", text, list(chain[-1].objects), meta))  # type: ignore[arg-type]
    return tasks


def _owners(world: World) -> dict[str, str]:
    """Entity of each name that can be the subject of a country fact."""
    return {f.subject: f.entity for f in world.facts if not f.entity.startswith("element ")}
