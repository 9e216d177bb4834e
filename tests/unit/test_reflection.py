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
from guerdon.reward_models.reflection import ReflectionReward, reference_logprobs, score_reference, score_references
from guerdon.rewards import Progress
from guerdon.shaping.reflection import (
    R3Filter,
    ReasoningReflection,
    deviations,
    outcome_length_reward,
    reflection_weights,
)
from guerdon.types import Group, StopReason, Task, Trajectory, Turn

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


def said(policy, task: Task, text: str, *, ids: bool = True) -> Trajectory:
    """A trajectory as an engine records it: the end token is sampled, and no part of the text."""
    tokens = (*policy.encode(text), policy.tokenizer.eos_token_id) if ids else ()
    return Trajectory(task, (Turn("policy", text, tokens),), StopReason.EOS, prompt_ids=tuple(policy.encode("Q")))


def test_many_groups_are_scored_in_one_pass_and_as_if_alone(policy) -> None:
    tasks = [Task("a", "x", " Lima."), Task("b", "y", " a much longer reference, here"), Task("c", "z", " no")]
    texts = ["<think>one</think> u", "<think>two three</think> v w", "<think>four</think>"]
    batch = [said(policy, t, x) for x in texts for t in tasks]  # groups interleaved
    calls = []
    model = policy.model.model
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = ReflectionReward(policy, lambda_len=0.0)(batch)
    finally:
        handle.remove()
    assert len(calls) == 1
    for t in tasks:
        rows = [k for k, one in enumerate(batch) if one.task is t]
        alone = ReflectionReward(policy, lambda_len=0.0, max_tokens=1)([batch[k] for k in rows])
        assert [found[k].value for k in rows] == pytest.approx([s.value for s in alone], abs=1e-5)
        # and as the formula says, from log-probabilities that a slow loop computes
        reference = policy.encode(t.reference)
        contexts = [[*policy.encode("Q"), *policy.encode(x[: x.index("</think>") + 8])] for x in texts]
        empty = [*policy.encode("Q"), *policy.encode("<think></think>")]
        slow = torch.tensor([slow_logprobs(policy, c, reference) for c in [*contexts, empty]], dtype=torch.float64)
        sigma = slow[:-1].std(0, correction=0)
        want = ((slow[:-1] - slow[-1]) * sigma / sigma.sum()).sum(1)
        assert [found[k].value for k in rows] == pytest.approx(want.tolist(), abs=1e-4)


def slow_logprobs(policy, context, reference) -> list[float]:
    out = []
    for j, token in enumerate(reference):
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([[*context, *reference[:j]]])).logits[0, -1].double()
        out.append(float(logits[token] - logits.logsumexp(0)))
    return out


def test_equal_traces_are_equal_to_the_last_bit(policy) -> None:
    task = Task("a", "x", " Lima, of course.")
    scores = ReflectionReward(policy, lambda_len=0.0)([said(policy, task, "<think>same</think> a")] * 5)
    assert len({s.value for s in scores}) == 1
    found = score_references(policy.model, [([5, 6], [7, 8]), ([5], [7]), ([5, 6], [7, 8])])
    assert torch.equal(found[0][0], found[2][0]) and found[1][0].shape == (1,)
    assert score_references(policy.model, []) == []


def test_no_gradient_and_no_change_of_mode(policy) -> None:
    policy.model.train()
    ((logprobs, _),) = score_references(policy.model, [([5], [7])])
    assert not logprobs.requires_grad and policy.model.training
    policy.model.eval()


def test_hidden_reasoning_cannot_be_seen(policy) -> None:
    contexts = [[5, 6, 20, 21, 9], [5, 6, 30, 31, 9]]
    open_, closed = (
        score_references(policy.model, [(c, [7, 8]) for c in contexts], hidden=spans)
        for spans in (None, [(2, 4), (2, 4)])
    )
    assert not torch.allclose(open_[0][0], open_[1][0], atol=1e-6)
    assert torch.allclose(closed[0][0], closed[1][0], atol=1e-6)
    for bad in ([(2, 5), None], [(3, 2), None], [None]):
        with pytest.raises(DataError, match="hidden"):
            score_references(policy.model, [(c, [7]) for c in contexts], hidden=bad)
    task = Task("a", "x", " Lima")
    group = [said(policy, task, f"<think>{w}</think> a") for w in ("one", "two")]
    one = ReflectionReward(policy, masked="hidden").reflect(group)[0]
    assert one.M is not None and one.M.shape == one.L.shape
    # of equal length, so the masked contexts are the same but for what cannot be seen
    if len(group[0]) == len(group[1]):
        assert torch.allclose(one.M[0], one.M[1], atol=1e-5)


def test_the_sampled_tokens_are_scored_and_the_outcome_is_counted(policy) -> None:
    task = Task("a", "x", " Lima, of course.")
    # spelled byte by byte: the same text in other tokens than the tokenizer would choose
    text = "<think>it is</think> Lima"
    odd = [t for c in text.split("</think>")[0] for t in policy.encode(c)]
    ids = (*odd, *policy.encode("</think>"), *policy.encode(" Lima"), policy.tokenizer.eos_token_id)
    t = Trajectory(task, (Turn("policy", text, ids),), StopReason.EOS, prompt_ids=(5,))
    reward = ReflectionReward(policy)
    one = reward.reflect([t, said(policy, task, "<think>b</think> Lima")])[0]
    want = slow_logprobs(policy, [5, *odd, *policy.encode("</think>")], policy.encode(task.reference))
    assert one.L[0].tolist() == pytest.approx(want, abs=1e-4)
    assert one.outcome.tolist() == [len(policy.encode(" Lima"))] * 2  # the end token is no word
    counted = ReflectionReward(policy, encode_outcome=lambda text: len(text.split())).reflect([t])[0]
    assert counted.outcome.tolist() == [1.0]
    prefixed = ReflectionReward(policy, prefix=" Lima").reflect([t])[0]
    assert prefixed.outcome.tolist() == [0.0]
    without_ids = reward.reflect([said(policy, task, text, ids=False)])[0]
    assert without_ids.outcome.tolist() == one.outcome.tolist()[:1]


