"""Surrogate signals from format and length (arXiv 2505.19439): how far does RL get without any answer key?

Testbed: chains of four additions and subtractions. The base policy knows how to solve them and seldom does: its corpus
is a quarter right worked solutions in a box, a quarter without a box, a quarter guesses (half in a box, half in a
malformed one), and the rest rambling into the token limit or worked solutions in a malformed box. The weak base has the
same corpus with wrong lines throughout. A worked solution takes half of the budget of 56 tokens.
Run it with ``guerdon reproduce format-length-surrogate``.

Accuracy is that of sampled responses: the base's greedy response is already a worked one. All arms are held near the
base by the same KL penalty: no reward here but the key pays for right sums, and without it a policy of a tenth of a
million parameters forgets them (tried: learning rate 3e-4 with no penalty and with 0.05, chains of unequal length, and
guesses that are always boxed, which make guessing the better formatted habit).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.environments.arithmetic import Spec, Style, make_tasks
from guerdon.evaluation import pass_at_k
from guerdon.papers._arms import column, measure, one_thread, run_arms, train
from guerdon.papers.evidence import Claim, Result, environment, paired_claim, require_scale, statistic_claim
from guerdon.papers.recipe import Recipe
from guerdon.rewards import BoxedFormat, BoxedMatch, HumpLength, LinearLength, Reward, format_length
from guerdon.training.arithmetic import warm_start
from guerdon.types import Score, Trajectory

BUDGET = 56
SPEC = Spec((4, 4), high=10, operand=5)
SIZES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {"examples": 200, "sft": 3, "steps": 2, "early": 1, "prompts": 4, "tasks": 20, "test": 10, "many": 2},
    "cpu": {"examples": 20_000, "sft": 1000, "steps": 40, "early": 10, "prompts": 12, "tasks": 600, "test": 200, "many": 32},
    "gpu": {"examples": 40_000, "sft": 1500, "steps": 120, "early": 15, "prompts": 64, "tasks": 5000, "test": 500, "many": 64},
}  # fmt: skip


class Coin(Reward):
    """1 or 0 by chance: the control whose reward says nothing."""

    def __init__(self, seed: int) -> None:
        super().__init__(name="coin")
        self._rng = np.random.default_rng(seed)

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        return [Score(float(x)) for x in self._rng.integers(0, 2, len(trajectories))]


def reward_of(arm: str, seed: int) -> Reward:
    """The reward of an arm; :class:`~guerdon.rewards.BoxedMatch` alone sees the key."""
    return {
        "correctness": BoxedMatch,
        "format": BoxedFormat,
        "format-length": partial(format_length, BUDGET),
        "polyline": partial(format_length, BUDGET, shape="polyline"),
        "linear length": lambda: BoxedMatch() + LinearLength(BUDGET),
        "length alone": partial(HumpLength, BUDGET),
        "random": partial(Coin, seed),
    }[arm.removeprefix("weak ")]()


ARMS = ("base", "correctness", "format", "format-length", "polyline", "linear length", "length alone", "random",
        "weak base", "weak format-length")  # fmt: skip


def warm(scale: str, out: Path, *, weak: bool) -> Any:
    """The base policy that all arms and seeds start from."""
    error = 0.9 if weak else 0.0  # a right line is then no likelier than any other: nothing to elicit
    mix = {
        Style(answer="boxed", error=error): 0.25,
        Style(answer="none", error=error): 0.25,
        Style(steps=False, error=0.6, answer="boxed"): 0.125,
        Style(steps=False, error=0.6, answer="malformed"): 0.125,
        Style(ramble=20): 0.15,
        Style(answer="malformed", error=error): 0.1,
    }
    size = SIZES[scale]
    return warm_start(
        mix, spec=SPEC, folder=out / "warm", examples=size["examples"], steps=size["sft"], max_tokens=BUDGET
    )


def rate(trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
    """What is measured of each held-out response."""
    return {
        "right": [s.value for s in BoxedMatch()(trajectories)],
        "format": [s.value for s in BoxedFormat()(trajectories)],
        "length": [float(len(t)) for t in trajectories],
        "truncated": [float(t.stop.truncated) for t in trajectories],
    }


def run(scale: str, out: Path, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm and measure it, early and at the end."""

    size = SIZES[scale]
    policy = warm(scale, out, weak=arm.startswith("weak"))
    tasks, test = make_tasks(size["tasks"], spec=SPEC, seed=seed), make_tasks(size["test"], "test", spec=SPEC, seed=0)
    settings = {
        "steps": size["steps"],
        "prompts_per_step": size["prompts"],
        "group_size": 8,
        "max_tokens": BUDGET,
        "optimiser": {"lr": 2e-4, "schedule": "linear"},
        "kl_coef": 0.1,
        "seed": seed,
    }
    held_out = partial(measure, policy, test, rate, max_tokens=BUDGET, seed=seed)
    row: dict[str, Any] = {"early": {}}
    if not arm.endswith("base"):
        early: dict[str, Any] = {}

        def peek(trainer: Any) -> dict[str, float]:
            if trainer.step == size["early"]:
                early.update(held_out(samples=4))
            return {}

        train(policy, tasks, reward_of(arm, seed), settings={**settings, "eval_every": size["early"]}, evaluate=peek)
        row["early"] = early
    row["greedy"] = held_out(samples=1, temperature=0.0)
    row["sampled"] = held_out(samples=4)
    few = test[: max(4, len(test) // 5)]
    many = measure(policy, few, rate, samples=size["many"], max_tokens=BUDGET, seed=seed)
    row["pass"] = [pass_at_k(size["many"], round(p * size["many"]), size["many"] // 2) for p in many["right"]]
    return row


def reproduce(scale: str, seeds: Sequence[int], out: Path) -> Result:
    """Train every arm from the shared warm starts for every seed, and test the claims."""
    scale, out = require_scale(scale), Path(out)
    with one_thread():
        results = run_arms(out, ARMS, seeds, partial(run, scale, out))
    claims = judge(results, seeds, asserted=scale != "smoke")
    measured = {
        arm: {f"{how} {k}": float(column(results, arm, seeds, how, k).mean()) for how in ("greedy", "sampled") for k in
              ("right", "format", "length", "truncated")} | {"pass": float(column(results, arm, seeds, "pass").mean())}
        for arm in ARMS
    }  # fmt: skip
    seconds = sum(row["seconds"] for row in results.values())
    return Result("format-length-surrogate", scale, tuple(seeds), tuple(claims), PAPER, measured, environment(), seconds,
                  notes=NOTES)  # fmt: skip


def judge(results: Mapping[tuple[str, int], Any], seeds: Sequence[int], *, asserted: bool) -> list[Claim]:
    """The claims; accuracy is that of sampled responses to the same held-out tasks for every arm."""
    acc = {arm: column(results, arm, seeds, "sampled", "right") for arm in ARMS}
    early = {a: column(results, a, seeds, "early", "right") for a in ("correctness", "format")}
    cut = {a: column(results, a, seeds, "sampled", "truncated") for a in ("linear length", "format-length")}
    solved = {a: column(results, a, seeds, "pass") for a in ("correctness", "format", "format-length")}
    options: dict[str, Any] = {"asserted": asserted}
    return [
        paired_claim("1-learns", "format and length raise accuracy over the base without a key", acc["format-length"], acc["base"], **options),
        paired_claim("2-beats-format", "format and length end above format alone", acc["format-length"], acc["format"], **options),
        statistic_claim("3-near-key", "format and length reach 0.9 times the accuracy of training on the key", [acc["format-length"], acc["correctness"]], lambda a, b: a - 0.9 * b, **options),
        paired_claim("4-linear-explodes", "a reward linear in length gets more responses cut off than the hump", cut["linear length"], cut["format-length"], **options),
        statistic_claim("5-format-first", "early on, format alone has 0.7 of the gain of the key", [early["format"], early["correctness"], acc["base"]], lambda f, c, b: (f - b) - 0.7 * (c - b), **options),
        statistic_claim("6-nothing-new", "pass@k after format and length is within 5 points of pass@k after the key", [solved["format-length"], solved["correctness"]], lambda a, b: 0.05 - np.abs(a - b), **options),
        statistic_claim("7-weak-base", "on a base that does not know, the gain is under a quarter of that on one that does", [acc["format-length"], acc["base"], acc["weak format-length"], acc["weak base"]], lambda a, b, wa, wb: 0.25 * (a - b) - (wa - wb), **options),
    ]  # fmt: skip


NOTES = (
    "accuracy is of four samples of each held-out chain; pass@k is estimated from 2k samples of a fifth of them, k = 16"
)

PAPER = {
    "average of AIME2024, MATH500, AMC2023, Qwen2.5-Math-7B: base, correctness, format, format-length": [36.6, 53.0, 51.6, 56.8],
    "format-length over correctness, other models": "92 to 107%",
    "linear length reward, truncated at step 54": 0.529,
    "average by turning point p": {"0.4": 56.5, "0.5": 56.8, "0.6": 55.4, "0.8": 57.4},
}  # fmt: skip

RECIPE = Recipe(
    slug="format-length-surrogate",
    title="Surrogate Signals from Format and Length: RL for Solving Mathematical Problems without Ground Truth Answers",
    reference="Xin, Liu, Wang, Zhang, Sui, Hu and Wang, 2025, arXiv 2505.19439",
    step="score",
    summary=(
        "Two signals that need no answer key: is there a final answer that parses, and is the response's length moderate "
        "for its budget. A policy that can solve the problems but seldom does learns to, nearly as well as with the key."
    ),
    claims=(
        "format and length without a key come near the accuracy of training on the key",
        "format alone gives most of the early gain, length the rest",
        "a reward linear in length makes responses grow until they are cut off",
        "nothing is learned that the base could not do",
    ),
    parts=(
        "guerdon.rewards.BoxedFormat",
        "guerdon.rewards.HumpLength",
        "guerdon.rewards.GatedSum",
        "guerdon.rewards.format_length",
        "guerdon.rewards.BoxedMatch",
        "guerdon.evaluation.pass_at_k",
    ),
    reproduce=reproduce,
    paper_numbers=PAPER,
)
