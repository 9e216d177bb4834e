"""Simulated pool members with stated competence: deterministic, priced, more or less verbose.

A specialist answers one-hop questions. Inside its domains it is right with its stated accuracy, outside
with a small one; a wrong answer is another object of the same relation. The same question to the same
skill always gets the same reply, so that caches and replays hold.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from guerdon.environments.worldfacts.facts import Fact, World
from guerdon.environments.worldfacts.questions import Register, parse
from guerdon.errors import ConfigError

__all__ = ["Skill", "Specialist", "informative", "read_answer"]

_UNKNOWN = {"compact": "= unknown", "natural": "I do not know. Please ask another model."}
_ENGLISH = (
    "I am glad to help with such questions at any time, and I would be happy to explain how I know this, "
    "to give further context about the matter, or to check the answer against another source if that is of use."
)
_FILLER = {"compact": ["."], "natural": _ENGLISH.split(" ")}
_OPENING = "The answer is "


@dataclass(frozen=True, slots=True)
class Skill:
    """What a member knows and what it costs.

    Args:
        domains: in which it is competent.
        accuracy: share of right answers inside its domains.
        outside: share of right answers elsewhere.
        price: USD per million output tokens.
        verbosity: words of each reply, the answer included; a longer answer is not cut.
    """

    domains: tuple[str, ...]
    accuracy: float = 0.95
    outside: float = 0.05
    price: float = 2.0
    verbosity: int = 8

    def __post_init__(self) -> None:
        if not self.domains:
            raise ConfigError("a skill needs at least one domain")
        for name in ("accuracy", "outside"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.price < float("inf"):
            raise ConfigError(f"price must be finite and >= 0, got {self.price}")
        if not 5 <= self.verbosity <= 40:
            raise ConfigError(f"verbosity must be 5 to 40 words, got {self.verbosity}")

    def knows(self, domain: str) -> bool:
        """Whether ``domain`` is one of its own."""
        return domain in self.domains

    def accuracy_in(self, domain: str) -> float:
        """Probability of a right answer to a one-hop question in ``domain``."""
        return self.accuracy if self.knows(domain) else self.outside


@dataclass(frozen=True, slots=True)
class Specialist:
    """Answers questions with a :class:`Skill`; call it with a query, get ``(text, output tokens)``.

    Args:
        skill: what it knows.
        world: the facts.
        register: of its replies.
        seed: decides which questions it gets wrong, together with its domains.
        noise: ``"question"`` fixes the reply to each question, so that asking again changes nothing;
            ``"call"`` draws anew at every call (in the order of calls; caches and replays then do not hold).
    """

    skill: Skill
    world: World
    register: Register = "compact"
    seed: int = 0
    noise: Literal["question", "call"] = "question"
    _count: Iterator[int] = field(default_factory=itertools.count, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.noise not in ("question", "call"):
            raise ConfigError(f"noise must be 'question' or 'call', got {self.noise!r}")

    def __call__(self, query: str) -> tuple[str, int]:
        """Reply to a one-hop question; anything else gets a short "I do not know". Tokens are words."""
        fact = parse(query, self.world)
        words = (_UNKNOWN[self.register] if fact is None else self._sentence(self.reply(fact))).split()
        filler = itertools.cycle(_FILLER[self.register])
        words += itertools.islice(filler, max(0, self.skill.verbosity - len(words)))
        return " ".join(words), len(words)

    def _sentence(self, answer: str) -> str:
        return f"= {answer}" if self.register == "compact" else f"{_OPENING}{answer}."

    def reply(self, fact: Fact) -> str:
        """The bare answer, right or wrong."""
        luck, pick = self._draw(fact)
        others = self.world.distractors(fact)
        if luck < self.skill.accuracy_in(fact.domain) or not others:
            return fact.objects[0]
        return others[int(pick * len(others))]

    def _draw(self, fact: Fact) -> tuple[float, float]:
        parts = [str(self.seed), *sorted(self.skill.domains), fact.relation, fact.subject.lower()]
        if self.noise == "call":
            parts.append(str(next(self._count)))
        digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()
        # 53 bits, so that the quotient is exact and below 1.
        luck, pick = ((int.from_bytes(digest[k : k + 7], "little") >> 3) / 2**53 for k in (0, 8))
        return luck, pick


def read_answer(reply: str) -> str:
    """The bare answer in a specialist's reply, in either register."""
    words = reply.split()
    if words[:1] == ["="]:
        while words and words[-1] == ".":
            words.pop()
        return " ".join(words[1:])
    # The answer may hold full stops of its own ("St. John's"), so that filler is known by its words alone.
    filler = _FILLER["natural"]
    for n in range(len(words), 0, -1):
        if words[-n:] == [filler[k % len(filler)] for k in range(n)]:
            words = words[:-n]
            break
    return " ".join(words).removeprefix(_OPENING).removesuffix(".")


def informative(reply: str) -> bool:
    """Whether a specialist's reply holds an answer at all."""
    return read_answer(reply) not in {read_answer(text) for text in _UNKNOWN.values()}
