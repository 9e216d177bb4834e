"""PRIME's credit: leave-one-out in each channel, filter, normalisation, against slow references and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guerdon.credit import accuracy_filter, normalize_by_max_return, pairwise_accuracy, rloo_with_process

NAN = float("nan")


def slow(process, mask, outcome, group, gamma, baseline, whiten):
    """The specification, one number at a time."""
    b, t = process.shape
    rbar = np.array([process[i][mask[i]].mean() if mask[i].any() else 0.0 for i in range(b)])
    out = np.zeros((b, t))
    for i in range(b):
        others = [j for j in range(b) if group[j] == group[i] and j != i]
        k = len(others) + 1
        positions = [s for s in range(t) if mask[i, s]]
        for n, s in enumerate(positions):
            total = outcome[i] - np.mean([outcome[j] for j in others])
            for m, u in enumerate(positions[n:]):
                if baseline == "paper":
                    token = process[i, u] - np.mean([rbar[j] for j in others])
                else:
                    token = process[i, u] * k / (k - 1) - (sum(rbar[j] for j in others) + rbar[i]) / (k - 1)
                total += gamma**m * token
            out[i, s] = total
    if whiten and mask.sum() > 1:
        kept = out[mask]
        out = np.where(mask, (out - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8), 0.0)
    return out


def batch(seed=0):
    rng = np.random.default_rng(seed)
    process = rng.normal(size=(8, 7))
    lengths = [7, 1, 3, 0, 5, 7, 2, 4]
    mask = np.arange(7)[None] < np.array(lengths)[:, None]
    mask[0, 3] = mask[5, 0] = False  # environment tokens
    outcome = rng.integers(0, 2, size=8).astype(float)
    group = np.array([3, 9, 3, 9, 3, 9, 9, 3])  # neither contiguous nor from 0
    return process, mask, outcome, group


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("baseline", ["paper", "official"])
@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_against_the_slow_reference(gamma, baseline, whiten):
    process, mask, outcome, group = batch()
    want = slow(process, mask, outcome, group, gamma, baseline, whiten)
    noisy = np.where(mask, process, NAN)
    got = rloo_with_process(
        torch.tensor(noisy), torch.tensor(mask), torch.tensor(outcome), torch.tensor(group), gamma, baseline, whiten
    )
    assert got.dtype == torch.float64 and np.allclose(got.numpy(), want, atol=1e-9)


def test_by_hand():
    process = torch.tensor([[1.0, 2.0], [4.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    outcome, group = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    # rbar = (1.5, 4): response 0 is measured against 4, response 1 against 1.5; outcomes add +1 and -1.
    got = rloo_with_process(process, mask, outcome, group, whiten=False)
    assert got.tolist() == [[1 + (1 - 4) + (2 - 4), 1 + (2 - 4)], [-1 + (4 - 1.5), 0.0]]
    # The released code: r * 2 - (1.5 + 4).
    got = rloo_with_process(process, mask, outcome, group, baseline="official", whiten=False)
    assert got.tolist() == [[1 + (2 - 5.5) + (4 - 5.5), 1 + (4 - 5.5)], [-1 + (8 - 5.5), 0.0]]


def test_both_baselines_agree_on_the_token_mean_of_a_response():
    process, mask, _, group = (torch.tensor(x) for x in batch(3))
    # With gamma = 0 the advantage less the outcome's part is the token's centred reward itself.
    a, b = (rloo_with_process(process, mask, torch.zeros(8), group, 0.0, how, False) for how in ("paper", "official"))
    mean = lambda x: (x * mask).sum(1) / mask.sum(1).clamp(min=1)  # noqa: E731
    assert torch.allclose(mean(a), mean(b)) and not torch.allclose(a, b)


def test_no_gradient_reaches_the_process_model():
    process = torch.randn(2, 3, requires_grad=True)
    out = rloo_with_process(process, torch.ones(2, 3), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    assert not out.requires_grad


def test_outcome_alone_is_rloo_and_a_constant_changes_nothing():
    outcome, group, mask = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 0]), torch.ones(4, 3)
    out = rloo_with_process(torch.zeros(4, 3), mask, outcome, group, whiten=False)
    assert torch.allclose(out[:, 0], torch.tensor([2 / 3, -2 / 3, -2 / 3, 2 / 3]))
    process = torch.randn(4, 3, dtype=torch.float64)
    base = rloo_with_process(process, mask, outcome, group)
    assert torch.allclose(rloo_with_process(process, mask, outcome + 7, group), base)
    assert torch.allclose(rloo_with_process(process + 7, mask, outcome, group), base)


def test_zero_variance_is_zero_not_nan():
    out = rloo_with_process(
        torch.full((4, 3), 0.1), torch.ones(4, 3), torch.full((4,), 0.1), torch.tensor([0, 0, 1, 1])
    )
    assert out.abs().max() == 0
    out = rloo_with_process(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    assert out.tolist() == [[0.0] * 3] * 2
    none = rloo_with_process(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert none.shape == (0, 3)


def test_an_empty_response_counts_with_rbar_zero():
    process = torch.tensor([[2.0], [5.0], [4.0]], dtype=torch.float64)
    mask = torch.tensor([[1], [0], [1]])
    out = rloo_with_process(
        process, mask, torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3, dtype=torch.long), whiten=False
    )
    assert out.tolist() == [[1.0 + 2 - (0 + 4) / 2], [0.0], [-0.5 + 4 - (2 + 0) / 2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": torch.tensor([0, 1])}, "has one response"),
        ({"group": torch.tensor([0])}, "one shape"),
        ({"mask": torch.ones(2, 2)}, "one shape"),
        ({"outcome": torch.tensor([NAN, 0.0])}, "outcome are not finite"),
        ({"outcome": torch.zeros(3), "group": torch.zeros(3, dtype=torch.long)}, "2 rows for 3 outcomes"),
        ({"process": torch.full((2, 3), NAN)}, "process inside the mask are not finite"),
        ({"gamma": 1.5}, "gamma"),
        ({"baseline": "none"}, "baseline"),
    ],
)
def test_refusals(change, message):
    given = {
        "process": torch.zeros(2, 3), "mask": torch.ones(2, 3), "outcome": torch.tensor([1.0, 0.0]),
        "group": torch.tensor([0, 0]), **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        rloo_with_process(**given)


def test_accuracy_filter_bounds_are_inclusive():
    outcome = torch.tensor([1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 0]).float()
    group = torch.arange(5).repeat_interleave(4)
    kept = accuracy_filter(outcome, group)
    assert kept.dtype == torch.bool
    assert kept.reshape(5, 4).tolist() == [[True] * 4, [False] * 4, [False] * 4, [True] * 4, [True] * 4]
    order = torch.randperm(20)
    assert torch.equal(accuracy_filter(outcome[order], group[order]), kept[order])
    # Five responses: exactly 0.2 and 0.8 stay, also as float32 averages of fractions.
    five = torch.tensor([1.0, 0, 0, 0, 0, 1, 1, 1, 1, 0])
    assert accuracy_filter(five, torch.arange(2).repeat_interleave(5)).all()
    assert accuracy_filter(torch.full((3,), 0.8), torch.zeros(3, dtype=torch.long)).all()
    assert not accuracy_filter(five, torch.arange(2).repeat_interleave(5), 0.3, 0.7).any()
    assert accuracy_filter(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
    with pytest.raises(ValueError, match="not finite"):
        accuracy_filter(torch.tensor([NAN]), torch.tensor([0]))
    with pytest.raises(ValueError, match="low"):
        accuracy_filter(five, torch.zeros(10), 0.9, 0.1)


def test_normalisation_is_by_the_largest_return_of_the_batch():
    process = torch.tensor([[1.0, -3.0, 2.0], [4.0, NAN, NAN]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    # Sums from each token on: (0, -1, 2) and 4.
    got = normalize_by_max_return(process, mask)
    assert got.tolist() == [[1 / (4 + 1e-6), -3 / (4 + 1e-6), 2 / (4 + 1e-6)], [4 / (4 + 1e-6), 0.0, 0.0]]
    assert torch.allclose(normalize_by_max_return(100 * process, mask), got, atol=1e-5)
    assert normalize_by_max_return(torch.zeros(2, 2), torch.ones(2, 2), eps=0.0).abs().sum() == 0
    assert normalize_by_max_return(torch.full((2, 2), NAN), torch.zeros(2, 2)).abs().sum() == 0
    assert normalize_by_max_return(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)
    with pytest.raises(ValueError, match="one shape"):
        normalize_by_max_return(process, mask[:1])
    with pytest.raises(ValueError, match="eps"):
        normalize_by_max_return(process, mask, eps=-1.0)


def test_pairwise_accuracy():
    score = torch.tensor([3.0, 1.0, 2.0, 0.0])
    group = torch.zeros(4, dtype=torch.long)
    assert pairwise_accuracy(score, torch.tensor([1.0, 0, 1, 0]), group) == 1.0
    assert pairwise_accuracy(score, torch.tensor([0.0, 1, 0, 1]), group) == 0.0
    assert pairwise_accuracy(score, torch.ones(4), group) == 0.5
    # Right on a pair that differs by 1, wrong on two that differ by 0.5.
    got = pairwise_accuracy(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0.5, 1.0, 0.0]), torch.zeros(3))
    assert got.item() == pytest.approx((1 * 1 + 0.5 * 1 + 0.5 * 0) / 2)
    two = torch.tensor([0, 0, 1, 1])
    assert pairwise_accuracy(score, torch.tensor([1.0, 0, 0, 1]), two) == 0.5
    assert pairwise_accuracy(torch.zeros(4), torch.tensor([1.0, 0, 0, 1]), two) == 0.5
    assert pairwise_accuracy(torch.zeros(1), torch.ones(1), torch.zeros(1)) == 0.5
    with pytest.raises(ValueError):
        pairwise_accuracy(torch.zeros(3), torch.zeros(4), torch.zeros(4))
