"""Objectives per token, and in the update: values and gradients against loops over sequences in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import ConfigError
from guerdon.objectives import cispo, gspo, ppo_clip, reinforce, sequence_log_ratio, sequence_mean_token_mean
from guerdon.training.config import OnlineConfig
from guerdon.training.losses import Objective, Slice, policy_terms


def tokens(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logprobs = torch.randn(n, generator=generator, dtype=torch.float64) - 2
    old = logprobs + 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
    return logprobs.requires_grad_(), old, torch.randn(n, generator=generator, dtype=torch.float64)


def test_reinforce_is_the_plain_policy_gradient() -> None:
    logprobs, old, advantages = tokens(5)
    loss = reinforce(logprobs, old, advantages)
    assert torch.allclose(loss, -advantages * logprobs)
    loss.sum().backward()
    assert torch.allclose(logprobs.grad, -advantages)


def test_ppo_has_the_gradient_of_reinforce_on_the_first_step() -> None:
    logprobs, _, advantages = tokens(5)
    ppo_clip(logprobs, logprobs.detach(), advantages).sum().backward()
    assert torch.allclose(logprobs.grad, -advantages)


def test_cispo_clips_the_weight_and_keeps_the_gradient_of_every_token() -> None:
    logprobs = torch.log(torch.tensor([0.1, 0.9, 0.5], dtype=torch.float64)).requires_grad_()
    old = torch.log(torch.tensor([0.4, 0.1, 0.5], dtype=torch.float64))
    advantages = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    loss = cispo(logprobs, old, advantages, clip_low=0.5, clip_high=1.0)
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)  # ratios 0.25, 9 and 1
    assert torch.allclose(loss, -weight * advantages * logprobs)
    loss.sum().backward()
    assert torch.allclose(logprobs.grad, -weight * advantages)
    plain = torch.log(torch.tensor([0.9], dtype=torch.float64)).requires_grad_()
    ppo_clip(plain, old[1:2], advantages[1:2]).sum().backward()
    assert plain.grad.tolist() == [0.0]  # PPO drops the very token
    assert cispo(logprobs, old, advantages).tolist() == pytest.approx(
        (-torch.tensor([0.25, 5.0, 1.0], dtype=torch.float64) * advantages * logprobs).tolist()
    )


def slow_gspo(logprobs, old, advantages, rows, low, high):
    """Mean over sequences of the clipped sequence ratio, as the paper writes it; one advantage per sequence."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ratio = torch.exp(sum(logprobs[i] - old[i] for i in row) / len(row))
        total = total + torch.minimum(ratio * advantages[row[0]], ratio.clamp(1 - low, 1 + high) * advantages[row[0]])
    return -total / len(rows)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 10_000))
def test_gspo_equals_the_sequence_objective_in_value_and_gradient(lengths: list[int], seed: int) -> None:
    n = sum(lengths)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    owner = owner[order]  # tokens of a sequence need not lie together
    logprobs, old, noise = tokens(n, seed)
    advantages = noise[: len(lengths)][owner]
    rows = [[i for i in range(n) if owner[i] == b] for b in range(len(lengths))]
    low, high = 0.05, 0.08
    want = slow_gspo(logprobs, old, advantages, rows, low, high)
    (want_gradient,) = torch.autograd.grad(want, logprobs)

    mask = torch.ones(n, dtype=torch.bool)
    loss = gspo(logprobs, old, advantages, low, high, sequence_ids=owner, mask=mask)
    width = max(lengths)
    padded, present = torch.zeros(len(rows), width, dtype=torch.float64), torch.zeros(len(rows), width)
    for b, row in enumerate(rows):
        padded[b, : len(row)] = loss[row]
        present[b, : len(row)] = 1
    got = sequence_mean_token_mean(padded, present)
    (gradient,) = torch.autograd.grad(got, logprobs)
    assert float(got.detach()) == pytest.approx(float(want.detach()))
    assert torch.allclose(gradient, want_gradient)


