"""Invariants of the estimator, the binary search and beam search."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guerdon.search import PrefixValues, beam_search, locate_first_error

pytestmark = pytest.mark.property


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 8)), max_size=12), st.integers(0, 40) | st.none())
def test_counts_never_exceed_the_budget_and_asking_again_is_free(asked, budget) -> None:
    values = PrefixValues(lambda prefix, n: [True] * n, bool, budget=budget)
    for prefix, n in asked:
        before = values.rollouts
        estimate = values.estimate([prefix], n)[0]
        assert estimate.n <= 8 and (budget is None or values.rollouts <= budget)
        assert budget is not None or estimate.n >= n
        assert math.isnan(estimate.value) if estimate.n == 0 else estimate.value == 1.0
        again = values.rollouts
        values.estimate([prefix], n)
        assert values.rollouts - again <= max(0, n - estimate.n) and again >= before


@given(st.integers(1, 200), st.data())
def test_the_first_error_is_found_wherever_it_is(n, data) -> None:
    error = data.draw(st.integers(1, n) | st.none())
    asked = []
    found = locate_first_error(lambda m: asked.append(m) or float(error is None or m < error), n)
    assert found == error and len(asked) <= math.floor(math.log2(n)) + 1


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_a_beam_as_wide_as_the_tree_finds_the_best_leaf(beam, expand, depth) -> None:
    def grow(state: str, n: int) -> list[str]:
        return [] if len(state) == depth else [state + "abcd"[k] for k in range(n)]

    def score(states):
        return [sum((ord(c) * 7) % 5 for c in s) for s in states]

    result = beam_search(grow, score, expand**depth, expand, root="", max_steps=depth + 1)
    best = max((ord(c) * 7) % 5 for c in "abcd"[:expand]) * depth
    assert result.score == best and len(result.best) == depth
    narrow = beam_search(grow, score, beam, expand, root="", max_steps=depth + 1)
    assert narrow.score <= best and len(narrow.beams) <= beam
