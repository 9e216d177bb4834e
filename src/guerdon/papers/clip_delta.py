"""Clip and Delta (arXiv 2410.15115): a process reward that is safe to add to the success reward, and one that is not.

Testbed: chains of three additions and subtractions, one line a step. The base policy's corpus has wrong lines, so that
it solves less than half of the chains, and in a fifth of it useless lines that are true ("check ok", "0+0=0"). The
process reward model is trained on the base policy's own solutions with gold labels of lines; a useless line is right,
so it scores high: that is the hole. All arms start from one base policy, use one alpha, and credit every step with its
return, normalised over all steps of the group. Run it with ``guerdon reproduce clip-delta``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.evaluation import filler_check
from guerdon.papers._arms import column, measure, one_thread, run_arms, train
from guerdon.papers.evidence import Claim, Result, Timer, environment, paired_claim, require_scale, statistic_claim
from guerdon.papers.recipe import Recipe
from guerdon.reward_models import ProcessReward
from guerdon.shaping import Compose, StepClip, StepDelta, StepNormalise, choose_eta
from guerdon.types import Segmenter, Trajectory, policy_text, step_spans

MAX_TOKENS = 48
SIZES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {"examples": 200, "sft": 3, "rollouts": 8, "epochs": 1, "steps": 2, "prompts": 2, "tasks": 20, "test": 10},
    "cpu": {"examples": 12_000, "sft": 400, "rollouts": 250, "epochs": 8, "steps": 50, "prompts": 12, "tasks": 600, "test": 200},
    "gpu": {"examples": 40_000, "sft": 1500, "rollouts": 1000, "epochs": 6, "steps": 200, "prompts": 32, "tasks": 5000, "test": 500},
}  # fmt: skip
ARMS = ("SR", "SR+PR", "SR+PR-normed", "SR+Clip", "SR+Delta", "SR+Clip+Delta", "SR+OR")


def spec() -> Any:
    from guerdon.environments.arithmetic import Spec

    return Spec((3, 3), high=10, operand=5)


def base_policy(scale: str, out: Path) -> Any:
    """The policy that every arm starts from."""
    from guerdon.environments.arithmetic import Style
    from guerdon.training.arithmetic import warm_start

    size = SIZES[scale]
    mix = {Style(error=0.2): 0.8, Style(error=0.2, filler=0.4): 0.2}
    return warm_start(mix, spec=spec(), folder=out / "warm", examples=size["examples"], steps=size["sft"])


class OnLastStep:
    """An outcome model as a step scorer: its score on the last step, 0 on the others."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def step_scores(self, trajectories: Sequence[Trajectory], segmenter: Segmenter) -> list[np.ndarray]:
        """One array per trajectory."""
        scored = self.model.step_scores(trajectories)
        counts = [len(step_spans(t, segmenter)) for t in trajectories]
        return [np.append(np.zeros(n - 1), float(row[-1])) for n, row in zip(counts, scored, strict=True)]


def reward_models(scale: str, out: Path) -> tuple[Any, Any, dict[str, float]]:
    """The process and the outcome model, trained on solutions of the base policy, and the numbers that follow.

    Returns:
        scorer of lines; scorer of whole solutions; ``eta`` (40% quantile of the base policy's step scores), ``alpha``
        (a solution's step scores are worth one success together), and the mean scores of right, wrong and filler lines.
    """
    from guerdon.environments.arithmetic import LINES, check, make_tasks
    from guerdon.reward_models import StepClassifier
    from guerdon.training.arithmetic import solve

    size, base = SIZES[scale], base_policy(scale, out)
    tasks = make_tasks(size["rollouts"], spec=spec(), seed=99)
    rollouts = [t for g in solve(base, tasks, group_size=8, max_tokens=MAX_TOKENS, seed=99) for t in g.trajectories]
    pairs = [(t, check(t.task, policy_text(t))) for t in rollouts]
    pairs = [(t, report) for t, report in pairs if 0 < len(report.lines) == len(step_spans(t, LINES))]
    rollouts, reports = [t for t, _ in pairs], [report for _, report in pairs]
    fit = {"lr": 2e-3, "epochs": size["epochs"], "batch_size": 64}
    process = StepClassifier.from_policy(base, segmenter=LINES).fit(rollouts, [r.labels for r in reports], **fit)
    whole = StepClassifier.from_policy(base, segmenter=Segmenter("turns"))
    whole.fit(rollouts, [[r.right] for r in reports], **fit)

    rows = [row.tolist() for row in process.step_scores(rollouts)]
    lines = [(x, line) for row, r in zip(rows, reports, strict=True) for x, line in zip(row, r.lines, strict=True)]
    facts = {"eta": choose_eta([[x for x, _ in lines]]), "alpha": 1.0 / float(np.mean([sum(row) for row in rows]))}
    for name, chosen in (
        ("filler", [x for x, line in lines if line.kind == "filler"]),
        ("right", [x for x, line in lines if line.kind == "step" and line.correct]),
        ("wrong", [x for x, line in lines if line.kind == "step" and not line.correct]),
    ):
        facts[name] = float(np.mean(chosen)) if chosen else 0.0
    return process, whole, facts


