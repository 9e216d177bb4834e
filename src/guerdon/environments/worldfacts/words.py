"""The words of the compact register, for a tokenizer that holds each of them as one token."""

from __future__ import annotations

from collections.abc import Sequence

from guerdon.environments.worldfacts.facts import BASIC_RELATIONS, DOMAINS, World
from guerdon.environments.worldfacts.pools import NAMES

__all__ = ["vocabulary"]

_GLUE = (
    " of",
    " :",
    " ,",
    " ;",
    " $",
    " .",
    " need",
    " try",
    " done",
    " nothing",
    " unknown",
    "=",
    "-",
    "\n\n",
    "Question:",
    "?",
)


def vocabulary(
    world: World, domains: Sequence[str] = DOMAINS, relations: Sequence[str] = BASIC_RELATIONS
) -> tuple[str, ...]:
    """Words of the compact register, each with the blank before it where it has one.

    Names of all entities are in it, those of the test split included: a closed vocabulary says nothing about
    which fact holds. Names of members, the held-out ones too, are one token each; look-up drills alone show the latter.
    """
    words = {f" {w}" for w in (*relations, *DOMAINS)}
    for fact in world.facts:
        if fact.domain in domains and fact.relation in relations:
            words |= {f" {fact.subject}", f" {fact.objects[0]}"}
    words |= {f" {name}" for name in NAMES}
    words |= {f" {price}" for price in range(1, 31)}
    return (*_GLUE, *sorted(words))
