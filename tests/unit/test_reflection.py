"""Reasoning reflection: weights and rewards by hand, the filter, and scoring by a real (tiny) policy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import ConfigError, DataError
from guerdon.policies import make_batches, tiny_policy, token_logprobs
from guerdon.reward_models.reflection import ReflectionReward, reference_logprobs, score_reference
from guerdon.shaping.reflection import (
    R3Filter,
    ReasoningReflection,
    deviations,
    outcome_length_reward,
    reflection_weights,
)
from guerdon.types import StopReason, Task, Trajectory, Turn

L = torch.tensor([[-1.0, -2.0, -1.0], [-1.0, -4.0, -2.0]], dtype=torch.float64)


def test_weights_follow_the_deviation_over_traces() -> None:
    assert deviations(L).tolist() == [0.0, 1.0, 0.5]
    assert reflection_weights(L).tolist() == pytest.approx([0, 2 / 3, 1 / 3])
    assert reflection_weights(L, weight="power", power=2).tolist() == pytest.approx([0, 0.8, 0.2])
    assert reflection_weights(L, weight="threshold", quantile=0.9).tolist() == [0, 1, 0]
    assert reflection_weights(L, weight="uniform").tolist() == pytest.approx([1 / 3] * 3)
    assert reflection_weights(L[:1].repeat(4, 1)).tolist() == pytest.approx([1 / 3] * 3)
    assert deviations(torch.tensor([[-1.0], [-100.0]]), floor=-30.0).item() == pytest.approx(14.5)


def test_the_reward_by_hand() -> None:
    reflect = ReasoningReflection()
    assert reflect(L).tolist() == pytest.approx([-5 / 3, -10 / 3])
    M = torch.tensor([-3.0, -3.0, -3.0])
    with_baseline = reflect(L, M)
    assert with_baseline.tolist() == pytest.approx([3 - 5 / 3, 3 - 10 / 3])
    # M and w are shared by the group: the difference between traces is the same
    assert (with_baseline[0] - with_baseline[1]).item() == pytest.approx((reflect(L)[0] - reflect(L)[1]).item())
    assert ReasoningReflection(baseline=None)(L, M).tolist() == pytest.approx(reflect(L).tolist())


def test_a_poor_reflective_token_discounts_what_follows() -> None:
    gamma = 0.5
    got = ReasoningReflection("uniform", propagation=gamma, quantile=0.9)(L)
    # token 1 is the reflective one; only token 2 lies behind it, at distance 1
    for i in range(2):
        p = math.exp(L[i, 1])
        factor = p + (1 - p) * (1 - math.exp(-gamma))
        assert got[i].item() == pytest.approx((L[i].sum().item() + math.log(factor)) / 3)


def test_traces_without_an_end_are_left_out() -> None:
    broken = torch.cat([L, torch.full((1, 3), float("nan"), dtype=torch.float64)])
    valid = torch.tensor([True, True, False])
    got = ReasoningReflection()(broken, valid=valid)
    assert got[:2].tolist() == pytest.approx([-5 / 3, -10 / 3]) and got[2].isnan()
    assert ReasoningReflection()(broken, valid=torch.tensor([True, False, False])).isnan().all()
    with pytest.raises(ValueError, match="finite"):
        ReasoningReflection()(broken)


@given(st.integers(0, 10_000), st.floats(0.1, 10), st.floats(-5, 5))
@settings(max_examples=50, deadline=None)
def test_no_gradient_and_invariances(seed: int, factor: float, shift: float) -> None:
    matrix = -torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_(True)
    reflect = ReasoningReflection()
    got = reflect(matrix)
    assert not got.requires_grad
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(reflect(matrix[order]), got[order])
    # a constant per token changes no weight, and every trace's reward alike
    moved = reflect(matrix + shift)
    assert torch.allclose(moved - got, torch.full_like(got, shift))
    assert torch.allclose(reflection_weights(matrix * factor), reflection_weights(matrix))


def test_the_length_term_is_about_the_outcome_and_unclipped() -> None:
    assert outcome_length_reward([10, 5, 40], 10, 0.5).tolist() == [1.0, 0.75, -0.5]
    with pytest.raises(ValueError, match="at least one token"):
        outcome_length_reward([1], 0)


def test_the_filter_drops_the_too_hard_and_the_too_easy() -> None:
    ranks = {
        "hard": torch.full((2, 10), 99),
        "one good trace": torch.stack([torch.full((10,), 99), torch.ones(10, dtype=torch.long)]),
        "fine": torch.ones(2, 10, dtype=torch.long),
        "easy": torch.ones(2, 10, dtype=torch.long),
    }
    sigma = {"hard": 9.0, "one good trace": 2.0, "fine": 1.0, "easy": 0.0}
    matrices = [torch.tensor([[0.0] * 10, [-2 * s] + [0.0] * 9]) for s in sigma.values()]
    names = list(ranks)
    chosen = R3Filter(top_k=50, drop_fraction=0.34).select(matrices, list(ranks.values()), names)
    assert [names[k] for k in chosen] == ["one good trace", "fine"]
    carried = R3Filter(top_k=50, drop_fraction=0.34, carry=1.0).select(
        matrices, list(ranks.values()), names, previous=["hard"]
    )
    assert [names[k] for k in carried] == ["hard", "one good trace", "fine"]
    worst = torch.tensor([[1] * 9 + [41], [1] * 9 + [21]])
    assert R3Filter(rho=0.1).hardness(worst) == 21 and R3Filter(rho=0.2).hardness(worst) == 11
    invalid = [torch.tensor([True, False])] * 4
    assert len(R3Filter().select(matrices, list(ranks.values()), names, valid=invalid)) == 0


def test_senseless_settings_are_refused() -> None:
    for bad in ({"weight": "x"}, {"baseline": "x"}, {"propagation": 0}, {"power": 0}, {"quantile": 1}, {"floor": 1.0}):
        with pytest.raises(ConfigError):
            ReasoningReflection(**bad)
    for bad in ({"rho": 0}, {"top_k": 0}, {"drop_fraction": 1}, {"carry": 2}):
        with pytest.raises(ConfigError):
            R3Filter(**bad)
    with pytest.raises(ValueError, match="at least one reference token"):
        ReasoningReflection()(torch.zeros(2, 0))
    with pytest.raises(ValueError, match="M "):
        ReasoningReflection()(L, torch.zeros(2))


@pytest.fixture(scope="module")
def policy():
    torch.set_num_threads(1)
    return tiny_policy(hidden=32, heads=2, seed=1)


def test_log_probabilities_agree_with_the_trainers_and_ranks_with_sorting(policy) -> None:
    contexts = [policy.encode("What is"), policy.encode("The capital of Peru, of all"), policy.encode("x")]
    reference = policy.encode(" Lima, of course.")
    got, ranks = score_reference(policy.model, contexts, reference, batch_size=2)
    (batch,) = make_batches([(c, reference) for c in contexts], groups=None, max_tokens=10_000, share_prompt=False)
    want = torch.zeros_like(got)
    with torch.no_grad():
        want[batch.trajectory, batch.position] = token_logprobs(policy, batch).logprobs
    assert torch.allclose(got, want, atol=1e-5)
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([contexts[0] + reference])).logits[0]
    row = logits[len(contexts[0]) - 1]
    assert ranks[0, 0] == 1 + int((row > row[reference[0]]).sum())
    texts, _ = reference_logprobs(policy.model, policy.tokenizer, "What", [" is"], " Lima, of course.")
    assert torch.allclose(texts[0], got[0], atol=1e-5)
    for bad in (([[1]], []), ([[]], [1])):
        with pytest.raises(DataError):
            score_reference(policy.model, *bad)


def test_a_reward_of_groups(policy) -> None:
    task = Task("t", "What is it?", " Lima, of course.")
    outcomes = ["<think>Lima</think> Lima", "<think>Oslo</think> Oslo, of course.", "<think>no end"]
    group = [
        Trajectory(task, (Turn("policy", o),), StopReason.EOS, prompt_ids=tuple(policy.encode("Q"))) for o in outcomes
    ]
    reward = ReflectionReward(policy, lambda_len=0.5)
    scores = reward(group)
    assert [s.valid for s in scores] == [True, True, False] and "does not end" in (scores[2].reason or "")
    n = len(policy.encode(task.reference))
    for s, text in zip(scores[:2], outcomes, strict=False):
        outcome = text.split("</think>")[1]
        assert s.parts["length"] == pytest.approx(1 - abs(n - len(policy.encode(outcome))) / n)
        assert s.value == pytest.approx(s.parts["r3"] + 0.5 * s.parts["length"])
    # what the outcome says does not matter to R3: only the reasoning before it does
    twin = Trajectory(
        task, (Turn("policy", "<think>Lima</think> something else"),), StopReason.EOS, prompt_ids=group[0].prompt_ids
    )
    again = reward([twin, group[1]])
    assert again[0].parts["r3"] == pytest.approx(scores[0].parts["r3"], abs=1e-5)
    alone = reward([group[0]])[0]
    assert not alone.valid and "fewer than two" in (alone.reason or "")
    assert np.isnan(alone.value)
