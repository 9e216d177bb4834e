"""Noisy rewards and the reasoning pattern reward (arXiv 2505.22653): how wrong may a reward be, and what needs no key?

Testbed: chains of four additions and subtractions, answered in a box. The base policy can reason and seldom
does: in 80% of its corpus it guesses at once (wrong nine times in ten, which is chance), in 20% it works step by step,
rightly, with marker words ("first, ", "therefore "). The weak base has only the guesses. The noisy reward model is a
logistic regression on character n-grams of few graded solutions. Run it with ``guerdon reproduce noisy-rewards-rpr``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.environments.arithmetic import MARKERS, Spec, Style, check, make_tasks
from guerdon.papers._arms import column, measure, one_thread, run_arms, train
from guerdon.papers.evidence import Claim, Result, Timer, environment, paired_claim, require_scale, statistic_claim
from guerdon.papers.recipe import Recipe
from guerdon.rewards import BoxedMatch, PhraseReward, Reward, extract_answer
from guerdon.shaping import CalibrateLow, FlipScores
from guerdon.training.arithmetic import solve, warm_start
from guerdon.types import Score, Trajectory, policy_text

MAX_TOKENS = 56
SPEC = Spec((4, 4), high=10, operand=5)
SIZES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {"examples": 200, "sft": 3, "steps": 2, "prompts": 2, "tasks": 20, "test": 10, "graded": 10},
    "cpu": {"examples": 20_000, "sft": 700, "steps": 80, "prompts": 64, "tasks": 2500, "test": 200, "graded": 60},
    "gpu": {"examples": 40_000, "sft": 1500, "steps": 150, "prompts": 64, "tasks": 5000, "test": 500, "graded": 60},
}
ARMS = ("base", "p = 0", "p = 0.2", "p = 0.4", "p = 0.5", "pattern reward alone", "random", "noisy model",
        "noisy model, calibrated", "weak base", "weak, pattern reward alone")  # fmt: skip


def pattern(**settings: Any) -> PhraseReward:
    """The pattern reward with the testbed's markers: half of them earn it in full."""
    return PhraseReward(MARKERS, len(MARKERS) / 2, **settings)


class Coin(Reward):
    """1 or 0 by chance: the control whose reward says nothing."""

    def __init__(self, seed: int) -> None:
        super().__init__(name="coin")
        self._rng = np.random.default_rng(seed)

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        return [Score(float(x)) for x in self._rng.integers(0, 2, len(trajectories))]


