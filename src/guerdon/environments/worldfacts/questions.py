"""Questions over the facts: one and two hops, two registers, split by entity.

The *natural* register is English for real language models, the *compact* one a few words for tiny
policies (``currency of country of Paris``). Both are read back by :func:`parse`, which knows one-hop
questions only: a member cannot answer a composed one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from guerdon.environments.worldfacts.facts import BASIC_RELATIONS, DOMAINS, KINDS, RELATIONS, Fact, World, normal_name
from guerdon.errors import ConfigError, DataError
from guerdon.types import Task

__all__ = [
    "CORE_DOMAINS",
    "FRAMES",
    "Hop",
    "Register",
    "Split",
    "make_tasks",
    "parse",
    "phrase",
    "split_entities",
    "sub_question",
]

Register = Literal["compact", "natural"]
Split = Literal["train", "validation", "test"]

CORE_DOMAINS = ("geography", "economy", "language", "borders")
"""Four domains between which two-hop questions can be composed."""

_PHRASES: Mapping[str, tuple[str, str]] = {
    "capital": ("the capital of {}", "the capital city of {}"),
    "country": ("the country whose capital is {}", "the country with the capital {}"),
    "continent": ("the continent of {}", "the continent on which {} lies"),
    "currency": ("the currency of {}", "the currency used in {}"),
    "issuer": ("the only country that uses the currency {}", "the only country whose currency is {}"),
    "language": ("the main language of {}", "the main language spoken in {}"),
    "homeland": ("the only country whose main language is {}", "the only country with the main language {}"),
    "neighbour": ("the most populous neighbour of {}", "the neighbour of {} with the most inhabitants"),
    "least-neighbour": ("the least populous neighbour of {}", "the neighbour of {} with the fewest inhabitants"),
    "widest-neighbour": ("the largest neighbour of {} by area", "the neighbour of {} with the largest area"),
    "population": ("the population bracket of {}", "the size class of the population of {}"),
    "code": ("the three-letter country code of {}", "the ISO alpha-3 code of {}"),
    "holder": ("the country with the three-letter code {}", "the country whose ISO alpha-3 code is {}"),
    "tld": ("the internet domain of {}", "the top-level domain of {}"),
    "prefix": ("the telephone prefix of {}", "the international calling code of {}"),
    "symbol": ("the chemical symbol of {}", "the symbol for {}"),
    "bearer": ("the element with the symbol {}", "the element whose chemical symbol is {}"),
    "number": ("the atomic number of {}", "the position of {} in the periodic table"),
    "element": ("the element with atomic number {}", "the element whose atomic number is {}"),
    "successor": ("the element that follows {} in the periodic table", "the element right after {}"),
    "predecessor": ("the element that precedes {} in the periodic table", "the element right before {}"),
}
_WRAPPERS = ("What is {}?", "Please name {}.", "Do you know {}?", "Tell me {}.", "Which is {}?")
FRAMES = len(_WRAPPERS) * 2
"""Number of different phrasings of one question in the natural register."""

_POLITE = re.compile(
    r"^(?:please|what is|what's|which is|do you know|(?:(?:can|could) you )?tell me|name|give me|state)\b\s*",
    re.IGNORECASE,
)
_COMPACT = re.compile(rf"^({'|'.join(RELATIONS)}) of (.+)$", re.IGNORECASE)


def _pattern(text: str) -> re.Pattern[str]:
    # The article is optional, and so is the British spelling.
    body = re.escape(text.removeprefix("the ")).replace(r"\{\}", "(.+)").replace("neighbour", "neighbou?r")
    return re.compile(f"^{body}$", re.IGNORECASE)


_NATURAL = [(relation, _pattern(text)) for relation, texts in _PHRASES.items() for text in texts]


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

    @property
    def answer(self) -> str:
        """What the next hop, or the whole question, builds on."""
        return self.objects[0]


def sub_question(relation: str, subject: str, register: Register, frame: int = 0) -> str:
    """The one-hop question ``relation of subject`` as the router would send it."""
    return phrase([Hop(relation, subject, ())], register, frame)


def phrase(chain: Sequence[Hop], register: Register, frame: int = 0) -> str:
    """The whole question of a chain.

    Args:
        chain: hops, first to last.
        register: of the text.
        frame: which of the :data:`FRAMES` phrasings (natural register only; counted round).
    """
    text = chain[0].subject
    if register == "compact":
        for hop in chain:
            text = f"{hop.relation} of {text}"
        return text
    variant = frame // len(_WRAPPERS) % 2
    for hop in chain:
        text = _PHRASES[hop.relation][variant].format(text)
    return _WRAPPERS[frame % len(_WRAPPERS)].format(text)


def parse(query: str, world: World) -> Fact | None:
    """The fact that a one-hop question asks for, or None: not understood, composed, or unknown.

    Case, articles, closing punctuation and polite frames do not matter; both registers are understood.
    """
    text = " ".join(query.split()).strip("?.!\"' ")
    while match := _POLITE.match(text):
        text = text[match.end() :]
    text = re.sub(r"^(?:the|a|an)\s+", "", text, flags=re.IGNORECASE)
    for relation, subject in _readings(text):
        fact = world.get(relation, subject)
        if fact is not None:
            return fact
    return None


def _readings(text: str) -> list[tuple[str, str]]:
    found = []
    if match := _COMPACT.match(text):
        found.append((match.group(1).lower(), match.group(2)))
    return found + [(relation, m.group(1)) for relation, pattern in _NATURAL if (m := pattern.match(text))]


def split_entities(
    world: World, seed: int = 0, shares: tuple[float, float, float] = (0.6, 0.1, 0.3)
) -> dict[str, Split]:
    """Assign every entity to train, validation or test, countries and elements each in these shares."""
    if abs(sum(shares) - 1) > 1e-9 or min(shares) < 0:
        raise ConfigError(f"shares must be three non-negative numbers with sum 1, got {shares}")
    out: dict[str, Split] = {}
    rng = np.random.default_rng([seed, 20])
    names: tuple[Split, ...] = get_args(Split)
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
    relations: Sequence[str] = BASIC_RELATIONS,
    hops: Sequence[int] = (1, 2),
    seed: int = 0,
    frames: int = 1,
) -> list[Task]:
    """All questions of one split.

    A two-hop chain takes its relations from two different domains, and every entity in it (subject,
    bridge and, where the answer is an entity, answer) belongs to the split.

    Args:
        world: the facts.
        split: train, validation or test.
        register: of the question text.
        domains: whose relations may occur.
        relations: which of their relations; pass ``RELATIONS`` for all.
        hops: which lengths of chain.
        seed: of the split by entity.
        frames: phrasings per question, at most :data:`FRAMES` (natural register; the compact one has one).

    Returns:
        Tasks whose ``reference`` is the list of gold answers and whose ``meta`` holds ``hops``,
        ``domains`` and ``relations`` (one per hop), ``chain`` (the :class:`Hop` objects with intermediate
        answers), ``sub_questions`` (each with the right intermediate answer filled in), ``entity``, ``split``
        and ``register``.

    Raises:
        ConfigError: unknown domain, relation, split or register, or hops or frames out of range.
        DataError: no question fits.
    """
    _check(split, register, domains, relations, hops, frames)
    where = split_entities(world, seed)
    wanted = [r for r in RELATIONS if r in relations and RELATIONS[r] in domains]
    by_subject: dict[tuple[str, str], list[Fact]] = {}
    ours: list[Fact] = []
    for fact in world.facts:
        answer = world.owner(KINDS[fact.relation][1], fact.objects[0])
        if fact.relation in wanted and where[fact.entity] == split and (answer is None or where[answer] == split):
            ours.append(fact)
            by_subject.setdefault((KINDS[fact.relation][0], fact.subject), []).append(fact)
    chains: list[tuple[Fact, ...]] = []
    for first in ours:
        if 1 in hops:
            chains.append((first,))
        if 2 in hops:
            bridge = KINDS[first.relation][1], first.objects[0]
            # Some chains come back to where they began (the code BTN is Bhutan's and its currency's).
            chains += [
                (first, second)
                for second in by_subject.get(bridge, ())
                if second.domain != first.domain and normal_name(first.subject) not in map(normal_name, second.objects)
            ]
    if not chains:
        raise DataError(
            f"no {register} question of split {split!r} with {' or '.join(map(str, hops))} hops uses the domains "
            f"{', '.join(domains)}; widen domains=, relations= or hops="
        )
    phrasings = frames if register == "natural" else 1
    return [_task(chain, split, register, frame) for chain in chains for frame in range(phrasings)]


def _task(facts: Sequence[Fact], split: Split, register: Register, frame: int) -> Task:
    chain = tuple(Hop(f.relation, f.subject, f.objects) for f in facts)
    text = phrase(chain, register, frame)
    meta = {
        "hops": len(chain),
        "domains": tuple(h.domain for h in chain),
        "relations": tuple(h.relation for h in chain),
        "chain": chain,
        "sub_questions": tuple(sub_question(h.relation, h.subject, register, frame) for h in chain),
        "entity": facts[0].entity,
        "split": split,
        "register": register,
    }
    return Task(f"{split}/{text}", text, list(chain[-1].objects), meta)  # type: ignore[arg-type]


def _check(
    split: str, register: str, domains: Sequence[str], relations: Sequence[str], hops: Sequence[int], frames: int
) -> None:
    for name, value, allowed in (("split", split, get_args(Split)), ("register", register, get_args(Register))):
        if value not in allowed:
            raise ConfigError(f"{name} must be {' or '.join(allowed)}, got {value!r}")
    for name, values, known in (("domain", domains, DOMAINS), ("relation", relations, tuple(RELATIONS))):
        unknown = [v for v in values if v not in known]
        if unknown:
            raise ConfigError(f"unknown {name} {unknown[0]!r}; choose from {', '.join(known)}")
    if not hops or not set(hops) <= {1, 2}:
        raise ConfigError(f"hops must be some of 1 and 2, got {tuple(hops)}")
    if not 1 <= frames <= FRAMES:
        raise ConfigError(f"frames must be 1 to {FRAMES}, got {frames}")
