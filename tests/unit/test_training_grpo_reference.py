"""The whole update against the published GRPO and DAPO losses, written down once more in float64, token by token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from guerdon.policies import tiny_policy
from guerdon.training import OnlineConfig
from guerdon.training.learner import Learner
from guerdon.training.streams import Streams, collect
from guerdon.training.timing import Phases
from guerdon.types import Group, Score, StopReason, Task, Trajectory, Turn

PROMPTS = ([5, 9, 7], [11, 4])
LENGTHS = ((4, 1, 6), (3, 5, 2))


def reference(policy: Any, rows: list[dict[str, Any]], aggregation: str, low: float, high: float) -> torch.Tensor:
    """Source: Shao et al. 2024, eq. 3 (``"sequence"``); Yu et al. 2025, eq. 8 (``"token"``)."""
    per_row = []
    for row in rows:
        ids = torch.tensor([[*row["prompt"], *row["response"]]])
        logits = policy.model(input_ids=ids).logits[0].double()
        terms = []
        for t, token in enumerate(row["response"]):
            logprob = logits[len(row["prompt"]) - 1 + t].log_softmax(-1)[token]
            ratio = (logprob - row["old"][t]).exp()
            clipped = min(max(ratio.item(), 1 - low), 1 + high)
            unclipped_term, clipped_term = ratio * row["advantage"], clipped * row["advantage"]
            terms.append(
                unclipped_term if unclipped_term.item() <= clipped_term else torch.tensor(clipped_term).double()
            )
        per_row.append(torch.stack(terms))
    if aggregation == "token":
        return -torch.cat(per_row).sum() / sum(map(len, per_row))
    return -torch.stack([terms.mean() for terms in per_row]).mean()


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("microbatch", [10_000, 12])
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_loss_and_gradients_are_those_of_the_paper(aggregation: str, microbatch: int, share_prompt: bool) -> None:
    policy = tiny_policy(hidden=32, layers=2, heads=2)
    policy.model.double()
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    groups, advantages = [], []
    for g, (prompt, lengths) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        made = []
        for n in lengths:
            response = rng.integers(3, 200, n).tolist()
            # Around what a fresh policy gives, so that some ratios are clipped on either side and others are not.
            old = np.float32(-math.log(len(policy.tokenizer)) + rng.normal(0, 0.3, n)).tolist()
            advantage = float(rng.normal())
            rows.append({"prompt": prompt, "response": response, "old": old, "advantage": advantage})
            advantages += [advantage] * n
            turn = Turn("policy", "x", tuple(response), tuple(old))
            made.append(Trajectory(Task(f"t{g}", "q"), (turn,), StopReason.EOS, prompt_ids=tuple(prompt)))
        groups.append(Group(made[0].task, tuple(made)))
    experience = collect(groups, [Score(0.0) for _ in rows])
    config = OnlineConfig(
        aggregation=aggregation, clip_low=0.2, clip_high=0.28, max_tokens_per_microbatch=microbatch,
        share_prompt=share_prompt, optimiser={"lr": 1e-12, "grad_clip": None},
    )  # fmt: skip
    advantage = torch.tensor(advantages)
    ones = torch.ones_like(advantage)
    streams = Streams(advantage, ones, ones, ones, None, None, np.zeros(len(rows), dtype=bool))
    learner = Learner(policy, config)
    seen: dict[str, torch.Tensor] = {}

    def look(scale: float, *, where: str) -> dict[str, float]:
        seen.update({name: p.grad.clone() for name, p in policy.model.named_parameters()})
        return {}

    learner.optimiser.step = look
    phases = Phases()
    row = learner.update(experience, streams, learner.prepare(experience, phases), step=0, total=1, phases=phases)
    policy.model.zero_grad()
    expected = reference(policy, rows, aggregation, 0.2, 0.28)
    expected.backward()
    assert 0 < row["clip_fraction"] < 1
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)
