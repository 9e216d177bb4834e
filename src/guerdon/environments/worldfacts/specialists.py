"""Simulated pool members with stated competence: deterministic, priced, more or less verbose.

A specialist answers one-hop questions. Inside its domains it is right with its stated accuracy, outside
with a small one; a wrong answer is another object of the same relation. The same question to the same
skill always gets the same reply, so that caches and replays hold.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from guerdon.environments.worldfacts.facts import Fact, World
from guerdon.environments.worldfacts.questions import Register, parse
from guerdon.errors import ConfigError

__all__ = ["Skill", "Specialist", "read_answer"]

UNKNOWN = {"compact": "= unknown", "natural": "I do not know. Please ask another model."}
_FILLER = {
    "compact": ". . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . .",
    "natural": "I am glad to help with such questions at any time, and I would be happy to explain how I know this, "
    "to give further context about the matter, or to check the answer against another source if that is of use.",
}


@dataclass(frozen=True, slots=True)
class Skill:
    """What a member knows and what it costs.

    Args:
        domains: in which it is competent.
        accuracy: share of right answers inside its domains.
        outside: share of right answers elsewhere.
        price: USD per million output tokens.
        verbosity: words of each reply, the answer included.
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
        if not self.price >= 0:
            raise ConfigError(f"price must be >= 0, got {self.price}")
        if not 5 <= self.verbosity <= 40:
            raise ConfigError(f"verbosity must be 5 to 40 words, got {self.verbosity}")

    def knows(self, domain: str) -> bool:
        """Whether ``domain`` is one of its own."""
        return domain in self.domains


@dataclass(frozen=True, slots=True)
class Specialist:
    """Answers questions with a :class:`Skill`; call it with a query, get ``(text, output tokens)``.

    Args:
        skill: what it knows.
        world: the facts.
        register: of its replies.
        seed: decides which questions it gets wrong, together with its domains.
    """

    skill: Skill
    world: World
    register: Register = "compact"
    seed: int = 0

    def __call__(self, query: str) -> tuple[str, int]:
        """Reply to a one-hop question; anything else gets a short "I do not know". Tokens are words."""
        fact = parse(query, self.world)
        core = UNKNOWN[self.register] if fact is None else self._answer(fact)
        words = core.split()
        filler = _FILLER[self.register].split()
        padded = [*words, *(filler[k % len(filler)] for k in range(self.skill.verbosity - len(words)))]
        return " ".join(padded), len(padded)

    def _answer(self, fact: Fact) -> str:
        chosen = self.reply(fact)
        if self.register == "compact":
            return f"= {chosen}"
        return f"The answer is {chosen}."

    def reply(self, fact: Fact) -> str:
        """The bare answer, right or wrong."""
        accuracy = self.skill.accuracy if self.skill.knows(fact.domain) else self.skill.outside
        luck, pick = self._draw(fact)
        if luck < accuracy:
            return fact.objects[0]
        known = {o.lower() for o in fact.objects}
        others = [o for o in self.world.objects(fact.relation) if o.lower() not in known]
        return others[int(pick * len(others))]

    def _draw(self, fact: Fact) -> tuple[float, float]:
        key = "\0".join((str(self.seed), *sorted(self.skill.domains), fact.relation, fact.subject.lower()))
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        return tuple(int.from_bytes(digest[k : k + 7], "little") / 2**56 for k in (0, 8))  # type: ignore[return-value]


def read_answer(reply: str) -> str:
    """The bare answer in a specialist's reply, in either register."""
    text = reply.strip()
    if text.startswith("= "):
        words = text[2:].split(" ")
        while words and words[-1] == ".":
            words.pop()
        return " ".join(words)
    text = text.removeprefix("The answer is ")
    # The answer may hold full stops of its own ("St. John's"), the filler begins a new sentence.
    for start in (". I am glad", ". Please ask"):
        text = text.partition(start)[0]
    return text.rstrip(".").strip()
