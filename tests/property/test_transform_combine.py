"""Invariants of the log-sigmoid transform and of the conjunction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.shaping import AllGood, LogSigmoidCentered, all_good, log_sigmoid_centred

torch.set_num_threads(1)
pytestmark = pytest.mark.property
VALUES = st.floats(-1e4, 1e4, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(VALUES, VALUES, st.floats(0, 100), st.floats(0.01, 10))
def test_monotone_bounded_and_shift_invariant(r, ref, more, scale):
    low, high = (float(log_sigmoid_centred(torch.tensor([x], dtype=torch.float64), ref, scale)) for x in (r, r + more))
    assert low <= high <= 0.0
    assert high - low <= scale * more + 1e-6
    assert low <= scale * (r - ref) + 1e-6


@settings(max_examples=25, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=20), st.floats(0.05, 0.95), st.floats(-50, 50))
def test_the_reference_moves_with_its_samples_and_lies_among_them(samples, q, shift):
    samples = [x + 0.25 for x in samples]
    made = LogSigmoidCentered(q=q).fit(["x"], {"x": samples}).references["x"]
    assert min(samples) - 1e-6 <= made <= max(samples) + 1e-6
    moved = LogSigmoidCentered(q=q).fit(["x"], {"x": [s + shift for s in samples]}).references["x"]
    assert moved == pytest.approx(made + shift, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=6))
def test_the_conjunction_is_at_most_each_of_its_terms(rows):
    r = torch.tensor(rows, dtype=torch.float64)
    total = all_good(r, 0.0)
    assert bool((total <= log_sigmoid_centred(r, 0.0).min(1).values + 1e-12).all())
    np.testing.assert_allclose(total, all_good(r.flip(1), 0.0), atol=1e-9)
    both = {n: LogSigmoidCentered("value").fit([0], {0: 0.0}) for n in "ab"}
    out = AllGood(both).prob({"a": r[:, 0], "b": r[:, 1]}, [0] * len(rows))
    assert bool(((out >= 0) & (out <= 1)).all())
