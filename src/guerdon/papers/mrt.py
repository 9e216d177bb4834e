"""MRT (arXiv 2503.07572): does paying for progress, not only for outcomes, make every token of thought count?

Testbed: a latent code of four bits. An episode of thought is one query about a bit, answered wrongly with probability
0.15; asking again helps, and thinking ends with a guess or with the budget. The policy, a transformer of about 0.1 M
parameters, was warm-started on random queries followed by the majority answer, so it can answer after any prefix; what
to ask, and when to stop, is left to RL. Three arms start from it, at about the same number of sampled tokens: GRPO on
outcomes, the same with a price per query, and MRT (prefixes of its own traces; half of a group answers at once, half
asks once more; outcome plus progress). A seed draws warm start, RL and test problems.

J at every prefix of the test traces is exact: the probability of the right code behind a forced end, by one forward pass.
Tokens are the policy's own, the answer's included. Budgets go to twice the one of training.
"""

from __future__ import annotations

import copy
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.papers.evidence import Result, environment, paired_claim, require_scale
from guerdon.papers.recipe import Recipe

SIZES: Mapping[str, Mapping[str, int]] = {
    "smoke": {"scripts": 40, "sft": 4, "steps": 1, "prompts": 3, "eval": 4, "hidden": 32},
    "cpu": {"scripts": 3000, "sft": 200, "steps": 200, "prompts": 16, "eval": 100, "hidden": 64},
    "gpu": {"scripts": 20_000, "sft": 1000, "steps": 300, "prompts": 64, "eval": 500, "hidden": 128},
}
BITS, FLIP = 4, 0.15
BUDGET = 12
GROUP = 8
ANSWERS = 4
"""Forced answers per prefix: with so many all arms sample about the same number of tokens per step."""
BUDGETS = {f"{queries} queries": queries + BITS for queries in (4, 8, BUDGET, 18, 2 * BUDGET)}
"""Test budgets in tokens."""
ARMS = ("outcome", "outcome + length penalty", "mrt")
LR: Mapping[str, float] = {}
PRICE = 0.02
TARGET = 0.5
"""Success at which tokens are compared."""


def reproduce(scale: str, seeds: Sequence[int], out: Path) -> Result:
    """Train every arm from the warm start of each seed, and test the claims.

    Args:
        scale: ``smoke``, ``cpu`` or ``gpu``.
        seeds: of everything; see the module.
        out: unused but for the result; nothing is cached.
    """
    import torch

    scale = require_scale(scale)
    torch.set_num_threads(1)
    started = time.perf_counter()
    size = SIZES[scale]
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ("warm start", *ARMS)}
    for seed in seeds:
        base = warm_start(size, seed)
        runs["warm start"].append(measure(base, size, seed))
        for arm in ARMS:
            policy, log = train(arm, base, size, seed, LR.get(arm, 1e-3))
            row = measure(policy, size, seed) | log
            runs[arm].append(row)
            say(
                f"seed {seed}, {arm}: regret {[round(float(r.mean()), 3) for r in row['regret'].values()]}, queries {row['queries']:.1f}, tokens per step {row['tokens_per_step']:.0f}, {row['seconds']:.0f} s"
            )
    claims, measured = judge(runs, asserted=scale != "smoke")
    return Result(
        "mrt", scale, tuple(seeds), tuple(claims), PAPER, measured, environment(), time.perf_counter() - started,
        notes=NOTES,
    )  # fmt: skip


def warm_start(size: Mapping[str, int], seed: int) -> Any:
    """A policy that asks at random, as often as it may, and answers with the majority of the replies."""
    from guerdon.environments.meta_bandit import bandit_script, bandit_tasks, bandit_words
    from guerdon.policies import tiny_policy, train_bpe
    from guerdon.training import OptimiserConfig, SftConfig, SftTrainer

    words = bandit_words()
    tokenizer = train_bpe(["\n"], vocab_size=258 + len(words), atoms=(), words=words)
    policy = tiny_policy(tokenizer, hidden=size["hidden"], max_context=128, seed=seed)
    rng = random.Random(seed)
    data = [
        bandit_script(policy, t, rng.choices(range(BITS), k=rng.randint(0, 2 * BUDGET)), guess=rng.random() < 0.5)
        for t in bandit_tasks(size["scripts"], bits=BITS, flip=FLIP, seed=1000 + seed)
    ]
    optimiser = OptimiserConfig(lr=3e-3, schedule="cosine", warmup=min(10, size["sft"] - 1))
    SftTrainer(policy, data, SftConfig(steps=size["sft"], batch_size=64, optimiser=optimiser, seed=seed)).fit()
    return policy


