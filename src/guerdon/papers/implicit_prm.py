"""Free process rewards without process labels (arXiv 2412.01981): does a log-ratio trained on outcomes know the steps?

Testbed: chains of two to four sums, one line a step, by a policy of 0.13 million parameters that is right in about half
of its solutions. The implicit model is trained on whether final answers are right; what it says about single lines is
then held against the exact checker, which it never saw. Run it with ``guerdon reproduce implicit-prm``.

Two things differ from the paper, and why. (1) The policy has wrong habits (:class:`Habits`): with scripts that go wrong
at random, or a warm start cut short, its own least likely line was the wrong one in 78 to 98% of wrong solutions, which
leaves nothing to learn; real models believe their errors. (2) beta is 0.5, not 0.05: a right response can gain at most
``-beta log ref(y)``, and a solution here has 2 nats of choice in 20 tokens where the paper's have hundreds. With 0.05
the same training reranked worse (best of eight 0.65 against 0.71 in a first trial), with 1 no better.

The outcome classifier comes in two forms, a label at the response's end or the same label at every line (read at the
last one); the claim is against the better.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.papers.evidence import Claim, Result, environment, paired_claim, require_scale
from guerdon.papers.recipe import Recipe

if TYPE_CHECKING:
    from guerdon.policies import Policy
    from guerdon.types import Trajectory

SIZES: Mapping[str, Mapping[str, int]] = {
    "smoke": {"scripts": 200, "sft": 20, "prompts": 20, "test": 12, "group": 4, "hidden": 32},
    "cpu": {"scripts": 8000, "sft": 600, "prompts": 500, "test": 250, "group": 8, "hidden": 64},
    "gpu": {"scripts": 20_000, "sft": 2500, "prompts": 4000, "test": 1000, "group": 8, "hidden": 256},
}
"""Scripts and steps of the warm start; prompts of training and test, solutions of each; width of the policy."""

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "implicit": {"lr": 3e-4, "epochs": 2},
    "one response a prompt": {"lr": 3e-4, "epochs": 8},
    "classifier": {"lr": 1e-3, "epochs": 2},
}
"""Chosen on other chains, the classifier's over as many tries as the implicit model's."""
BETA = 0.5


def reproduce(scale: str, seeds: Sequence[int], out: Path) -> Result:
    """One warm start; for every seed new chains, new solutions, new scorers.

    Args:
        scale: ``smoke``, ``cpu`` or ``gpu``.
        seeds: of chains, sampling, and the order of training.
        out: run folder; nothing but the result is kept there.
    """
    started = time.perf_counter()
    size = SIZES[require_scale(scale)]
    asserted = scale != "smoke"
    policy = solver(size)
    rows = [measure(policy, size, seed) for seed in seeds]
    claims = [proposition(asserted), *judge(rows, asserted)]
    keys = [k for k in rows[0] if not isinstance(rows[0][k], np.ndarray)]
    measured = {k: [row[k] for row in rows] for k in keys}
    return Result(
        "implicit-prm", require_scale(scale), tuple(seeds), tuple(claims), PAPER, measured, environment(),
        time.perf_counter() - started,
        notes="one warm start; a seed draws chains, solutions and training order; intervals over seeds and items",
    )  # fmt: skip


def solver(size: Mapping[str, int]) -> Policy:
    """A policy with wrong habits, right in about half of its solutions."""
    from guerdon.environments.arithmetic import Habits, make_tasks
    from guerdon.training import SftConfig, SftTrainer
    from guerdon.training.arithmetic import arithmetic_policy

    policy = arithmetic_policy(spec(), hidden=size["hidden"])
    data = Habits().scripts(policy, make_tasks(size["scripts"], "train", spec=spec(), seed=9))
    optimiser = {"lr": 4e-3, "schedule": "cosine", "warmup": min(20, size["sft"] - 1), "final": 0.05}
    SftTrainer(policy, data, SftConfig(steps=size["sft"], batch_size=64, optimiser=optimiser)).fit()  # type: ignore[arg-type]
    policy.model.eval()
    return policy


def spec() -> Any:
    """Chains of two to four operations in 0 .. 20."""
    from guerdon.environments.arithmetic import Spec

    return Spec(operations=(2, 4), high=20, operand=9)


def sample(policy: Policy, split: Any, n: int, group: int, seed: int) -> tuple[list[Trajectory], np.ndarray]:
    """Solutions of ``n`` new chains, and whether their answers are right ``[n * group]``."""
    from guerdon.environments.arithmetic import ChainCorrect, make_tasks
    from guerdon.training.arithmetic import solve

    tasks = make_tasks(n, split, spec=spec(), seed=seed)
    groups = solve(policy, tasks, group_size=group, max_tokens=64, seed=seed)
    trajectories = [t for g in groups for t in g.trajectories]
    return trajectories, np.array([s.value for s in ChainCorrect()(trajectories)])


def measure(policy: Policy, size: Mapping[str, int], seed: int) -> dict[str, Any]:
    """Train the scorers of one seed and hold them against the gold labels of new solutions."""
    from guerdon.environments.arithmetic import LINES, check, first_slip
    from guerdon.reward_models import ImplicitPRM, StepClassifier, weighted_vote
    from guerdon.reward_models.logratio import Responses, logprobs
    from guerdon.types import Segmenter, step_spans

    group = size["group"]
    train, labels = sample(policy, "train", size["prompts"], group, 100 + seed)
    test, right = sample(policy, "test", size["test"], group, 200 + seed)
    prm = ImplicitPRM.from_policy(policy, beta=BETA, segmenter=LINES)
    prm.fit(train, labels=labels, seed=seed, **SETTINGS["implicit"])
    first = list(range(0, len(train), group))
    single = ImplicitPRM.from_policy(policy, beta=BETA, segmenter=LINES)
    single.fit([train[k] for k in first], labels=labels[first], seed=seed, **SETTINGS["one response a prompt"])
    outcome = {}
    for name, cut in (("classifier at the end", Segmenter("turns")), ("classifier at every line", LINES)):
        orm = StepClassifier.from_policy(policy, segmenter=cut, seed=seed)
        repeated = [[y] * len(step_spans(t, cut)) for t, y in zip(train, labels, strict=True)]
        orm.fit(train, repeated, seed=seed, batch_size=64, **SETTINGS["classifier"])
        outcome[name] = np.array([float(s[-1]) for s in orm.step_scores(test)])

    steps = [r.numpy() for r in prm.step_rewards(test)]
    cuts = [step_spans(t, LINES) for t in test]
    flat = Responses.from_trajectories(test)
    said = flat.split(logprobs(policy, flat, max_tokens=16_384))
    likely = [np.array([float(row[s.start : s.stop].sum()) for s in cut]) for row, cut in zip(said, cuts, strict=True)]
    reports = [check(t.task, t.turns[0].text) for t in test]
    slips = [first_slip(report) for report in reports]
    wrong = [k for k in range(len(test)) if not right[k] and slips[k] is not None and len(cuts[k]) > 1]
    correct = right.reshape(-1, group)

    def best(scores: Any) -> np.ndarray:
        """[prompts] whether the response of the highest score is right."""
        return correct[np.arange(len(correct)), np.asarray(scores).reshape(-1, group).argmax(1)]

    def found(rows: Sequence[np.ndarray]) -> np.ndarray:
        """[wrong solutions] whether the lowest step is the first wrong one."""
        return np.array([float(int(rows[k].argmin()) == slips[k]) for k in wrong])

    scores = {how: prm.score(test, reduce=how).numpy() for how in ("min", "sum", "mean")}  # type: ignore[arg-type]
    cumulative = prm.score(test, mode="cumulative").numpy()
    bare = prm.score(test, use_reference=False).numpy()
    answers = [report.answer for report in reports]
    votes = [
        weighted_vote(scores["sum"][k : k + group], answers[k : k + group]) == test[k].task.reference
        for k in range(0, len(test), group)
    ]
    arms = {
        "pass": correct.mean(1), "best": best(scores["min"]), "single": best(single.score(test).numpy()),
        **{name: best(values) for name, values in outcome.items()}, "likely": best([row.min() for row in likely]),
        "found": found(steps), "found_likely": found(likely),
        "found_random": np.array([1 / len(cuts[k]) for k in wrong]),
    }  # fmt: skip
    print(f"seed {seed}: " + ", ".join(f"{k} {v.mean():.3f}" for k, v in arms.items()), file=sys.stderr, flush=True)
    return arms | {
        "train_accuracy": float(labels.mean()),
        "wrong_solutions": len(wrong),
        "best_of_n": {k: float(arms[v].mean()) for k, v in {"min": "best", "likelihood": "likely", **{n: n for n in outcome}}.items()}
        | {k: float(best(scores[k]).mean()) for k in ("sum", "mean")}
        | {"cumulative min": float(best(cumulative).mean()), "without reference": float(best(bare).mean())}
        | {"weighted vote": float(np.mean(votes)), "one response a prompt": float(arms["single"].mean())}
        | {"pass@1": float(correct.mean()), "pass@n": float(correct.max(1).mean())},
        "auroc_of_wrong": {
            "implicit": auroc(-scores["min"], 1 - right), **{name: auroc(-values, 1 - right) for name, values in outcome.items()},
            "likelihood": auroc([-row.min() for row in likely], 1 - right),
        },
        "first_error": {k: float(arms[k].mean()) for k in ("found", "found_likely", "found_random")},
        "loss_at_the_end": float(np.mean(prm.report.losses[-20:])),  # type: ignore[union-attr]
    }  # fmt: skip


def judge(rows: Sequence[Mapping[str, Any]], asserted: bool) -> list[Claim]:
    """The claims, on items that all seeds have."""

    def arm(name: str) -> np.ndarray:
        n = min(len(row[name]) for row in rows)
        return np.array([row[name][:n] for row in rows])

    o: dict[str, Any] = {"asserted": asserted}
    orm = max(("classifier at the end", "classifier at every line"), key=lambda name: arm(name).mean())
    return [
        paired_claim("b1-location-random", "the lowest step reward marks the first wrong step more often than a random step does", arm("found"), arm("found_random"), **o),
        paired_claim("b2-location-likelihood", "and more often than the policy's least likely step does", arm("found"), arm("found_likely"), **o),
        paired_claim("c1-best-of-n", "the response of the highest score is right more often than a random one", arm("best"), arm("pass"), **o),
        paired_claim("c2-classifier", f"best-of-n is at least that of the better outcome classifier trained on the same labels ({orm}), minus 0.02", arm("best"), arm(orm), margin=-0.02, **o),
        paired_claim("e-one-response", "with one labelled response a prompt, best-of-n still beats a random response", arm("single"), arm("pass"), **o),
    ]  # fmt: skip


def proposition(asserted: bool) -> Claim:
    """Prefix values against a sum over all continuations, for two language models of two words and three positions."""
    import torch

    from guerdon.credit import implicit_rewards, prefix_values

    rng = np.random.default_rng(0)
    everything = list(itertools.product((0, 1), repeat=3))
    prefixes = [y[:t] for t in range(3) for y in everything]

    def model() -> torch.Tensor:
        logits = {p: rng.normal(size=2) * 2 for p in prefixes}
        table = {p: v - np.log(np.exp(v).sum()) for p, v in logits.items()}
        return torch.tensor([[table[y[:t]][y[t]] for t in range(3)] for y in everything], dtype=torch.float64)

    worst = 0.0
    for beta in (0.05, 1.0):
        logp, ref = model(), model()
        rewards = implicit_rewards(logp, ref, torch.ones(8, 3), beta)
        q = prefix_values(rewards, torch.ones(8, 3))
        for b, y in enumerate(everything):
            for t in range(3):
                same = [k for k, z in enumerate(everything) if z[: t + 1] == y[: t + 1]]
                mean = sum(math.exp(float(ref[k, t + 1 :].sum() + rewards[k].sum() / beta)) for k in same)
                worst = max(worst, abs(float(q[b, t]) - beta * math.log(mean)))
    return Claim(
        "d-proposition", "prefix values equal the soft expectation of the outcome over continuations, within 1e-6",
        worst, worst, worst, 0.0 if worst < 1e-6 else 1.0, worst < 1e-6 if asserted else None,
    )  # fmt: skip


def auroc(scores: Any, labels: Any) -> float:
    """The chance that a positive scores above a negative, ties counting half; NaN where one kind is missing."""
    from scipy.stats import rankdata

    y = np.asarray(labels)
    n = y.sum()
    if n in (0, len(y)):
        return math.nan
    return float((rankdata(np.asarray(scores))[y == 1].sum() - n * (n + 1) / 2) / (n * (len(y) - n)))


PAPER = {
    "MATH500 best-of-N, three generators": "better than a Math-Shepherd-style PRM on the same data",
    "overhead of data collection and training": "less than 1/38 of that PRM's",
}

RECIPE = Recipe(
    slug="implicit-prm",
    title="Free Process Rewards without Process Labels",
    reference="Yuan, Li, Chen, Cui, Ding, Zhang, Zhou, Liu and Peng, 2024, arXiv 2412.01981",
    step="score",
    summary=(
        "An outcome reward model whose reward is a log-likelihood ratio to its own initial checkpoint. Its partial sums "
        "are values of prefixes, so that rewards of steps and tokens come free of step labels."
    ),
    claims=(
        "the partial sums of the log-ratio are a soft expectation of the outcome from the prefix",
        "trained on outcomes alone it finds the first wrong step",
        "it reranks at least as well as an outcome classifier on the same labels",
        "with cross entropy one response a prompt is enough to improve on the generator",
    ),
    parts=(
        "guerdon.credit.implicit_rewards",
        "guerdon.credit.prefix_values",
        "guerdon.objectives.implicit_ce",
        "guerdon.objectives.implicit_dpo",
        "guerdon.objectives.implicit_kto",
        "guerdon.objectives.implicit_nca",
        "guerdon.reward_models.ImplicitPRM",
        "guerdon.reward_models.weighted_vote",
        "guerdon.reward_models.fit_threshold",
    ),
    reproduce=reproduce,
    paper_numbers=PAPER,
    seeds=3,
)
