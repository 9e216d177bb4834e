"""PRIME's credit: what changes nothing, and what can never happen, for any batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guerdon.credit import accuracy_filter, normalize_by_max_return, pairwise_accuracy, rloo_with_process

pytestmark = pytest.mark.property


@st.composite
def batches(draw):
    groups, size, length = draw(st.integers(1, 3)), draw(st.integers(2, 4)), draw(st.integers(1, 6))
    n = groups * size
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    process = torch.randn(n, length, generator=generator, dtype=torch.float64) * draw(st.floats(0, 100))
    mask = torch.rand(n, length, generator=generator) < draw(st.floats(0, 1))
    outcome = torch.randint(0, 2, (n,), generator=generator).double()
    group = torch.arange(n) % groups
    return process, mask, outcome, group, torch.randperm(n, generator=generator)


@given(batches(), st.sampled_from(["paper", "official"]), st.sampled_from([1.0, 0.5]), st.booleans())
def test_order_constants_and_what_is_masked_change_nothing(batch, baseline, gamma, whiten):
    process, mask, outcome, group, order = batch
    base = rloo_with_process(process, mask, outcome, group, gamma, baseline, whiten)
    assert torch.isfinite(base).all() and base[~mask].abs().sum() == 0
    moved = rloo_with_process(
        process[order], mask[order], outcome[order], group[order] * 7 + 3, gamma, baseline, whiten
    )
    assert torch.allclose(moved, base[order], atol=1e-6)
    noisy = torch.where(mask, process, float("nan"))
    assert torch.equal(rloo_with_process(noisy, mask, outcome, group, gamma, baseline, whiten), base)
    shifted = rloo_with_process(process, mask, outcome + 3, group, gamma, baseline, whiten)
    assert torch.allclose(shifted, base, atol=1e-5)


@given(batches())
def test_no_normalised_return_exceeds_one(batch):
    process, mask, *_ = batch
    out = normalize_by_max_return(process, mask)
    assert torch.isfinite(out).all() and out[~mask].abs().sum() == 0
    assert out.flip(-1).cumsum(-1).abs().max() <= 1 + 1e-9


@given(batches(), st.floats(0, 0.5), st.floats(0.5, 1))
def test_the_filter_keeps_whole_prompts(batch, low, high):
    _, _, outcome, group, order = batch
    kept = accuracy_filter(outcome, group, low, high)
    for g in group.unique():
        mean = outcome[group == g].mean().item()
        assert kept[group == g].unique().numel() == 1
        if low + 1e-5 < mean < high - 1e-5:
            assert kept[group == g].all()
        if mean < low - 1e-5 or mean > high + 1e-5:
            assert not kept[group == g].any()
    assert torch.equal(accuracy_filter(outcome[order], group[order], low, high), kept[order])


@given(batches())
def test_pairwise_accuracy_of_the_opposite_is_the_complement(batch):
    process, _, outcome, group, order = batch
    score = process.sum(1)
    a = pairwise_accuracy(score, outcome, group).item()
    assert 0 <= a <= 1
    assert pairwise_accuracy(-score, outcome, group).item() == pytest.approx(1 - a)
    assert pairwise_accuracy(score[order], outcome[order], group[order]).item() == pytest.approx(a)
    assert pairwise_accuracy(outcome, outcome, group).item() >= 0.5
