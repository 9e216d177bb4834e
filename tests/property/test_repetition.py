"""No text leaves the ranges of the repetition measures."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.rewards.repetition import copied_share, repeated_share, repetition_ratio

pytestmark = pytest.mark.property
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from("abc"), max_size=40).map(" ".join))


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS, st.integers(1, 5))
def test_ranges(text, source, n):
    assert 0.0 <= repetition_ratio(text, n) <= 0.5
    assert 0.0 <= repeated_share(text, n) < 1.0
    assert 0.0 <= copied_share(text, source, n) <= 1.0
    assert (repetition_ratio(text, n) == 0) == (repeated_share(text, n) == 0)
    if len(text.split()) >= n:
        assert copied_share(text, text, n) == 1.0
