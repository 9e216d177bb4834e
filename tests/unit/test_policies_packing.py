"""The layout of packed batches, by hand."""

from __future__ import annotations

import pytest
import torch

from guerdon.errors import ConfigError, DataError
from guerdon.policies import make_batches


def test_two_responses_to_one_prompt() -> None:
    (batch,) = make_batches([([7, 8], [1, 2]), ([7, 8], [3])], groups=[4, 4], max_tokens=100)
    assert batch.input_ids.tolist() == [[7, 8, 1, 2, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    # Both first tokens are predicted by the prompt's last position.
    assert batch.source.tolist() == [1, 2, 1]
    assert batch.targets.tolist() == [1, 2, 3]
    assert batch.trajectory.tolist() == [0, 0, 1]
    assert batch.position.tolist() == [0, 1, 0]
    assert batch.attention_mask is not None
    assert batch.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert (len(batch), batch.cells, batch.context) == (3, 5, 4)


def test_single_responses_are_plainly_causal_and_need_no_mask() -> None:
    (batch,) = make_batches([([7, 8], [1, 2]), ([9], [3])], groups=[0, 1], max_tokens=100, pad_id=5)
    assert batch.attention_mask is None
    assert batch.input_ids.tolist() == [[7, 8, 1, 2], [9, 3, 5, 5]]
    assert batch.source.tolist() == [1, 2, 4]


@pytest.mark.parametrize(
    ("groups", "share"), [([0, 1], True), (None, True), ([0, 0], False)], ids=["other group", "no groups", "off"]
)
def test_prompts_are_not_shared_unless_asked_for(groups: list[int] | None, share: bool) -> None:
    (batch,) = make_batches([([7], [1]), ([7], [2])], groups=groups, max_tokens=100, share_prompt=share)
    assert batch.input_ids.shape == (2, 2)


def test_equal_groups_with_different_prompts_are_not_shared() -> None:
    (batch,) = make_batches([([7], [1]), ([8], [2])], groups=[0, 0], max_tokens=100)
    assert batch.input_ids.shape == (2, 2)


def test_batches_hold_at_most_max_tokens_and_longest_rows_come_first() -> None:
    items = [([1] * 3, [2] * n) for n in (1, 9, 4, 4, 2, 30)]
    batches = make_batches(items, groups=None, max_tokens=16)
    assert [tuple(b.input_ids.shape) for b in batches] == [(1, 33), (1, 12), (2, 7), (2, 5)]
    assert sorted(k for b in batches for k in b.trajectory.unique().tolist()) == list(range(6))


def test_a_group_too_large_for_one_batch_is_spread_over_rows() -> None:
    batches = make_batches([([1] * 4, [2] * 3)] * 5, groups=[0] * 5, max_tokens=10)
    assert [tuple(b.input_ids.shape) for b in batches] == [(1, 10), (1, 10), (1, 7)]
    assert sorted(k for b in batches for k in b.trajectory.unique().tolist()) == [0, 1, 2, 3, 4]


def test_empty_responses_contribute_nothing() -> None:
    (batch,) = make_batches([([7], []), ([7], [1])], groups=[0, 0], max_tokens=10)
    assert batch.trajectory.tolist() == [1]
    assert make_batches([([7], [])], groups=None, max_tokens=10) == []
    assert make_batches([], groups=[], max_tokens=10) == []


def test_bad_input_is_named() -> None:
    with pytest.raises(DataError, match="item 1 has an empty prompt"):
        make_batches([([1], [2]), ([], [2])], groups=None, max_tokens=10)
    with pytest.raises(DataError, match="groups has 1 entries for 2 items"):
        make_batches([([1], [2]), ([1], [2])], groups=[0], max_tokens=10)
    with pytest.raises(ConfigError, match="max_tokens must be at least 1, got 0"):
        make_batches([([1], [2])], groups=None, max_tokens=0)


def test_moving_a_batch_keeps_everything() -> None:
    (batch,) = make_batches([([7, 8], [1, 2]), ([7, 8], [3])], groups=[0, 0], max_tokens=100)
    moved = batch.to("cpu")
    assert moved.tree is batch.tree and moved.context == batch.context
    assert torch.equal(moved.source, batch.source)
