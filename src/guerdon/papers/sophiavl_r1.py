"""SophiaVL-R1's Trust-GRPO (arXiv 2505.17018): a judge of the reasoning that is wrong on some prompts, made safe to use.

Testbed: chains of two additions and subtractions as multiple-choice questions, so that one answer in four is right by
luck. The base policy's corpus is half right solutions, a quarter with a wrong line, a quarter with lines left out; the
latter two are full of marker words. The judge is asked as a language model would be. On half of the prompts it is
honest; on the other half (chosen by a hash) it rewards markers and length and ignores the truth. What is wanted, and
never rewarded, is the share of lines that are right, and accuracy on open questions.
Run it with ``guerdon reproduce sophiavl-r1``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.environments.arithmetic import ChainCorrect, Spec, Style, check, make_tasks
from guerdon.papers._arms import column, measure, one_thread, run_arms, train
from guerdon.papers.evidence import Claim, Result, environment, paired_claim, require_scale
from guerdon.papers.recipe import Recipe
from guerdon.reward_models import JudgeRewardModel
from guerdon.rollout import derive_seed
from guerdon.shaping import TrustCombine, TrustScores
from guerdon.training.arithmetic import warm_start
from guerdon.types import Score, Task, Trajectory, policy_text

MAX_TOKENS = 40
SPEC = Spec((2, 2), high=15, operand=7, choices=4)
OPEN = replace(SPEC, choices=0)
SIZES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {"examples": 200, "sft": 3, "steps": 2, "prompts": 2, "tasks": 20, "test": 10},
    "cpu": {"examples": 12_000, "sft": 400, "steps": 50, "prompts": 16, "tasks": 600, "test": 200},
    "gpu": {"examples": 40_000, "sft": 1500, "steps": 200, "prompts": 32, "tasks": 1500, "test": 500},
}
ARMS = ("outcome", "plain sum", "annealing", "trust", "full")


def questions(n: int, split: str, seed: int) -> list[Task]:
    """Multiple-choice questions whose options stand in the order of their remainder by 4.

    So the letter of a value can be learned by heart: looking it up among the options is beyond a policy of this size.
    """
    out = []
    for task in make_tasks(n, split, spec=OPEN, seed=seed):  # type: ignore[arg-type]
        chain = task.meta["chain"]
        near = sorted(range(SPEC.high + 1), key=lambda v: abs(v - chain.answer))
        options = {letter: next(v for v in near if v % 4 == k) for k, letter in enumerate("ABCD")}
        text = str(chain) + "".join(f" {letter}:{v}" for letter, v in options.items())
        letter = "ABCD"[chain.answer % 4]
        out.append(Task(f"choice/{chain}", text, letter, {**task.meta, "choices": options}))
    return out


def corrupted(question: str) -> bool:
    """Whether the judge is dishonest about this question."""
    return derive_seed("judge", question) % 2 == 1


def simulated_judge(prompts: Sequence[str]) -> list[str]:
    """Replies of a judge that is honest on some questions and likes markers on the others; noisy on all."""
    replies = []
    for prompt in prompts:
        found = re.fullmatch(r"Question: (.*?)\nReasoning:\n(.*)", prompt, re.DOTALL)
        assert found is not None
        question, solution = found.groups()
        report = check(question.split(" ")[0], solution)
        noise = np.random.default_rng(derive_seed("noise", prompt)).normal(0, 0.1)
        if corrupted(question):
            score = 0.3 * report.markers + 0.05 * len(report.lines)
        else:
            score = 0.6 * report.share_right + 0.2
        replies.append(f"<answer>{min(1.0, max(0.0, score + noise)):.2f}</answer>")
    return replies


class Watched:
    """The shape of an arm, with a record of the trust weights of groups that hold right and wrong samples."""

    def __init__(self, shape: TrustScores) -> None:
        self._shape = shape
        self.gamma: dict[bool, list[float]] = {True: [], False: []}

    def __call__(self, trajectories: Sequence[Trajectory], scores: Sequence[Score]) -> list[Score]:
        """Shape a step's scores."""
        shaped = self._shape(trajectories, scores)
        groups: dict[str, list[int]] = {}
        for k, trajectory in enumerate(trajectories):
            groups.setdefault(trajectory.task.id, []).append(k)
        for members in groups.values():
            if len({scores[k].value for k in members}) > 1:
                first = members[0]
                self.gamma[corrupted(trajectories[first].task.question)].append(shaped[first].parts["gamma"])
        return shaped


def shape_of(arm: str, steps: int) -> Watched | None:
    """Trust and annealing of an arm; the plain sum asks the judge about every sample."""
    if arm in ("base", "outcome"):
        return None
    judge = JudgeRewardModel(simulated_judge, "Question: {question}\nReasoning:\n{response}", read=str)
    combine = TrustCombine(
        anneal="exp" if arm in ("annealing", "full") else None,
        T=steps,
        trust=arm in ("trust", "full"),
        skip_uniform=(0.1, 0.9) if arm == "full" else None,
    )
    return Watched(TrustScores(judge, combine))


def base_policy(scale: str, out: Path) -> Any:
    """The policy that every arm starts from; it has seen open and multiple-choice questions."""
    size = SIZES[scale]
    mix = {
        Style(markers=0.1): 0.5,
        Style(wrong_lines=1, lucky=0.25, markers=0.5): 0.25,
        Style(skip=0.5, markers=0.5): 0.25,
    }
    n = 40 if scale == "smoke" else 700
    tasks = [*questions(n, "train", 1), *make_tasks(n, spec=OPEN, seed=2)]
    return warm_start(mix, spec=SPEC, tasks=tasks, folder=out / "warm", examples=size["examples"], steps=size["sft"])


