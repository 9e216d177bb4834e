"""Invariants of min-form credit and of progress."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.credit import best_of_k_value, min_form_returns, progress, pure_advantage, softmin_rewards

pytestmark = pytest.mark.property
REWARDS = st.lists(st.floats(-1, 1), min_size=1, max_size=8)


def row(values, dtype=torch.float64):
    x = torch.tensor([values], dtype=dtype)
    return x, torch.ones_like(x, dtype=torch.bool)


@given(REWARDS, st.floats(0.01, 10))
def test_the_transformed_sum_lies_between_minimum_and_mean(values, temperature) -> None:
    x, m = row(values)
    total = float(softmin_rewards(x, m, temperature).sum())
    assert min(values) - 1e-9 <= total <= sum(values) / len(values) + 1e-9


@given(REWARDS, st.integers(0, 5), st.floats(0.01, 1))
def test_padding_never_changes_anything(values, padding, temperature) -> None:
    x, m = row(values)
    wide = torch.cat([x, torch.full((1, padding), float("nan"), dtype=x.dtype)], 1)
    wide_mask = torch.cat([m, torch.zeros(1, padding, dtype=torch.bool)], 1)
    for mode in ("softmin", "strict"):
        got = min_form_returns(wide, wide_mask, mode, temperature)  # type: ignore[arg-type]
        torch.testing.assert_close(got[:, : len(values)], min_form_returns(x, m, mode, temperature))  # type: ignore[arg-type]
        assert not got[:, len(values) :].any()


@given(REWARDS, st.integers(1, 6), st.floats(0.0, 1.0))
def test_good_filler_never_raises_a_strict_return(values, count, quality) -> None:
    x, m = row(values)
    filler = max(values) + (1 - max(values)) * quality
    padded, pm = row([*values, *[filler] * count])
    assert float(min_form_returns(padded, pm, "strict")[0, 0]) == pytest.approx(
        float(min_form_returns(x, m, "strict")[0, 0])
    )


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 6), st.booleans())
def test_advantages_are_finite_masked_and_do_not_depend_on_order(seed, members, width, whiten) -> None:
    g = torch.Generator().manual_seed(seed)
    n = 2 * members
    rewards = torch.randn(n, width, generator=g, dtype=torch.float64)
    m = torch.arange(width)[None] < torch.randint(0, width + 1, (n, 1), generator=g)
    rewards = torch.where(m, rewards, float("nan"))
    group = torch.arange(n) % 2
    outcome = torch.randint(0, 2, (n,), generator=g).double()
    got = pure_advantage(rewards, m, group, outcome, whiten=whiten)
    assert bool(torch.isfinite(got).all()) and not got[~m].any()
    order = torch.randperm(n, generator=g)
    torch.testing.assert_close(
        pure_advantage(rewards[order], m[order], group[order], outcome[order], whiten=whiten), got[order]
    )
    torch.testing.assert_close(pure_advantage(rewards, m, group, outcome + 3, whiten=whiten), got)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.integers(1, 64))
def test_progress_telescopes_under_every_prover(values, k) -> None:
    q = best_of_k_value(torch.tensor(values, dtype=torch.float64), k)
    a = progress(q)
    assert float(a.sum()) == pytest.approx(float(q[-1] - q[0]), abs=1e-9)
    assert bool((a.abs() <= 1 + 1e-12).all()) and bool((q >= torch.tensor(values, dtype=torch.float64) - 1e-12).all())