def train(arm: str, base: Any, size: Mapping[str, int], seed: int, lr: float) -> tuple[Any, dict[str, float]]:
    """One arm's RL from a copy of the warm start; the policy, and what it took."""
    from guerdon.environments.continued import Continued
    from guerdon.environments.meta_bandit import FORCE, GUESS, MetaBandit, RightCode, bandit_tasks
    from guerdon.rollout import Sampling, TransformersEngine
    from guerdon.search import AnswerSampler, MetaProver
    from guerdon.training import OnlineConfig, OnlineTrainer
    from guerdon.training.mrt import MrtTrainer

    began = time.perf_counter()
    policy = copy.deepcopy(base)
    engine = TransformersEngine(policy, max_slots=256)
    config = OnlineConfig(
        steps=size["steps"], prompts_per_step=size["prompts"], group_size=GROUP, max_tokens=1, max_turns=BUDGET + 2,
        optimiser={"lr": lr}, scale="none", seed=seed,
    )  # fmt: skip
    tasks = bandit_tasks(max(400, size["prompts"]), bits=BITS, flip=FLIP, seed=2000 + seed)
    options: dict[str, Any] = {"rollout_options": {"final_sampling": Sampling(max_tokens=BITS)}}
    reward = RightCode(PRICE if "penalty" in arm else 0.0)
    if arm == "mrt":
        answers = AnswerSampler(engine, Sampling(max_tokens=BITS))
        prover = MetaProver(answers, is_right, FORCE, ANSWERS, policy=policy, seed=seed)
        world = Continued(MetaBandit(BUDGET), force=FORCE, force_action=GUESS, episodes=1)
        trainer: Any = MrtTrainer(
            policy, engine, world, tasks, reward, config, prover=prover, cuts=thoughts, **options
        )  # fmt: skip
    else:
        trainer = OnlineTrainer(policy, engine, MetaBandit(BUDGET), tasks, reward, config, **options)
    history = trainer.fit().history
    trainer.close()
    return policy, {
        "tokens_per_step": engine.stats.decode_tokens / size["steps"],
        "reward": float(np.mean([r["reward/mean"] for r in history[-5:]])),
        "seconds": time.perf_counter() - began,
    }


def is_right(task: Any, answer: Any) -> bool:
    """Whether a forced answer is the code."""
    return "".join(answer.text.split()) == task.reference


def thoughts(trajectory: Any) -> list[Any]:
    """The places before, between and behind the queries of a trajectory, wherever it began."""
    from guerdon.environments.continued import Cut, turn_cuts

    before = trajectory.task.meta.get("cut", Cut())
    asked = sum(turn.speaker == "policy" for turn in before.turns)
    return turn_cuts(trajectory, trajectory.info["queries"] - asked)


def measure(policy: Any, size: Mapping[str, int], seed: int) -> dict[str, Any]:
    """Regret per test problem at every budget, and what the queries were worth; with exact J at every prefix."""
    from guerdon.credit import normalized_regret
    from guerdon.environments.meta_bandit import FORCE, MetaBandit, bandit_tasks
    from guerdon.evaluation import episode_report, success_at, tokens_to_reach
    from guerdon.rollout import Sampling, TransformersEngine, rollout_sync

    tasks = bandit_tasks(size["eval"], bits=BITS, flip=FLIP, seed=3000 + seed)
    groups = rollout_sync(
        TransformersEngine(policy, max_slots=128), MetaBandit(2 * BUDGET), tasks, max_turns=2 * BUDGET + 2,
        sampling=Sampling(max_tokens=1), final_sampling=Sampling(max_tokens=BITS), seed=seed,
    )  # fmt: skip
    traces = [g.trajectories[0] for g in groups]
    places = [thoughts(t) for t in traces]
    suffix = tuple(policy.encode(FORCE))
    contexts = [
        (*t.prompt_ids, *c.ids, *(() if c.forced else suffix))
        for t, row in zip(traces, places, strict=True)
        for c in row
    ]
    golds = [
        policy.encode("".join(f" {b}" for b in t.task.reference))
        for t, row in zip(traces, places, strict=True)
        for _ in row
    ]
    flat = iter(exact_success(policy, contexts, golds))
    j = [[next(flat) for _ in row] for row in places]
    curves = [([float(k + BITS) for k in range(len(row))], row) for row in j]
    report = episode_report(j, [len(row) - 1 + BITS for row in j])
    problems = [[curve] for curve in curves]
    limit = float(2 * BUDGET + BITS)
    reached = tokens_to_reach(problems, TARGET, limit, points=int(4 * limit) + 1)
    return {
        "regret": {name: np.array([normalized_regret(*c, budget) for c in curves]) for name, budget in BUDGETS.items()},
        "success": {name: success_at(problems, budget) for name, budget in BUDGETS.items()},
        "tokens_to_target": min(reached, limit),
        "queries": report.episodes,
        "idle": report.idle,
        "progress": list(report.progress),
    }


