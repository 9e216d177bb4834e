"""Look-up drills: arbitrary rosters in the form of the compact prompt, and many questions about each.

They teach to find in a roster who has a skill at a price, whatever the words are. Skills and names are drawn from the
whole vocabulary, held-out names included, so that no name owns a skill and no skill an owner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from guerdon.errors import ConfigError

__all__ = ["Drill", "lookup_drill"]


@dataclass(frozen=True, slots=True)
class Drill:
    """A roster and look-ups in it.

    Args:
        roster: one line per member, as the compact prompt shows them.
        lookups: ``(cue, answer)`` pairs; the text is their concatenation, and answers are what is learned.
    """

    roster: str
    lookups: tuple[tuple[str, str], ...]


def lookup_drill(
    words: Sequence[str],
    names: Sequence[str],
    rng: np.random.Generator,
    *,
    members: int = 6,
    skills: int = 4,
    queries: int = 12,
    prices: bool = True,
) -> Drill:
    """Draw a roster of ``members`` with one to three of ``skills`` each, and ask for a random entry ``queries`` times.

    Args:
        words: skills are drawn from these.
        names: members are drawn from these.
        rng: where randomness comes from.
        members, skills, queries: sizes.
        prices: entries are ``PRICE SKILL NAME``; else ``SKILL NAME``.

    Raises:
        ConfigError: sizes below 1, or fewer words or names than are drawn.
    """
    if min(members, skills, queries) < 1:
        raise ConfigError(f"members, skills and queries must be at least 1, got {members}, {skills} and {queries}")
    if len(words) < skills or len(names) < members:
        raise ConfigError(f"{members} names and {skills} words are drawn from {len(names)} and {len(words)}")
    known = [words[k] for k in rng.choice(len(words), skills, replace=False)]
    entries: list[tuple[str, str]] = []
    lines = []
    for k in rng.choice(len(names), members, replace=False):
        own = rng.permutation(known)[: int(rng.integers(1, min(3, skills) + 1))].tolist()
        price = f"{int(rng.integers(1, 5)) if rng.random() < 0.8 else int(rng.integers(5, 31))} " if prices else ""
        entries += [(skill, names[k]) for skill in own]
        lines.append("- " + " , ".join(f"{price}{skill} {names[k]}" for skill in own))
    asked = [entries[int(k)] for k in rng.integers(len(entries), size=queries)]
    lookups = tuple((f" need {skill} ; try", f" {skill} {name}") for skill, name in asked)
    return Drill("\n".join(lines), lookups)
