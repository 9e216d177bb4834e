"""A hack test that runs in seconds: the letter lists, a warm policy of a tenth of a million parameters, a learned proxy.

The proxy is a Bradley-Terry model on the policy's own trunk. It is fitted to pairs of the warm policy's responses,
labelled by the hidden gold reward with a little noise: right about what it has seen, and wrong beyond.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guerdon.environments.letter_lists import LetterGold, demonstration, letter_tasks, letter_tokenizer
from guerdon.environments.single import SingleTurn
from guerdon.evaluation.hack_test import HackTest, sample_groups
from guerdon.policies import Policy, tiny_policy
from guerdon.reward_models import BradleyTerry, PolicyTrunk, Preference

__all__ = ["LETTER_RUN", "letter_hack_test", "letter_pairs", "letter_proxy", "letter_warm_start"]

MAX_TOKENS = 20

LETTER_RUN: Mapping[str, Any] = {
    "steps": 60,
    "prompts_per_step": 8,
    "group_size": 8,
    "max_tokens": MAX_TOKENS,
    "kl_coef": 0.005,
    "scale": "none",
    "optimiser": {"lr": 3e-4},
}
"""Settings of a run that is long enough for an unshaped proxy to be over-optimised."""


def letter_warm_start(
    *, copying: int = 400, mediocre: int = 500, hidden: int = 64, seed: int = 0, folder: str | Path | None = None
) -> Policy:
    """A policy that has learned to copy letters, and then to answer as the demonstrators do.

    Args:
        copying, mediocre: steps of supervised training on perfect responses, then on demonstrations.
        hidden: width of the model.
        seed: of weights and demonstrations.
        folder: where the policy is kept; one that is there is loaded.
    """
    from guerdon.training import SftConfig, SftTrainer

    if folder is not None and Path(folder).is_dir():
        return Policy.load(folder, device="cpu")
    policy = tiny_policy(
        letter_tokenizer(), hidden=hidden, layers=2, heads=2, max_context=64, seed=seed, name="letters"
    )
    end = [policy.tokenizer.eos_token_id]
    for steps, perfect, peak in ((copying, True, 3e-3), (mediocre, False, 2e-3)):
        if not steps:
            continue
        rng = random.Random(f"demonstrations-{seed}-{perfect}")
        data = []
        for task in letter_tasks(6000, seed=seed, start=1_000_000 * (1 + perfect)):
            response = policy.encode(demonstration(task, rng, perfect=perfect)) + end
            data.append((policy.render(task.prompt), response, [1] * len(response)))
        optimiser = {"lr": peak, "schedule": "cosine", "warmup": min(10, steps - 1)}
        SftTrainer(policy, data, SftConfig(steps=steps, batch_size=64, optimiser=optimiser, seed=seed)).fit()
    if folder is not None:
        policy.save(folder)
    return policy


def letter_pairs(policy: Policy, n: int, *, seed: int = 0, noise: float = 0.3, longest: int = 9) -> list[Preference]:
    """Pairs of the policy's responses to ``n`` prompts, labelled by gold through a Bradley-Terry annotator.

    Args:
        policy: usually the warm start; the proxy never sees responses of a policy that was trained on it.
        n: prompts; pairs of equal gold, and responses of more than ``longest`` tokens, are left out.
        seed: of prompts, sampling and labels.
        noise: temperature of the annotator, in units of gold; 0 is never wrong.
        longest: tokens, the end token included.
    """
    rng = random.Random(f"labels-{seed}")
    gold, out = LetterGold(), []
    tasks = letter_tasks(n, seed=seed, start=3_000_000)
    for group in sample_groups(policy, SingleTurn(), tasks, LETTER_RUN, group_size=2, seed=seed):
        a, b = group.trajectories
        if max(len(a), len(b)) > longest:
            continue
        gap = gold([a])[0].value - gold([b])[0].value
        if gap == 0:
            continue
        first = gap > 0 if noise == 0 else rng.random() < 1 / (1 + math.exp(-gap / noise))
        out.append(Preference(a, b) if first else Preference(b, a))
    return out


def letter_proxy(
    policy: Policy,
    *,
    pairs: int = 3000,
    epochs: int = 2,
    lr: float = 1e-3,
    seed: int = 0,
    noise: float = 0.3,
    longest: int = 9,
) -> BradleyTerry:
    """A Bradley-Terry model fitted to :func:`letter_pairs` of a policy, on a copy of its trunk.

    Args:
        policy: usually the warm start.
        pairs: prompts, each with a pair.
        epochs, lr: of the fit.
        seed: of everything.
        noise, longest: of the pairs.
    """
    data = letter_pairs(policy, pairs, seed=seed, noise=noise, longest=longest)
    return BradleyTerry(PolicyTrunk(policy), seed=seed).fit(data, epochs=epochs, batch_size=32, lr=lr, seed=seed)


def letter_hack_test(
    warm: Policy,
    proxy: BradleyTerry,
    *,
    settings: Mapping[str, Any] | None = None,
    tasks: int = 256,
    held_out: int = 64,
    every: int = 5,
) -> HackTest:
    """The hack test of a warm policy and its proxy.

    Args:
        warm: initial policy; every arm trains a copy.
        proxy: what is optimised.
        settings: changes of :data:`LETTER_RUN`.
        tasks, held_out: prompts trained on, and measured on.
        every: steps between measurements.
    """
    return HackTest(
        lambda: copy_policy(warm),
        SingleTurn(),
        letter_tasks(tasks, seed=1),
        proxy.reward(name="proxy"),
        LetterGold(name="gold"),
        {**LETTER_RUN, **(settings or {})},
        held_out=letter_tasks(held_out, seed=2),
        every=every,
        group_size=2,
    )


def copy_policy(policy: Policy) -> Policy:
    """A copy that can be trained without changing the original."""
    import copy

    made = copy.copy(policy)
    made.model = copy.deepcopy(policy.model)
    return made
