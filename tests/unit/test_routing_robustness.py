"""Variations of the pool: what each changes, and what it leaves, so that a row says what it seems to say."""

from __future__ import annotations

import pytest

from guerdon.environments.worldfacts import held_out_names
from guerdon.routing.robustness import variations
from guerdon.routing.testbed import WorldFactsTestbed


@pytest.fixture(scope="module")
def setting():
    plain, unseen = WorldFactsTestbed(seed=0), WorldFactsTestbed(seed=0, held_out=True)
    task = plain.balanced("test", 2, seed=1)[0]
    made = variations(lambda t, g: plain.pool_for(t, 0), lambda t, g: unseen.pool_for(t, 0))
    return plain.pool_for(task, 0), {name: make(task, 0) for name, make in made.items()}


def honest(pool) -> dict[str, bool]:
    """Whether a member's backend knows what its descriptor says."""
    return {n: all(repr(d) in pool.backend(n).identity for d in m.descriptor.split(" , ")) for n, m in pool.items()}


def test_renamed_members_keep_their_skills(setting) -> None:
    pool, made = setting
    shuffled, renamed, unseen = (made[k] for k in ("names shuffled", "unseen names", "unseen names and skills"))
    assert sorted(shuffled) == sorted(pool) and list(shuffled) != list(pool)
    assert set(renamed) <= set(held_out_names()) and set(unseen) <= set(held_out_names())
    for other in (shuffled, renamed):
        assert [m.descriptor for m in other.values()] == [m.descriptor for m in pool.values()]
    for other in (pool, shuffled, renamed, unseen):
        assert all(honest(other).values())


def test_swapped_descriptors_mislead_whoever_reads_them(setting) -> None:
    pool, made = setting
    swapped = made["descriptors swapped"]
    assert list(swapped) == list(pool)
    assert sorted(m.descriptor for m in swapped.values()) == sorted(m.descriptor for m in pool.values())
    assert not all(honest(swapped).values())


def test_prices_and_members_change_alone(setting) -> None:
    pool, made = setting
    turned = made["prices turned round"]
    assert all(turned[n].output_price == 22 - m.output_price for n, m in pool.items())
    assert len(made["one member removed"]) == len(pool) - 1
    added = made["unseen members added"]
    assert list(added)[: len(pool)] == list(pool) and set(list(added)[len(pool) :]) <= set(held_out_names())