def rate(trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
    """What is measured of each held-out response."""
    reports = [check(t.task, policy_text(t)) for t in trajectories]
    return {
        "right": [float(r.right) for r in reports],
        "quality": [r.share_right for r in reports],
        "markers": [float(r.markers) for r in reports],
        "lines": [float(len(r.lines)) for r in reports],
    }


def run(scale: str, out: Path, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm on multiple-choice questions and measure it on held-out ones and on open ones."""
    size = SIZES[scale]
    policy, shape = base_policy(scale, out), shape_of(arm, size["steps"])
    if arm != "base":
        settings = {
            "steps": size["steps"],
            "prompts_per_step": size["prompts"],
            "group_size": 8,
            "max_tokens": MAX_TOKENS,
            "optimiser": {"lr": 3e-4, "schedule": "linear"},
            "kl_coef": 0.01,
            "seed": seed,
        }
        train(policy, questions(size["tasks"], "train", seed), ChainCorrect(), settings=settings, shape=shape)
    row: dict[str, Any] = {"gamma": {}}
    if shape is not None:
        row["gamma"] = {
            name: float(np.mean(shape.gamma[k] or [1.0])) for name, k in (("honest", False), ("corrupted", True))
        }
    held = partial(measure, policy, samples=4, max_tokens=MAX_TOKENS, seed=seed)
    row["choice"] = held(questions(size["test"], "test", 0), rate)
    row["open"] = held(make_tasks(size["test"], "test", spec=OPEN, seed=0), rate)
    return row


def reproduce(scale: str, seeds: Sequence[int], out: Path) -> Result:
    """Train every arm from the shared base policy for every seed, and test the claims."""
    scale, out = require_scale(scale), Path(out)
    with one_thread():
        results = run_arms(out, ("base", *ARMS), seeds, partial(run, scale, out))
    claims = judge(results, seeds, asserted=scale != "smoke")
    measured: dict[str, Any] = {
        arm: {
            f"{where} {key}": float(column(results, arm, seeds, where, key).mean())
            for where in ("choice", "open")
            for key in ("right", "quality", "markers", "lines")
        }
        for arm in ("base", *ARMS)
    }
    for arm in ARMS[1:]:
        measured[arm]["gamma"] = {
            k: float(column(results, arm, seeds, "gamma", k).mean()) for k in ("honest", "corrupted")
        }
    seconds = sum(row["seconds"] for row in results.values())
    return Result(
        "sophiavl-r1", scale, tuple(seeds), tuple(claims), PAPER, measured, environment(), seconds, notes=NOTES
    )


def judge(results: Mapping[tuple[str, int], Any], seeds: Sequence[int], *, asserted: bool) -> list[Claim]:
    """The claims; samples at temperature 1 of the same held-out questions for every arm."""

    def of(arm: str, *path: str) -> np.ndarray:
        return column(results, arm, seeds, *path)

    options: dict[str, Any] = {"asserted": asserted}
    return [
        paired_claim("1-doubt", "the trust weight is lower on prompts whose judge is corrupted", of("full", "gamma", "honest"), of("full", "gamma", "corrupted"), **options),
        paired_claim("2-process", "with trust and annealing more lines are right than with the outcome alone", of("full", "choice", "quality"), of("outcome", "choice", "quality"), **options),
        paired_claim("3-accuracy", "and open questions are answered at least as well as under the plain sum (within 0.01)", of("full", "open", "right"), of("plain sum", "open", "right"), margin=-0.01, **options),
        paired_claim("4-hacking", "and the judge is flattered less: fewer marker words than under the plain sum", of("plain sum", "choice", "markers"), of("full", "choice", "markers"), **options),
    ]  # fmt: skip


NOTES = "four samples of each held-out question at temperature 1; trust weights are means over groups with right and wrong samples"

PAPER = {
    "MathVista, MathVerse, MMMU, MMStar: no trust and no annealing": [67.4, 46.3, 56.7, 65.0],
    "no trust": [70.2, 47.8, 60.0, 65.2],
    "full": [71.3, 48.9, 61.3, 66.7],
    "GRPO alone (MathVista, MathVerse, MMMU, MMStar not given)": [69.9, 45.3, 58.0],
}

RECIPE = Recipe(
    slug="sophiavl-r1",
    title="SophiaVL-R1: Reinforcing MLLMs Reasoning with Thinking Reward",
    reference="Fan, Feng, Lyu, Zhou and Yue, 2025, arXiv 2505.17018",
    step="shape",
    summary=(
        "A judge's score of the whole reasoning is added to a verifiable outcome. It is weighted, prompt by prompt, by how "
        "far it agrees with the outcome within the group (a free trust weight), and faded out over training."
    ),
    claims=(
        "the trust weight finds the prompts on which the judge is wrong",
        "reasoning gets better than with the outcome alone",
        "a partly corrupted judge is hacked less than when its score is simply added",
    ),
    parts=(
        "guerdon.shaping.trust_weight",
        "guerdon.shaping.TrustCombine",
        "guerdon.shaping.TrustScores",
        "guerdon.reward_models.JudgeRewardModel",
        "guerdon.reward_models.balanced_bins",
        "guerdon.rewards.TypedOutcome",
    ),
    reproduce=reproduce,
    paper_numbers=PAPER,
)