def test_tools_between_stand_in_the_context(policy) -> None:
    task = Task("a", "x", " Lima")
    turns = (Turn("policy", "<think>ask"), Turn("environment", "it said</think>"), Turn("policy", " so</think> Lima"))
    t = Trajectory(task, turns, StopReason.DONE, prompt_ids=(5,))
    one = ReflectionReward(policy).reflect([t])[0]
    context = [5, *(i for x in ("<think>ask", "it said</think>", " so</think>") for i in policy.encode(x))]
    assert one.L[0].tolist() == pytest.approx(slow_logprobs(policy, context, policy.encode(" Lima")), abs=1e-4)


def test_the_length_weight_is_matched_once_and_kept(policy) -> None:
    task = Task("a", "x", " Lima, of course.")
    group = [said(policy, task, f"<think>{w}</think>{' Lima' * n}") for w, n in (("one", 1), ("two", 4), ("x", 2))]
    reward = ReflectionReward(policy)
    alike = [said(policy, task, f"<think>{w}</think> Lima") for w in ("one", "two")]
    reward(alike)
    assert reward.lambda_len is None  # equal lengths tell nothing
    scores = reward(group)
    r3, length = (np.array([s.parts[k] for s in scores]) for k in ("r3", "length"))
    assert reward.lambda_len == pytest.approx(r3.std() / length.std())
    assert [s.value for s in scores] == pytest.approx(r3 + reward.lambda_len * length)
    before = reward.lambda_len
    reward(group[:2])
    assert reward.lambda_len == before
    again = ReflectionReward(policy)
    again.load_state_dict(reward.state_dict())
    assert again.lambda_len == before


def test_a_lagged_scorer_is_renewed_now_and_then(policy) -> None:
    own = tiny_policy(hidden=32, heads=2, seed=2)
    task = Task("a", "x", " Lima")
    group = [said(own, task, f"<think>{w}</think> a") for w in ("one", "two")]
    reward = ReflectionReward(own, lambda_len=0.0, refresh=2)
    value = lambda step: reward(group, progress=Progress(step, 10))[0].value  # noqa: E731
    first = value(0)
    with torch.no_grad():
        own.model.get_input_embeddings().weight[:, 0] += 1.0
    assert value(1) == first
    second = value(2)
    assert second != first and second == pytest.approx(ReflectionReward(own, lambda_len=0.0)(group)[0].value)
    restored = ReflectionReward(own, lambda_len=0.0, refresh=2)
    restored.load_state_dict(reward.state_dict())
    with torch.no_grad():
        own.model.get_input_embeddings().weight[:, 0] -= 1.0
    assert restored(group, progress=Progress(3, 10))[0].value == second


def test_choosing_tasks_by_their_traces(policy) -> None:
    tasks = [Task("a", "x", " Lima"), Task("b", "y", " Lima"), Task("c", "z", " Lima")]
    groups = [
        Group(tasks[0], (said(policy, tasks[0], "<think>p</think>"), said(policy, tasks[0], "<think>q r</think>"))),
        Group(tasks[1], (said(policy, tasks[1], "<think>p</think>"),) * 2),
        Group(tasks[2], (said(policy, tasks[2], "<think>p"),) * 2),
    ]
    reward = ReflectionReward(policy)
    assert reward.select(groups, R3Filter(top_k=10_000, drop_fraction=0.5)).tolist() == [0]
    assert reward.select(groups, R3Filter(top_k=1, drop_fraction=0.0)).tolist() == []
    carried = reward.select(groups, R3Filter(top_k=10_000, drop_fraction=0.5, carry=1.0), previous=["c"])
    assert carried.tolist() == [0, 2]


def test_mistakes_in_the_set_up_are_named(policy) -> None:
    for bad in ({"end": ""}, {"masked": "x"}, {"refresh": 0}, {"lambda_len": -1.0}, {"lambda_r3": float("nan")}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            ReflectionReward(policy, **bad)
    for gold in (None, "", "  ", 7):
        with pytest.raises(ConfigError, match="reference text"):
            ReflectionReward(policy)([said(policy, Task("a", "x", gold), "<think>a</think> b")])
    with pytest.raises(ConfigError, match="batch_size"):
        score_reference(policy.model, [[1]], [2], batch_size=0)
    with pytest.raises(DataError, match="no contexts"):
        score_reference(policy.model, [], [2])
    with pytest.raises(ConfigError, match="prompts"):
        reference_logprobs(policy.model, policy.tokenizer, ["a", "b"], ["c"], "d")


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_no_text_breaks_it(texts: list[str]) -> None:
    policy = _POLICY
    task = Task("a", "x", " Lima")
    scores = ReflectionReward(policy)([said(policy, task, f"<think>{x}</think>{x}", ids=False) for x in texts])
    assert all(np.isfinite(s.value) if s.valid else s.reason for s in scores)


_POLICY = tiny_policy(hidden=32, heads=2, seed=1)
