"""Look-up drills: every answer is an owner in the roster, and no word or name is favoured."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from guerdon.environments.worldfacts import NAMES, held_out_names, lookup_drill
from guerdon.errors import ConfigError

WORDS = [f"w{k}" for k in range(20)]


def owners(roster: str, skill: str, prices: bool) -> set[str]:
    entries = [e.split() for line in roster.split("\n") for e in line.removeprefix("- ").split(" , ")]
    return {e[-1] for e in entries if e[1 if prices else 0] == skill}


@pytest.mark.parametrize("prices", [True, False])
def test_every_answer_owns_the_skill_that_is_asked_for(prices: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        drill = lookup_drill(WORDS, NAMES, rng, prices=prices)
        assert len(drill.roster.split("\n")) == 6 and len(drill.lookups) == 12
        for cue, answer in drill.lookups:
            skill, name = answer.split()
            assert cue == f" need {skill} ; try" and name in owners(drill.roster, skill, prices)


def test_a_roster_reads_like_the_compact_prompt() -> None:
    drill = lookup_drill(["x"], ["n-1"], np.random.default_rng(0), members=1, skills=1, queries=1)
    _, price, *rest = drill.roster.split(" ")
    assert drill.roster.startswith("- ") and 1 <= int(price) <= 30 and rest == ["x", "n-1"]


def test_names_are_drawn_alike_and_held_out_ones_occur() -> None:
    rng = np.random.default_rng(1)
    seen = Counter(
        line.split(" ")[-1] for _ in range(800) for line in lookup_drill(WORDS, NAMES, rng).roster.split("\n")
    )
    assert set(held_out_names()) <= set(seen)
    assert chisquare([seen[n] for n in NAMES]).pvalue > 1e-3


def test_a_drill_is_drawn_by_the_seed_alone() -> None:
    draw = lambda seed: lookup_drill(WORDS, NAMES, np.random.default_rng(seed))  # noqa: E731
    assert draw(3) == draw(3) != draw(4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"members": 0}, "at least 1"), ({"queries": 0}, "at least 1"), ({"skills": 21}, "are drawn from")],
)
def test_impossible_drills_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lookup_drill(WORDS, NAMES, np.random.default_rng(0), **wrong)
