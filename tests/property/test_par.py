"""Invariants of the shapers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.shaping import PreferenceAsReward, RunningShaper, shape

torch.set_num_threads(1)
pytestmark = pytest.mark.property

VALUES = st.floats(-30, 30, allow_nan=False, width=32)
ROWS = st.lists(st.tuples(VALUES, st.lists(VALUES, min_size=1, max_size=12)), min_size=1, max_size=6)


def parts(rows):
    return torch.tensor([r for r, _ in rows], dtype=torch.float64), [refs for _, refs in rows]


@settings(max_examples=50, deadline=None)
@given(ROWS, st.floats(-50, 50), st.floats(0.1, 5))
def test_par_is_bounded_and_shifts_with_its_prompt(rows, shift, k):
    rewards, refs = parts(rows)
    out = PreferenceAsReward(k)(rewards, refs)
    assert bool(((out >= 0) & (out <= 1)).all())
    moved = PreferenceAsReward(k)(rewards + shift, [[x + shift for x in row] for row in refs])
    np.testing.assert_allclose(out, moved, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(ROWS, st.floats(0, 5))
def test_par_rises_with_the_reward_and_by_at_most_a_quarter_of_it(rows, more):
    rewards, refs = parts(rows)
    gain = PreferenceAsReward()(rewards + more, refs) - PreferenceAsReward()(rewards, refs)
    assert bool((gain >= -1e-12).all()) and bool((gain <= more / 4 + 1e-12).all())


@settings(max_examples=25, deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_the_order_of_references_does_not_matter(rows, random):
    rewards, refs = parts(rows)
    mixed = [random.sample(row, len(row)) for row in refs]
    a, b = (PreferenceAsReward(max_refs=50)(rewards, r) for r in (refs, mixed))
    np.testing.assert_allclose(a, b, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(VALUES, min_size=1, max_size=6), min_size=1, max_size=5))
def test_running_statistics_do_not_depend_on_how_batches_are_cut(batches):
    flat = [x for batch in batches for x in batch]
    for mode in ("meanstd", "clip", "minmax"):
        parts_, whole = RunningShaper(mode), RunningShaper(mode)
        for batch in batches:
            out = parts_(torch.tensor(batch, dtype=torch.float64))
            assert bool(torch.isfinite(out).all())
            if mode == "minmax":
                assert bool(((out >= 0) & (out <= 1)).all())
        whole(torch.tensor(flat, dtype=torch.float64))
        assert parts_.count == whole.count == len(flat)
        assert parts_.mean == pytest.approx(np.mean(flat), abs=1e-9)
        assert parts_.std == pytest.approx(np.std(flat), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(ROWS)
def test_shapers_without_memory_do_not_mix_rows(rows):
    rewards, refs = parts(rows)
    for method in ("par", "lsc", "centred", "sgfc", "relative_tanh", "relative_poly", "pure_sigmoid", "log_sigmoid"):
        whole = shape(rewards, method, refs)
        for b in range(len(rows)):
            assert float(shape(rewards[b : b + 1], method, refs[b : b + 1])) == pytest.approx(
                float(whole[b]), abs=1e-12
            )