class NgramModel(Reward):
    """A weak learned reward: logistic regression on character n-grams of a response, in [0, 1].

    Args:
        policy: whose solutions are graded.
        size: solutions graded.
        tasks: what they solve.

    Attributes:
        pairwise: how often it puts a right above a wrong solution of the same task, on solutions it has not seen.
    """

    range = (0.0, 1.0)

    def __init__(self, policy: Any, size: int, tasks: Sequence[Any]) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.linear_model import LogisticRegression

        super().__init__(name="ngram_model")
        self._features = HashingVectorizer(analyzer="char", ngram_range=(1, 3), n_features=4096, norm=None, binary=True)
        groups = solve(policy, tasks, group_size=8, max_tokens=MAX_TOKENS, seed=7)
        rollouts = [t for g in groups for t in g.trajectories]
        right = np.array([s.value for s in BoxedMatch()(rollouts)])
        some = np.random.default_rng(0).permutation(len(rollouts) // 2)[:size]
        if len(set(right[some])) < 2:  # a smoke run's policy gets nothing right
            right[some[0]] = 1 - right[some[0]]
        self._model = LogisticRegression(C=0.03, max_iter=500).fit(self._read(rollouts[k] for k in some), right[some])
        score = np.array(self._probabilities(rollouts))
        wins = [
            float(score[i] > score[j]) + 0.5 * float(score[i] == score[j])
            for g in range(len(groups) // 2, len(groups))
            for i in range(8 * g, 8 * g + 8)
            for j in range(8 * g, 8 * g + 8)
            if right[i] > right[j]
        ]
        self.pairwise = float(np.mean(wins)) if wins else 0.5

    def _read(self, rollouts: Any) -> Any:
        return self._features.transform([policy_text(t) for t in rollouts])

    def _probabilities(self, rollouts: Sequence[Trajectory]) -> list[float]:
        return self._model.predict_proba(self._read(rollouts))[:, 1].tolist() if rollouts else []

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """A response without an answer gets 0."""
        found = [float(bool(extract_answer(policy_text(t)))) for t in trajectories]
        values = zip(self._probabilities(trajectories), found, strict=True)
        return [Score(p * valid, parts={"extracted": valid}) for p, valid in values]


def base_policy(scale: str, out: Path, *, weak: bool) -> Any:
    """The policy that arms start from."""
    # With 0.9 wrong a right guess is no likelier than any other number, greedily as well.
    guess = Style(steps=False, error=0.9, answer="boxed")
    mix = {guess: 1.0} if weak else {guess: 0.8, Style(markers=0.8, answer="boxed"): 0.2}
    size = SIZES[scale]
    return warm_start(mix, spec=SPEC, folder=out / "warm", examples=size["examples"], steps=size["sft"])


def parts_of(arm: str, seed: int, model: NgramModel) -> dict[str, Any]:
    """Reward and shape of an arm."""
    if arm.startswith("p = "):
        return {"reward": BoxedMatch(), "shape": FlipScores(float(arm[4:]), seed)}
    if arm.startswith("noisy"):
        shape = CalibrateLow(pattern()).scores if "calibrated" in arm else None
        return {"reward": model, "shape": shape}
    return {"reward": Coin(seed) if arm == "random" else pattern(answer="boxed")}


def rate(trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
    """What is measured of each held-out response."""
    return {
        "right": [s.value for s in BoxedMatch()(trajectories)],
        "pattern": [s.value for s in pattern()(trajectories)],
        "steps": [float(check(t.task, policy_text(t)).steps) for t in trajectories],
        "length": [float(len(t)) for t in trajectories],
    }


def run(scale: str, out: Path, model: NgramModel, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm and measure it: greedy on held-out chains, at the end and at its peak."""
    size = SIZES[scale]
    policy = base_policy(scale, out, weak=arm.startswith("weak"))
    test = make_tasks(size["test"], "test", spec=SPEC, seed=0)
    greedy = partial(measure, policy, test, rate, samples=1, max_tokens=MAX_TOKENS, seed=seed, temperature=0.0)
    peeks: list[dict[str, list[float]]] = []
    if not arm.endswith("base"):
        every = max(1, size["steps"] // 4)
        settings = {
            "steps": size["steps"],
            "prompts_per_step": size["prompts"],
            "group_size": 4,
            "max_tokens": MAX_TOKENS,
            "optimiser": {"lr": 3e-4, "schedule": "linear"},
            "seed": seed,
            "eval_every": every,
        }

        def peek(trainer: Any) -> dict[str, float]:
            peeks.append(greedy())
            return {}

        tasks = make_tasks(size["tasks"], spec=SPEC, seed=seed)
        train(policy, tasks, settings=settings, evaluate=peek, **parts_of(arm, seed, model))
    last = greedy()
    sampled = measure(policy, test, rate, samples=2, max_tokens=MAX_TOKENS, seed=seed)
    best = max([*peeks, last], key=lambda row: float(np.mean(row["right"])))
    return {"last": last, "peak": best, "sampled": sampled, "course": [float(np.mean(row["right"])) for row in peeks]}


def reproduce(scale: str, seeds: Sequence[int], out: Path) -> Result:
    """Train every arm from the two base policies for every seed, and test the claims."""
    scale, out = require_scale(scale), Path(out)
    size = SIZES[scale]
    with one_thread():
        timer = Timer()
        graded = make_tasks(max(20, size["graded"]), "validation", spec=SPEC, seed=5)
        model = NgramModel(base_policy(scale, out, weak=False), size["graded"], graded)
        prepared = timer()
        results = run_arms(out, ARMS, seeds, partial(run, scale, out, model))
    claims = judge(results, seeds, asserted=scale != "smoke")
    measured: dict[str, Any] = {
        arm: {k: float(column(results, arm, seeds, "last", k).mean()) for k in ("right", "pattern", "steps", "length")}
        | {"peak": float(column(results, arm, seeds, "peak", "right").mean())}
        | {f"sampled {k}": float(column(results, arm, seeds, "sampled", k).mean()) for k in ("right", "steps")}
        for arm in ARMS
    }
    measured["pairwise accuracy of the noisy model"] = model.pairwise
    seconds = prepared + sum(row["seconds"] for row in results.values())
    return Result("noisy-rewards-rpr", scale, tuple(seeds), tuple(claims), PAPER, measured, environment(), seconds,
                  notes=NOTES)  # fmt: skip


def judge(results: Mapping[tuple[str, int], Any], seeds: Sequence[int], *, asserted: bool) -> list[Claim]:
    """The claims; accuracy is greedy, on the same held-out chains for every arm."""
    acc = {arm: column(results, arm, seeds, "last", "right") for arm in ARMS}
    peak = {arm: column(results, arm, seeds, "peak", "right") for arm in ARMS}
    alone, weak = "pattern reward alone", "weak, pattern reward alone"
    options: dict[str, Any] = {"asserted": asserted}
    return [
        statistic_claim("1a-robust", "with 40% of the groups flipped, accuracy is at least 0.9 times that without flips", [acc["p = 0.4"], acc["p = 0"]], lambda a, b: a - 0.9 * b, **options),
        paired_claim("1b-learns", "with 40% flipped, accuracy rises above the base", acc["p = 0.4"], acc["base"], **options),
        paired_claim("2a-half-is-nothing", "with 50% flipped, accuracy stays below that with 40%", acc["p = 0.4"], acc["p = 0.5"], **options),
        statistic_claim("3a-pattern-alone", "the pattern reward alone peaks at 0.9 times the accuracy of clean rewards", [peak[alone], acc["p = 0"]], lambda a, b: a - 0.9 * b, **options),
        paired_claim("3b-not-any-reward", "a random reward does not do that", peak[alone], acc["random"], **options),
        paired_claim("4-calibration", "the noisy reward model with the pattern bonus ends above the same model without", acc["noisy model, calibrated"], acc["noisy model"], **options),
        statistic_claim("5-weak-base", "on a base that can't reason the pattern reward gains under half of that on one that can", [acc[alone], acc["base"], acc[weak], acc["weak base"]], lambda a, b, wa, wb: 0.5 * (a - b) - (wa - wb), **options),
    ]  # fmt: skip


NOTES = (
    "accuracy is greedy on held-out chains; the peak is over four readings in the course of training. With 40% of the "
    "groups flipped a fifth of the signal is left and all of the noise, so that it takes many prompts a step. Tried before "
    "on 16 prompts of 8 samples, 50 steps, a KL penalty of 0.05 (the paper has none) and a base whose guesses were right "
    "four times in ten: 0.42 against 0.98 with clean rewards. Learning rates 2e-4 (too little moves), 3e-4, 5e-4 and 1e-3 "
    "(the 40% arm sinks below its base) were compared on other seeds; the clean arm ended at 1.0 under all but 3e-4, where it was not run"
)

PAPER = {
    "MATH-500, Qwen2.5-7B: clean, 40% flipped, 50% flipped": [75.85, 72.02, "collapse"],
    "MATH-500, pattern reward alone": "over 70, against about 75 with clean rewards",
    "reward model of 65% accuracy with the pattern bonus": "clearly above the same model alone",
}

RECIPE = Recipe(
    slug="noisy-rewards-rpr",
    title="The Climb Carves Wisdom Deeper Than the Summit: On the Noisy Rewards in Learning to Reason",
    reference="Lv, Xie, Sun, Kang and Yan, 2025, arXiv 2505.22653",
    step="score",
    summary=(
        "Flipping the outcome of four in ten prompt groups hardly hurts a policy that can reason already; a reward for "
        "reasoning phrases that never looks at the answer does nearly as well as a verifier; and a little of it repairs "
        "what a weak reward model scores too low."
    ),
    claims=(
        "40% of flipped groups cost little, 50% end learning",
        "rewarding reasoning phrases alone comes near the accuracy of a clean reward, on a base that can reason",
        "a phrase bonus on low scores improves training on a weak reward model",
    ),
    parts=(
        "guerdon.rewards.PhraseReward",
        "guerdon.shaping.GroupFlip",
        "guerdon.shaping.FlipScores",
        "guerdon.shaping.CalibrateLow",
        "guerdon.shaping.Fallback",
        "guerdon.rewards.RepetitionRatio",
    ),
    reproduce=reproduce,
    paper_numbers=PAPER,
    needs=("routers",),
)
