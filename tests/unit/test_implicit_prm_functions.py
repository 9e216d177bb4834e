"""Log-ratio rewards and their losses: the proposition exactly, hand-computed values, masks, and refusals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from guerdon.credit import implicit_rewards, prefix_values, reduce_steps, soft_expectation
from guerdon.objectives import implicit_ce, implicit_dpo, implicit_kto, implicit_nca

NAN = float("nan")


def test_token_rewards_by_hand():
    logp = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, NAN, NAN]])
    ref = torch.tensor([[-1.5, -1.0, -0.5], [-3.0, NAN, -math.inf]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    out = implicit_rewards(logp, ref, mask, 0.5)
    assert torch.allclose(out, torch.tensor([[0.25, -0.5, 0.0], [1.0, 0.0, 0.0]]))


def test_step_rewards_are_differences_of_prefix_values():
    ratio = torch.tensor([[1.0, 2.0, -4.0, 8.0, 16.0]], dtype=torch.float64)
    zero, mask = torch.zeros_like(ratio), torch.ones_like(ratio)
    (steps,) = implicit_rewards(ratio, zero, mask, 2.0, [[1, 2, 4]])
    assert steps.tolist() == [6.0, -8.0, 48.0]
    assert steps.sum() == implicit_rewards(ratio, zero, mask, 2.0).sum()
    assert prefix_values(2.0 * ratio, mask)[0, [1, 2, 4]].tolist() == [6.0, -2.0, 46.0]
    # Environment tokens in the middle of a response add nothing to the step around them.
    (steps,) = implicit_rewards(ratio, zero, torch.tensor([[1, 0, 1, 0, 1]]), 2.0, [[2, 4]])
    assert steps.tolist() == [-6.0, 32.0]


def test_one_row_may_come_without_a_batch_axis():
    ratio, mask = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)
    assert implicit_rewards(ratio, torch.zeros(3), mask, 1.0, [0, 2]).tolist() == [1.0, 5.0]


def test_no_separators_is_one_step_and_no_token_is_no_step():
    logp, ref = torch.tensor([[1.0, 2.0], [5.0, 5.0]]), torch.zeros(2, 2)
    one, none = implicit_rewards(logp, ref, torch.tensor([[1, 1], [0, 0]]), 1.0, [[], []])
    assert one.tolist() == [3.0] and none.tolist() == []
    assert implicit_rewards(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3), 1.0, []) == []


def test_gradient_reaches_the_model_alone_and_nothing_off_the_mask():
    logp = torch.tensor([[0.3, NAN, 0.1]], requires_grad=True)
    ref = torch.tensor([[0.1, 0.2, 0.3]], requires_grad=True)
    implicit_rewards(logp, ref, torch.tensor([[1, 0, 1]]), 0.5).sum().backward()
    assert logp.grad.tolist() == [[0.5, 0.0, 0.5]] and ref.grad is None


def test_half_precision_is_widened_before_subtracting():
    logp = torch.tensor([[-10.0]], dtype=torch.bfloat16)
    ref = torch.tensor([[-10.0625]], dtype=torch.bfloat16)
    out = implicit_rewards(logp, ref, torch.ones(1, 1), 0.05)
    assert out.dtype == torch.float32 and out.item() == pytest.approx(0.05 * 0.0625, abs=1e-9)
    assert implicit_rewards(logp.double(), ref.double(), torch.ones(1, 1), 0.05).dtype == torch.float64


def test_ends_may_come_as_a_padded_tensor():
    ratio, mask = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.ones(2, 3)
    one, two = implicit_rewards(ratio, torch.zeros(2, 3), mask, 1.0, torch.tensor([[0, 2], [2, -1]]))
    assert one.tolist() == [1.0, 5.0] and two.tolist() == [15.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref": torch.zeros(1, 2)}, "one shape"),
        ({"mask": torch.zeros(3)}, "one shape"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"beta": NAN}, "beta must be positive"),
        ({"ends": [[0, 3]]}, r"must lie in \[0, 3\)"),
        ({"ends": [[-1]]}, r"must lie in \[0, 3\)"),
        ({"ends": [[2, 1]]}, "must rise"),
        ({"ends": [[1, 1]]}, "must rise"),
        ({"ends": [[1], [2]]}, "2 rows for 1 responses"),
    ],
)
def test_refusals(change, message):
    given = {"ref": torch.zeros(1, 3), "mask": torch.ones(1, 3), "beta": 1.0, "ends": None, **change}
    with pytest.raises(ValueError, match=message):
        implicit_rewards(torch.zeros(1, 3), given["ref"], given["mask"], given["beta"], given["ends"])


@pytest.mark.parametrize("beta", [0.01, 0.05, 1.0, 50.0])
def test_the_proposition_holds_exactly_for_any_model(beta):
    """q_t = beta log E_{y ~ ref(.|y_<=t)} exp(r(y) / beta) on every prefix of a vocabulary-2, length-3 LM."""
    rng = np.random.default_rng(0)
    prefixes = [p for n in range(3) for p in itertools.product((0, 1), repeat=n)]

    def model():
        logits = {p: rng.normal(size=2) * 2 for p in prefixes}
        return {p: v - np.log(np.exp(v).sum()) for p, v in logits.items()}

    pi, ref = model(), model()
    sequences = list(itertools.product((0, 1), repeat=3))

    def logp(table, y):
        return [table[y[:t]][y[t]] for t in range(3)]

    logp_BT = torch.tensor([logp(pi, y) for y in sequences], dtype=torch.float64)
    ref_BT = torch.tensor([logp(ref, y) for y in sequences], dtype=torch.float64)
    mask = torch.ones_like(logp_BT)
    rewards = implicit_rewards(logp_BT, ref_BT, mask, beta)
    q = prefix_values(rewards, mask)
    for b, y in enumerate(sequences):
        for t in range(3):
            others = [k for k, z in enumerate(sequences) if z[: t + 1] == y[: t + 1]]
            # An independent slow sum over all continuations of the prefix.
            total = sum(
                math.exp(ref_BT[k, t + 1 :].sum().item()) * math.exp(rewards[k].sum().item() / beta) for k in others
            )
            assert q[b, t].item() == pytest.approx(beta * math.log(total), abs=1e-6)
            soft = soft_expectation(rewards[others].sum(-1), beta, ref_BT[others, t + 1 :].sum(-1))
            assert q[b, t].item() == pytest.approx(soft.item(), abs=1e-6)


def test_soft_expectation_lies_between_mean_and_maximum():
    values = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    assert soft_expectation(values, 1e6).item() == pytest.approx(2.0, abs=1e-4)
    assert soft_expectation(values, 1e-3).item() == pytest.approx(5.0, abs=5e-3)
    assert 2.0 < soft_expectation(values, 1.0).item() < 5.0
    for bad in ({"values": values, "beta": 0.0}, {"values": torch.zeros(0), "beta": 1.0}):
        with pytest.raises(ValueError):
            soft_expectation(**bad)
    with pytest.raises(ValueError, match="one shape"):
        soft_expectation(values, 1.0, torch.zeros(2))


def test_reduce_steps_needs_no_padding():
    steps = [torch.tensor([0.5, 0.2]), torch.tensor([3.0]), torch.zeros(0)]
    assert torch.allclose(reduce_steps(steps), torch.tensor([0.2, 3.0, 0.0]))
    assert torch.allclose(reduce_steps(steps, "sum"), torch.tensor([0.7, 3.0, 0.0]))
    assert torch.allclose(reduce_steps(steps, "mean"), torch.tensor([0.35, 3.0, 0.0]))
    assert reduce_steps([]).shape == (0,)
    with pytest.raises(ValueError, match="min, sum or mean"):
        reduce_steps(steps, "max")


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def test_losses_against_slow_references():
    rng = np.random.default_rng(1)
    r, l = rng.normal(size=20) * 3, rng.integers(0, 2, size=20)
    w, z = rng.normal(size=20) * 3, 0.7
    rewards, labels, worse = torch.tensor(r), torch.tensor(l), torch.tensor(w)
    ce = [-(y * math.log(sigmoid(x)) + (1 - y) * math.log(1 - sigmoid(x))) for x, y in zip(r, l, strict=True)]
    assert implicit_ce(rewards, labels).tolist() == pytest.approx(ce, abs=1e-10)
    dpo = [-math.log(sigmoid(a - b)) for a, b in zip(r, w, strict=True)]
    assert implicit_dpo(rewards, worse).tolist() == pytest.approx(dpo, abs=1e-10)
    nca = [
        -(math.log(sigmoid(a)) + 0.5 * math.log(sigmoid(-a)) + 0.5 * math.log(sigmoid(-b)))
        for a, b in zip(r, w, strict=True)
    ]
    assert implicit_nca(rewards, worse).tolist() == pytest.approx(nca, abs=1e-10)
    kto = [2 * (1 - sigmoid(x - z)) if y else 3 * (1 - sigmoid(z - x)) for x, y in zip(r, l, strict=True)]
    got = implicit_kto(rewards, labels, z, desirable_weight=2.0, undesirable_weight=3.0)
    assert got.tolist() == pytest.approx(kto, abs=1e-10)


def test_losses_of_a_model_that_is_its_reference():
    zero, labels = torch.zeros(2), torch.tensor([1.0, 0.0])
    assert implicit_ce(zero, labels).tolist() == pytest.approx([math.log(2)] * 2)
    assert implicit_dpo(zero, zero).tolist() == pytest.approx([math.log(2)] * 2)
    assert implicit_nca(zero, zero).tolist() == pytest.approx([2 * math.log(2)] * 2)
    assert implicit_kto(zero, labels).tolist() == [0.5, 0.5]
    assert implicit_kto(zero, labels, -5.0).tolist() == [0.5, 0.5]  # the reference point is never negative


def test_losses_refuse_what_is_no_label():
    assert implicit_ce(torch.zeros(1), torch.tensor([0.25]), soft=True).item() == pytest.approx(math.log(2))
    for bad in (0.5, 2.0, -1.0, NAN):
        with pytest.raises(ValueError, match="labels must be 0 or 1"):
            implicit_ce(torch.zeros(1), torch.tensor([bad]))
        with pytest.raises(ValueError, match="labels must be 0 or 1"):
            implicit_kto(torch.zeros(1), torch.tensor([bad]))
    with pytest.raises(ValueError, match="between 0 and 1"):
        implicit_ce(torch.zeros(1), torch.tensor([1.5]), soft=True)
    with pytest.raises(ValueError, match="one length"):
        implicit_dpo(torch.zeros(2), torch.zeros(3))
    # Large rewards overflow in none of them.
    far = torch.tensor([1e4, -1e4])
    for loss in (implicit_ce(far, torch.tensor([0, 1])), implicit_dpo(far, -far), implicit_nca(far, far)):
        assert bool(torch.isfinite(loss).all())
