"""Log-ratio rewards: telescoping, masks, and the soft expectation's bounds, for any numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guerdon.credit import implicit_rewards, prefix_values, reduce_steps, soft_expectation

pytestmark = pytest.mark.property

numbers = st.floats(-30, 0, allow_nan=False)


@st.composite
def rows(draw):
    length = draw(st.integers(1, 12))
    logp = draw(st.lists(numbers, min_size=length, max_size=length))
    ref = draw(st.lists(numbers, min_size=length, max_size=length))
    mask = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    ends = sorted(draw(st.sets(st.integers(0, length - 1))) | {length - 1})
    return torch.tensor(logp).double(), torch.tensor(ref).double(), torch.tensor(mask), ends


@given(rows(), st.floats(0.001, 10))
def test_steps_sum_to_the_outcome_and_cumulate_to_prefix_values(row, beta):
    logp, ref, mask, ends = row
    tokens = implicit_rewards(logp, ref, mask, beta)
    steps = implicit_rewards(logp, ref, mask, beta, ends)
    assert tokens[~mask].abs().sum() == 0
    if not mask.any():
        assert steps.shape == (0,)
        return
    assert len(steps) == len(ends)
    assert math.isclose(steps.sum().item(), tokens.sum().item(), abs_tol=1e-9)
    assert torch.allclose(steps.cumsum(0), prefix_values(tokens, mask)[ends], atol=1e-9)
    assert torch.allclose(implicit_rewards(logp, ref, mask, 2 * beta, ends), 2 * steps)
    assert reduce_steps([steps], "min")[0] == steps.min()


@given(rows())
def test_what_lies_off_the_mask_and_the_same_model_twice_give_nothing(row):
    logp, ref, mask, _ = row
    noisy = torch.where(mask, logp, float("nan"))
    assert torch.equal(implicit_rewards(noisy, ref, mask, 0.1), implicit_rewards(logp, ref, mask, 0.1))
    assert implicit_rewards(logp, logp, mask, 0.1).abs().sum() == 0


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.floats(0.01, 100), st.floats(0.01, 100))
def test_the_soft_expectation_rises_from_mean_to_maximum_as_beta_falls(values, a, b):
    x = torch.tensor(values, dtype=torch.float64)
    small, large = soft_expectation(x, min(a, b)).item(), soft_expectation(x, max(a, b)).item()
    assert x.mean().item() - 1e-6 <= large <= small + 1e-6 and small <= x.max().item() + 1e-6