def reward_of(arm: str, process: Any, whole: Any, facts: Mapping[str, float]) -> ProcessReward:
    """The reward of an arm."""
    from guerdon.environments.arithmetic import ChainCorrect

    transform = {
        "SR+PR-normed": StepNormalise(),
        "SR+Clip": StepClip(facts["eta"]),
        "SR+Delta": StepDelta(),
        "SR+Clip+Delta": Compose(StepClip(facts["eta"]), StepDelta()),
    }.get(arm)
    model = OnLastStep(whole) if arm == "SR+OR" else process
    return ProcessReward(model, transform, 0.0 if arm == "SR" else facts["alpha"], correct=ChainCorrect())


def run(scale: str, out: Path, models: tuple[Any, Any, dict[str, float]], arm: str, seed: int) -> dict[str, Any]:
    """Train one arm and measure it on held-out chains."""
    from guerdon.environments.arithmetic import check, make_tasks

    size = SIZES[scale]
    policy = base_policy(scale, out)
    history: list[dict[str, Any]] = []
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
        tasks = make_tasks(size["tasks"], spec=spec(), seed=seed)
        history = train(policy, tasks, reward_of(arm, *models), settings=settings, credit="returns_relative")

    def rate(trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
        reports = [check(t.task, policy_text(t)) for t in trajectories]
        return {
            "right": [float(r.right and not t.stop.truncated) for t, r in zip(trajectories, reports, strict=True)],
            "steps": [float(len(r.lines)) for r in reports],
            "filler": [r.share_filler for r in reports],
            "proxy": [float(row.sum()) for row in models[0].step_scores(trajectories)],
        }

    test = make_tasks(size["test"], "test", spec=spec(), seed=0)
    row: dict[str, Any] = measure(policy, test, rate, samples=4, max_tokens=MAX_TOKENS, seed=seed)
    row["curve"] = [step["reward/correct"] for step in history]
    return row


def filler_slopes(models: tuple[Any, Any, dict[str, float]]) -> dict[str, float]:
    """Without any training: what each further useless line pays under each reward, for a solution with two wrong lines.

    Here the model is asked through a function of the text: useless lines score what they score on average.
    """
    facts = models[2]
    scores = {"a": facts["right"], "b": facts["wrong"], "check ok": facts["filler"], "answer": facts["right"]}
    slopes = {}
    for arm in ARMS[:-1]:
        reward = reward_of(arm, lambda question, steps: [scores[step.strip()] for step in steps], None, facts)
        slopes[arm] = filler_check(reward, "", "a\nb\na\nanswer", "check ok", times=8, where="best").slope
    return slopes


def reproduce(scale: str, seeds: Sequence[int], out: Path) -> Result:
    """Train the reward models and every arm, and test the claims.

    Args:
        scale: ``smoke``, ``cpu`` or ``gpu``.
        seeds: of RL; base policy and reward models are shared.
        out: run folder; finished arms are not run again.
    """
    scale, out = require_scale(scale), Path(out)
    with one_thread():
        timer = Timer()
        models = reward_models(scale, out)
        prepared = timer()
        results = run_arms(out, ("base", *ARMS), seeds, partial(run, scale, out, models))
    slopes = filler_slopes(models)
    claims = judge(results, seeds, models[2], slopes, asserted=scale != "smoke")
    measured: dict[str, Any] = {
        arm: {key: float(column(results, arm, seeds, key).mean()) for key in ("right", "steps", "filler", "proxy")}
        for arm in ("base", *ARMS)
    }
    for arm in ARMS:
        measured[arm]["training curve"] = [
            round(x, 3) for x in column(results, arm, seeds, "curve").mean(0)[::5].tolist()
        ]
    measured["reward model"] = models[2]
    measured["gain per useless line, no training"] = slopes
    seconds = prepared + sum(row["seconds"] for row in results.values())
    return Result(
        "clip-delta", scale, tuple(seeds), tuple(claims), PAPER, measured, environment(), seconds, notes=NOTES
    )


def judge(
    results: Mapping[tuple[str, int], Any],
    seeds: Sequence[int],
    facts: Mapping[str, float],
    slopes: Mapping[str, float],
    *,
    asserted: bool,
) -> list[Claim]:
    """The claims: sampled solutions of the same held-out chains for every arm."""

    def of(arm: str, key: str) -> np.ndarray:
        return column(results, arm, seeds, key)

    options: dict[str, Any] = {"asserted": asserted}
    return [
        paired_claim("0-hole", "the process reward model gives useless lines more than 0.9 on average", np.full((len(seeds), 1), facts["filler"]), np.full((len(seeds), 1), 0.9), **options),
        paired_claim("1a-proxy", "SR+PR raises the summed process score above SR's", of("SR+PR", "proxy"), of("SR", "proxy"), **options),
        paired_claim("1b-worse", "SR+PR is less accurate than SR", of("SR", "right"), of("SR+PR", "right"), **options),
        statistic_claim("1c-longer", "SR+PR writes more than 1.5 times the lines of SR", [of("SR+PR", "steps"), of("SR", "steps")], lambda a, b: a - 1.5 * b, **options),
        paired_claim("2a-no-filler", "Clip with Delta has no more useless lines than SR (within 0.02)", of("SR", "filler"), of("SR+Clip+Delta", "filler"), margin=-0.02, **options),
        paired_claim("2b-beats-sum", "Clip with Delta is more accurate than SR+PR", of("SR+Clip+Delta", "right"), of("SR+PR", "right"), **options),
        paired_claim("2c-no-harm", "Clip with Delta is at least as accurate as SR (within 0.01)", of("SR+Clip+Delta", "right"), of("SR", "right"), margin=-0.01, **options),
        paired_claim("3-sooner", "Clip with Delta has a larger area under the training curve than SR", of("SR+Clip+Delta", "curve"), of("SR", "curve"), **options),
        paired_claim("4a-linear", "asked without training, each further useless line pays under SR+PR", [[slopes["SR+PR"]]], [[0.0]], **options),
        paired_claim("4b-bounded", "and pays nothing under Clip, Delta, or both", [[-max(slopes[a] for a in ("SR+Clip", "SR+Delta", "SR+Clip+Delta"))]], [[0.0]], margin=-1e-9, **options),
    ]  # fmt: skip


NOTES = "accuracy is over four sampled solutions of each held-out chain; a truncated solution is wrong"

PAPER = {
    "SR + PR against SR, models of 1.5B and 7B": "worse (hacked)",
    "SR + OR against SR": "no gain",
    "SR + Clip + Delta against SR": "improves all evaluated models on MATH and GSM8K, the strongest modestly",
}

RECIPE = Recipe(
    slug="clip-delta",
    title="On Designing Effective RL Reward at Training Time for LLM Reasoning",
    reference="Gao, Xu, Ye, Liu, He, Fu, Mei, Wang and Wu, 2024, arXiv 2410.15115",
    step="shape",
    summary=(
        "A process reward that is summed over steps is earned by adding right and useless steps. Clip only punishes bad "
        "steps, Delta pays differences that telescope; with both, the learned part of any solution is bounded by its first "
        "step, and each step is credited with its own quality alone."
    ),
    claims=(
        "a summed process reward is hacked: more steps, a higher process score, lower accuracy",
        "with Clip and Delta it does no harm and adds no useless steps",
        "with Clip and Delta the success reward is learned sooner",
        "the hack shows without training: each further useless step pays under the sum, none under Clip with Delta",
    ),
    parts=(
        "guerdon.shaping.StepClip",
        "guerdon.shaping.StepDelta",
        "guerdon.shaping.Compose",
        "guerdon.reward_models.ProcessReward",
        "guerdon.credit.returns_relative",
        "guerdon.credit.to_token_rewards",
        "guerdon.evaluation.filler_check",
    ),
    reproduce=reproduce,
    paper_numbers=PAPER,
)
