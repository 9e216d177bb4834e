"""How trajectories are divided among processes, and what settings of a distributed run are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guerdon.errors import ConfigError
from guerdon.training.config import DistributedConfig, OnlineConfig
from guerdon.training.distributed import ALONE, make_world, shares


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 100), st.booleans()), min_size=1, max_size=40),
    st.integers(1, 5),
)
def test_every_trajectory_is_in_exactly_one_share_and_groups_stay_together(rows, size: int) -> None:
    group, tokens = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    chosen = np.flatnonzero([r[2] for r in rows])
    parts = shares(chosen, group, tokens, size)
    assert len(parts) == size
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), chosen)
    for part in parts:
        assert list(part) == sorted(part)
    if len(set(group[chosen])) >= size:
        owners = {g: {r for r, part in enumerate(parts) if g in group[part]} for g in set(group[chosen])}
        assert all(len(found) == 1 for found in owners.values())


def test_shares_are_balanced_by_tokens_and_a_lone_group_is_cut() -> None:
    group, tokens = np.array([0, 0, 1, 1, 2, 2]), np.array([50, 50, 30, 30, 20, 20])
    parts = shares(np.arange(6), group, tokens, 2)
    assert [sorted(set(group[p])) for p in parts] == [[0], [1, 2]]
    alone = shares(np.array([0, 1, 2, 3]), np.zeros(6, dtype=int), tokens, 2)
    assert [tokens[p].sum() for p in alone] == [80, 80]


def test_one_process_alone_does_everything(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = make_world(DistributedConfig())
    assert world is ALONE and world.main and world.size == 1
    assert world.each([1, 2], lambda items: [x + 1 for x in items]) == [2, 3]
    chosen = np.array([3, 1])
    assert world.share(chosen, np.zeros(4), np.ones(4)) is chosen
    with pytest.raises(ZeroDivisionError), world.together():
        _ = 1 / 0


@pytest.mark.parametrize(
    ("settings", "size", "text"),
    [
        ({"strategy": "shard"}, "1", "there is one"),
        ({"samplers": 2}, "2", "have one trainer"),
        ({"reward_workers": 1}, "2", "have one trainer"),
    ],
)
def test_what_the_processes_cannot_do_is_refused(monkeypatch, settings: dict, size: str, text: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ConfigError, match=text):
        make_world(DistributedConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"staleness": 1}, "staleness has no effect without samplers"),
        ({"sampler_resources": {"num_cpus": 1}}, "sampler_resources has no effect"),
        ({"reward_resources": {"num_cpus": 1}}, "reward_resources has no effect"),
        ({"strategy": "shard", "samplers": 1}, "samples in the processes that train"),
        ({"stratgy": "shard"}, "unknown setting"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(settings: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        OnlineConfig(distributed=settings)


def test_where_a_run_is_done_may_change_when_it_is_resumed() -> None:
    here, there = OnlineConfig(), OnlineConfig(distributed={"samplers": 2, "staleness": 1})
    differing = {key for key in here.flat() | there.flat() if here.flat().get(key) != there.flat().get(key)}
    assert differing and differing <= there.free_on_resume()
