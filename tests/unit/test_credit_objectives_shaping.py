"""Credit, objectives and shaping against slow float64 references and hand-computed values."""

import math

import numpy as np
import pytest
import torch

from guerdon.credit import gae, group_relative, group_statistics, leave_one_out, place_outcome, whiten
from guerdon.errors import ConfigError, RewardError
from guerdon.objectives import kl_k1, kl_k2, kl_k3, masked_mean, ppo_clip, truncated_importance_weight, value_clip_loss
from guerdon.shaping import RunningPercentileCost, hierarchical, quantile_rescale, signed_geometric_mean


def test_group_statistics_by_explicit_id_in_any_order():
    rewards = torch.tensor([1.0, 5.0, 3.0, 2.0, 7.0])
    ids = torch.tensor([0, 1, 0, 0, 2])
    s = group_statistics(rewards, ids)
    assert s.mean.tolist() == [2.0, 5.0, 2.0, 2.0, 7.0]
    assert s.std.tolist() == [1.0, 0.0, 1.0, 1.0, 0.0]
    assert s.others.tolist() == [2.5, 5.0, 1.5, 2.0, 7.0]
    assert leave_one_out(rewards, ids).tolist() == [-1.5, 0.0, 1.5, 0.0, 0.0]


def test_invalid_members_count_in_no_statistic():
    rewards = torch.tensor([1.0, float("nan"), 3.0])
    valid = torch.tensor([True, False, True])
    out = group_relative(rewards, torch.zeros(3, dtype=torch.long), valid, scale=False)
    assert out.tolist() == [-1.0, 0.0, 1.0]


def test_group_relative_is_invariant_to_a_constant_and_zero_without_variance():
    rewards, ids = torch.randn(12, dtype=torch.float64), torch.arange(12) % 3
    assert torch.allclose(group_relative(rewards + 5, ids), group_relative(rewards, ids), atol=1e-6)
    assert group_relative(torch.full((4,), 0.1), torch.zeros(4, dtype=torch.long)).tolist() == [0.0] * 4
    order = torch.randperm(12)
    assert torch.allclose(group_relative(rewards[order], ids[order]), group_relative(rewards, ids)[order])


def slow_gae(rewards, values, mask, gamma, lam):
    advantage = np.zeros_like(rewards)
    for b in range(len(rewards)):
        steps = [t for t in range(rewards.shape[1]) if mask[b, t]]
        for i, t in enumerate(steps):
            total, weight = 0.0, 1.0
            for j in range(i, len(steps)):
                after = values[b, steps[j + 1]] if j + 1 < len(steps) else 0.0
                total += weight * (rewards[b, steps[j]] + gamma * after - values[b, steps[j]])
                weight *= gamma * lam
            advantage[b, t] = total
    return advantage


def test_gae_skips_environment_tokens():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(3, 9)), rng.normal(size=(3, 9))
    mask = rng.random((3, 9)) < 0.6
    want = slow_gae(rewards, values, mask, 0.9, 0.8)
    values[~mask] = np.nan
    got, target = gae(torch.tensor(rewards), torch.tensor(values), torch.tensor(mask), 0.9, 0.8)
    assert np.allclose(got.numpy(), want)
    assert np.allclose(target.numpy()[mask], (want + values)[mask])


def test_outcome_goes_to_the_last_action_and_whitening_is_masked():
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
    assert place_outcome(torch.tensor([2.0, 9.0]), mask).tolist() == [[0, 0, 0, 2.0, 0], [0] * 5]
    x = torch.tensor([1.0, 3.0, float("inf")], dtype=torch.float64)
    assert whiten(x, torch.tensor([True, True, False])).tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5, 0.0])


def test_ppo_clip_by_hand():
    logp = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]))
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    assert ppo_clip(logp, torch.zeros(5), advantage, 0.2).tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8, -2.2])
    assert ppo_clip(logp, torch.zeros(5), advantage, 0.2, 0.28)[0].item() == pytest.approx(-1.28)


def test_kl_estimators_and_their_zero():
    p, q = torch.tensor([0.0, -1.0]), torch.tensor([0.0, -2.0])
    assert kl_k1(p, q).tolist() == [0.0, 1.0]
    assert kl_k2(p, q).tolist() == [0.0, 0.5]
    assert kl_k3(p, q).tolist() == pytest.approx([0.0, math.exp(-1) - 1 + 1])
    assert truncated_importance_weight(torch.tensor([0.0, 5.0]), torch.zeros(2), 2.0).tolist() == [1.0, 2.0]


def test_value_clip_takes_the_larger_error():
    value, old, target = torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([2.0])
    assert value_clip_loss(value, old, target, 0.5).item() == pytest.approx(0.5 * 1.5**2)
    assert value_clip_loss(value, old, target, None).item() == 0.0


def test_masked_garbage_touches_neither_value_nor_gradient():
    x = torch.tensor([1.0, float("nan"), float("inf"), 3.0], requires_grad=True)
    masked_mean(x, torch.tensor([1, 0, 0, 1])).backward()
    assert x.grad.tolist() == [0.5, 0.0, 0.0, 0.5]


def slow_percentiles(costs, window=1000):
    fifo, out = [], []
    for u in costs:
        fifo.append(math.sqrt(u))
        fifo = fifo[-window:]
        low, high = np.percentile(fifo, [5, 95])
        out.append(0.5 if high - low < 1e-8 else 1 - min(1, max(0, (math.sqrt(u) - low) / (high - low))))
    return out


def test_running_percentile_cost_with_eviction_and_state():
    costs = np.random.default_rng(1).exponential(100, 1300)
    cost = RunningPercentileCost()
    first = cost(costs[:700])
    other = RunningPercentileCost()
    other.load_state_dict(cost.state_dict())
    assert np.allclose([*first, *other(costs[700:])], slow_percentiles(costs))
    assert RunningPercentileCost()([7.0]).tolist() == [0.5]
    assert RunningPercentileCost()([4.0, 0.0]).tolist() == [0.5, 1.0]
    with pytest.raises(RewardError, match="-1"):
        cost([-1.0])


def test_hierarchical_total():
    form, outcome, cost = torch.tensor([-1.0, 0, 0, 0]), torch.tensor([1.0, 0, 1, 1]), torch.tensor([1.0, 1, 0.5, 0])
    assert hierarchical(form, outcome, cost, 0.6).tolist() == pytest.approx([-1.0, 0.0, 0.7, 0.4])
    assert hierarchical(form, outcome, cost, 0.6, gate_wrong=False).tolist() == pytest.approx([-1.0, 0.6, 0.7, 0.4])
    with pytest.raises(ConfigError, match="alpha"):
        hierarchical(form, outcome, cost, -0.1)


def test_combiners():
    a, b = torch.tensor([4.0, -4.0, 0.0]), torch.tensor([9.0, 9.0, 5.0])
    assert signed_geometric_mean([a, b]).tolist() == pytest.approx([6.0, -6.0, 0.0])
    assert quantile_rescale(torch.arange(11.0), 0.0, 1.0).tolist() == pytest.approx([k / 10 for k in range(11)])