def exact_success(policy: Any, contexts: Sequence[Sequence[int]], golds: Sequence[Sequence[int]]) -> list[float]:
    """Probability that the policy, at temperature 1, says each gold right behind its context."""
    import torch

    from guerdon.policies import make_batches, token_logprobs

    out = np.zeros(len(contexts))
    policy.model.eval()
    with torch.no_grad():
        for batch in make_batches(list(zip(contexts, golds, strict=True)), groups=None, max_tokens=8192):
            batch = batch.to(policy.device)
            np.add.at(
                out, batch.trajectory.cpu().numpy(), token_logprobs(policy, batch).logprobs.double().cpu().numpy()
            )
    return np.exp(np.minimum(out, 0.0)).tolist()


def judge(runs: Mapping[str, Sequence[Mapping[str, Any]]], *, asserted: bool) -> tuple[list[Any], dict[str, Any]]:
    """Claims and numbers from what was measured."""

    def regret(arm: str, budget: str) -> np.ndarray:
        return np.array([run["regret"][budget] for run in runs[arm]])

    def tokens(arm: str) -> np.ndarray:
        return np.array([[run["tokens_to_target"]] for run in runs[arm]])

    options: dict[str, Any] = {"asserted": asserted}
    claims = [
        paired_claim(f"1-regret-{budget.split()[0]}", f"normalised regret of MRT is below that of outcome RL at a budget of {budget}", regret("outcome", budget), regret("mrt", budget), **options)
        for budget in BUDGETS
    ]  # fmt: skip
    claims.append(
        paired_claim("2-tokens", f"MRT needs fewer tokens than outcome RL for a success of {TARGET}", tokens("outcome"), tokens("mrt"), **options)
    )  # fmt: skip
    large = list(BUDGETS)[-1]
    claims.append(
        paired_claim("3-length-penalty", f"at {large}, twice the training budget, MRT's regret is below that of outcome RL with a length penalty", regret("outcome + length penalty", large), regret("mrt", large), **options)
    )  # fmt: skip
    measured: dict[str, Any] = {}
    for arm, rows in runs.items():
        measured[arm] = {
            "regret": {b: float(regret(arm, b).mean()) for b in BUDGETS},
            "regret_per_seed": {b: regret(arm, b).mean(1).round(4).tolist() for b in BUDGETS},
            "success": {b: float(np.mean([r["success"][b] for r in rows])) for b in BUDGETS},
            "tokens_to_target": float(np.mean([r["tokens_to_target"] for r in rows])),
            "queries": float(np.mean([r["queries"] for r in rows])),
            "idle_queries": float(np.mean([r["idle"] for r in rows])),
            "progress_of_first_queries": np.mean([(r["progress"] + [0.0] * 12)[:12] for r in rows], 0)
            .round(4)
            .tolist(),
            **(
                {"tokens_per_step": float(np.mean([r["tokens_per_step"] for r in rows]))}
                if "tokens_per_step" in rows[0]
                else {}
            ),
        }
    return claims, measured


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


NOTES = (
    "one learning rate for all arms and one price per query, neither swept. With 40 steps as with 200 every arm leaves nine "
    "tenths of the regret: the policy hardly reads what it was told, so no credit for progress can help. What would have to "
    "come first is a warm start that can; it was not tried"
)

PAPER = {
    "relative accuracy gain over the base, MRT against outcome RL": "2 to 3 times",
    "points gained by R1-Distill-Qwen-1.5B, mean of five benchmarks: GRPO, MRT": [1.1, 2.2],
    "tokens to the same accuracy, outcome RL over MRT": 1.5,
}

RECIPE = Recipe(
    slug="mrt",
    title="Optimizing Test-Time Compute via Meta Reinforcement Fine-Tuning",
    reference="Qu, Yang, Setlur, Tunstall, Beeching, Salakhutdinov and Kumar 2025, arXiv 2503.07572",
    step="assign",
    summary=(
        "A long thought is a series of episodes. Each is paid for its progress: the change in the chance that the model, "
        "made to stop and answer, would be right. That lowers the regret over tokens and carries to larger budgets."
    ),
    claims=(
        "regret over the token budget is lower than with outcome RL, at every budget up to twice the training one",
        "the same accuracy takes fewer tokens",
        "a length penalty does not do the same at large budgets",
    ),
    parts=(
        "guerdon.credit.split_episodes",
        "guerdon.credit.progress_bonus",
        "guerdon.credit.normalized_regret",
        "guerdon.search.MetaProver",
        "guerdon.shaping.ProgressShapedReward",
        "guerdon.training.mrt.MrtTrainer",
        "guerdon.training.rules.termination.TerminationRelative",
        "guerdon.environments.continued.Continued",
    ),
    reproduce=reproduce,
    paper_numbers=PAPER,
    seeds=5,
)