def test_gspo_ignores_what_is_outside_the_mask() -> None:
    logprobs, old, advantages = tokens(4)
    owner = torch.tensor([0, 0, 1, 1])
    mask = torch.tensor([True, False, False, False])
    spoilt = torch.where(mask, logprobs.detach(), math.nan).requires_grad_()
    loss = gspo(spoilt, old, advantages, sequence_ids=owner, mask=mask, clip_low=0.9, clip_high=9.0)
    loss.sum().backward()
    ratio = float((logprobs[0] - old[0]).exp().detach())
    assert loss[0].item() == pytest.approx(-ratio * float(advantages[0])) and loss[1:].tolist() == [0.0] * 3
    assert torch.isfinite(spoilt.grad[0]) and spoilt.grad[1:].tolist() == [0.0] * 3
    assert sequence_log_ratio(logprobs, old, owner, mask)[2:].tolist() == [0.0, 0.0]
    empty = torch.zeros(0)
    assert gspo(empty, empty, empty, sequence_ids=empty.long(), mask=empty.bool()).shape == (0,)


# Objectives in a configuration ------------------------------------------------------------------------------------------


def slice_of(n: int, seed: int = 0) -> tuple[torch.Tensor, Slice]:
    logprobs, old, advantages = tokens(n, seed)
    weight = torch.full((n,), 1 / n, dtype=torch.float64)
    weight[-1] = 0.0
    owner = torch.arange(n) // 3
    return logprobs, Slice(old, advantages, old, weight, sequence=owner, reference=old - 0.1)


@pytest.mark.parametrize(
    ("config", "function", "more"),
    [
        (OnlineConfig(), ppo_clip, {"clip_low": 0.2, "clip_high": 0.2}),
        (OnlineConfig(algorithm="dapo"), ppo_clip, {"clip_low": 0.2, "clip_high": 0.28}),
        (OnlineConfig(clip_low=0.1, clip_high=0.3), ppo_clip, {"clip_low": 0.1, "clip_high": 0.3}),
        (OnlineConfig(objective={"name": "ppo_clip", "clip_low": 0.05, "dual_clip": 3.0}), ppo_clip,
         {"clip_low": 0.05, "dual_clip": 3.0}),
        (OnlineConfig(objective="cispo"), cispo, {}),
        (OnlineConfig(algorithm="cispo", clip_high=1.0), cispo, {"clip_low": 1.0, "clip_high": 1.0}),
        (OnlineConfig(algorithm="reinforce"), reinforce, {}),
    ],
)  # fmt: skip
def test_the_configuration_chooses_the_objective_and_its_clip(config: OnlineConfig, function, more: dict) -> None:
    logprobs, part = slice_of(7)
    loss, stats = policy_terms(logprobs, None, part, config, 0.0)
    learned = part.policy != 0
    want = (part.policy * function(torch.where(learned, logprobs, part.old), part.old, part.advantage, **more)).sum()
    assert float(loss.detach()) == pytest.approx(float(want.detach()))
    assert float(stats["n/tokens"]) == 6


def test_gspo_gets_its_sequences_and_its_clip_is_counted_by_sequence() -> None:
    logprobs, part = slice_of(9)
    config = OnlineConfig(algorithm="gspo")
    loss, stats = policy_terms(logprobs, None, part, config, 0.0)
    learned = part.policy != 0
    per_token = gspo(
        torch.where(learned, logprobs, part.old), part.old, part.advantage, 3e-4, 4e-4,
        sequence_ids=part.sequence, mask=learned,
    )  # fmt: skip
    assert float(loss.detach()) == pytest.approx(float((part.policy * per_token).sum().detach()))
    ratio = sequence_log_ratio(logprobs.detach(), part.old, part.sequence, learned).exp()
    out = ((ratio > 1 + 4e-4) & (part.advantage > 0)) | ((ratio < 1 - 3e-4) & (part.advantage < 0))
    assert int(stats["n/clipped"]) == int((out & learned).sum())


def test_a_function_of_ones_own_reads_what_it_names() -> None:
    def pull(logprobs, old_logprobs, advantages, *, reference_logprobs, mask, strength=2.0):
        return torch.where(mask, strength * (logprobs - reference_logprobs) ** 2, 0.0)

    objective = Objective.of(OnlineConfig(), pull)
    assert objective.reads == {"reference_logprobs", "mask"}
    logprobs, part = slice_of(4)
    loss, _ = policy_terms(logprobs, None, part, OnlineConfig(), 0.0, objective)
    learned = part.policy != 0
    assert float(loss.detach()) == pytest.approx(
        float((part.policy * 2 * (logprobs - part.reference) ** 2)[learned].sum().detach())
    )
    with pytest.raises(ConfigError, match="one per token, unreduced"):
        Objective.of(OnlineConfig(), lambda a, b, c: a.sum())(logprobs, part, learned)
