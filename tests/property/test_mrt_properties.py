"""Properties of progress and regret: telescoping, the unit interval, monotone in success, lossless episodes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guerdon.credit import (
    MARKERS,
    best_trace,
    cumulative_regret,
    episode_offsets,
    normalized_regret,
    progress_bonus,
    split_episodes,
    termination_relative,
)

pytestmark = pytest.mark.property

share = st.floats(0, 1, allow_nan=False)
curves = st.lists(st.tuples(st.floats(0, 50, allow_nan=False), share), max_size=8)
budgets = st.floats(0.5, 200, allow_nan=False)
paragraphs = st.lists(st.sampled_from([*MARKERS, "a", "so it is", "Waiting", "wait", "b\nWait"]), max_size=14)


@given(st.lists(share, min_size=1, max_size=10))
def test_progress_telescopes_and_lies_between_minus_one_and_one(j):
    made = progress_bonus(torch.tensor(j, dtype=torch.float64))
    assert len(made) == len(j) - 1 and float(made.sum()) == pytest.approx(j[-1] - j[0], abs=1e-12)
    assert bool((made.abs() <= 1).all())


@given(st.lists(share, max_size=10))
def test_cumulative_regret_is_not_negative_against_one_and_at_most_the_number_of_episodes(j):
    assert 0 <= cumulative_regret(j) <= len(j)


@given(curves, budgets)
def test_regret_lies_in_the_unit_interval(points, budget):
    tokens = sorted(t for t, _ in points)
    assert 0.0 <= normalized_regret(tokens, [s for _, s in points], budget) <= 1.0


@given(curves, budgets, share)
def test_more_success_is_less_regret(points, budget, gain):
    tokens = sorted(t for t, _ in points)
    success = [s for _, s in points]
    better = [s + (1 - s) * gain for s in success]
    assert normalized_regret(tokens, better, budget) <= normalized_regret(tokens, success, budget) + 1e-9


@given(st.lists(share, min_size=1, max_size=6), budgets)
def test_the_same_answers_sooner_are_less_regret_where_success_never_falls(success, budget):
    success = sorted(success)
    late = [10.0 * (k + 1) for k in range(len(success))]
    soon = [t / 2 for t in late]
    assert normalized_regret(soon, success, budget) <= normalized_regret(late, success, budget) + 1e-9


@given(curves, budgets)
def test_what_lies_beyond_the_budget_changes_nothing(points, budget):
    tokens, success = sorted(t for t, _ in points), [s for _, s in points]
    held = success[-1] if success else 0.0
    if not tokens or tokens[-1] <= budget:
        longer = normalized_regret([*tokens, 2 * budget + 100], [*success, held], budget)
        if tokens:
            assert longer == pytest.approx(normalized_regret(tokens, success, budget), abs=1e-9)


@given(paragraphs, st.integers(1, 4), st.none() | st.integers(1, 4))
def test_episodes_are_lossless_and_obey_their_rules(said, least, most):
    text = "\n\n".join(said)
    made = split_episodes(text, min_paragraphs=least, max_episodes=most)
    assert "\n\n".join(made) == text
    assert most is None or len(made) <= most
    for episode in made[:-1]:
        assert len(episode.split("\n\n")) >= least
    for episode in made[1:]:
        assert episode.startswith(MARKERS)
    ends = episode_offsets(text, min_paragraphs=least, max_episodes=most)
    assert len(ends) == len(made) and (not ends or ends[-1] == len(text))
    assert [text[a:b].rstrip() for a, b in zip([0, *ends], ends, strict=False)] == made


@given(st.lists(st.tuples(st.lists(share, min_size=1, max_size=6), st.booleans()), max_size=6))
def test_the_best_trace_is_correct_and_cut_at_its_maximum(traces):
    j, right = [t[0] for t in traces], [t[1] for t in traces]
    made = best_trace(j, right)
    assert (made is None) == (not any(right))
    if made is not None:
        i, cut = made
        assert right[i] and j[i][cut] == max(j[i]) and all(v < j[i][cut] for v in j[i][:cut])
        assert all(j[i][-1] - j[i][0] >= r[-1] - r[0] for r, ok in traces if ok)


@given(st.lists(st.tuples(st.integers(-8, 8), st.integers(0, 2), st.booleans()), max_size=10), st.integers(-5, 5))
def test_a_constant_added_to_a_groups_rewards_changes_nothing(rows, constant):
    r = torch.tensor([float(x[0]) for x in rows], dtype=torch.float64)
    group, stopped = torch.tensor([x[1] for x in rows]), torch.tensor([x[2] for x in rows], dtype=torch.bool)
    a, b = termination_relative(r, group, stopped), termination_relative(r + constant, group, stopped)
    assert torch.allclose(a, b, atol=1e-12)
    for g in set(group.tolist()):
        at = (group == g) & stopped
        if bool(at.any()):
            assert float(a[at].sum()) == pytest.approx(0, abs=1e-9)
