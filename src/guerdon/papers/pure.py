"""PURE (arXiv 2504.15275): step rewards that are summed get hacked by many steps; is their minimum safe?

Part A, exact: a softmax policy over four lines (a good step, a bad step, filler, the answer) whose proxy scores every
right line alike, filler included; policy gradient by enumeration of all responses. Part B, learned: chains of four
operations, a tiny policy whose corpus has useless lines that are true, and a process reward model trained on gold labels
of lines, which call filler right: that is the hole. All arms share policy, model, prompts and settings, and train on
process rewards alone, except one that also verifies the answers of a tenth of the prompts. Run it with
``guerdon reproduce pure``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.papers._arms import column, kept, measure, one_thread, run_arms, train
from guerdon.papers.evidence import Claim, Result, Timer, environment, paired_claim, require_scale, statistic_claim
from guerdon.papers.recipe import Recipe
from guerdon.types import Trajectory, policy_text

SIZES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {"policies": 1, "updates": 3, "examples": 200, "sft": 3, "labelled": 100, "epochs": 1, "steps": 2, "prompts": 2, "tasks": 20, "test": 10},
    "cpu": {"policies": 4, "updates": 150, "examples": 6000, "sft": 300, "labelled": 8000, "epochs": 2, "steps": 30, "prompts": 6, "tasks": 600, "test": 150},
    "gpu": {"policies": 20, "updates": 150, "examples": 40_000, "sft": 2000, "labelled": 40_000, "epochs": 3, "steps": 200, "prompts": 32, "tasks": 5000, "test": 500},
}  # fmt: skip
ARMS = ("sum", "sum, gamma 0.9", "min", "strict min", "min + 10 % answers")


# Part A ----------------------------------------------------------------------------------------------------------------

GOOD, BAD, FILLER, ANSWER = range(4)
LONGEST, NEEDED, RIGHT, WRONG = 9, 3, 0.9, -0.9
"""Lines of the longest response, good steps that a solution needs, and the proxy's score of right and of wrong lines."""


def responses() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All responses: symbols ``[N, 9]`` (-1 behind the end), good steps before each, proxy scores, and gold ``[N]``."""
    symbols: list[list[int]] = []

    def grow(row: list[int]) -> None:
        if len(row) == LONGEST:
            symbols.append(row)
            return
        symbols.append([*row, ANSWER])
        for symbol in (GOOD, BAD, FILLER):
            grow([*row, symbol])

    grow([])
    made = np.array([row + [-1] * (LONGEST - len(row)) for row in symbols])
    good = np.minimum(np.cumsum(made == GOOD, 1), NEEDED)
    before = np.concatenate([np.zeros((len(made), 1), dtype=int), good[:, :-1]], 1)
    clean = np.cumsum(made == BAD, 1) == 0
    solved = (made == ANSWER) & (before == NEEDED) & clean
    score = np.where((made == GOOD) | (made == FILLER) | solved, RIGHT, WRONG)
    return made, before, score, solved.any(1).astype(float)


def exact(scale: str, seed: int) -> dict[str, Any]:
    """Accuracy, lines and share of filler at the start and after training, for every rule and initial policy."""
    import torch

    from guerdon.credit import min_form_returns, sum_form_returns

    size = SIZES[scale]
    symbols, before, score, gold = (torch.from_numpy(x) for x in responses())
    mask = symbols >= 0
    rules = {
        "sum": sum_form_returns(score, mask),
        "sum, gamma 0.9": sum_form_returns(score, mask, 0.9),
        "min": min_form_returns(score, mask),
        "strict min": min_form_returns(score, mask, "strict"),
    }
    place = (torch.arange(LONGEST), before, symbols.clamp(min=0))
    start = torch.log(torch.tensor([[0.62, 0.12, 0.2, 0.06]] * NEEDED + [[0.05, 0.05, 0.2, 0.7]], dtype=torch.float64))
    lines, filler = mask.sum(1).double(), (symbols == FILLER).sum(1).double()
    row: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(size["policies"]):
        noise = 0.3 * torch.randn(LONGEST, NEEDED + 1, 4, generator=generator, dtype=torch.float64)
        for name, returns in rules.items():
            logits = (start + noise).clone().requires_grad_()
            for update in range(size["updates"] + 1):
                chosen = torch.where(mask, logits.log_softmax(-1)[place], 0.0)
                chance = chosen.sum(1).exp().detach()
                if update in (0, size["updates"]):
                    now = "start" if update == 0 else name
                    for key, value in (("right", gold), ("lines", lines), ("filler", filler / lines)):
                        if update or name == "sum":
                            row.setdefault(f"{now}: {key}", []).append(float((chance * value).sum()))
                (gradient,) = torch.autograd.grad((chance[:, None] * chosen * returns).sum(), logits)
                with torch.no_grad():
                    logits += gradient
    return row


# Part B ----------------------------------------------------------------------------------------------------------------

MAX_TOKENS = 80
LR = 3e-4


def spec() -> Any:
    from guerdon.environments.arithmetic import Spec

    return Spec((4, 4), high=9, operand=4)


def base_policy(scale: str, out: Path) -> Any:
    """The policy that every arm starts from: some of its lines are wrong, some are filler."""
    from guerdon.environments.arithmetic import Style
    from guerdon.training.arithmetic import warm_start

    size = SIZES[scale]
    mix = {Style(filler=0.15): 0.6, Style(error=0.25, filler=0.15): 0.4}
    return warm_start(mix, spec=spec(), folder=out / "warm", examples=size["examples"], steps=size["sft"])


def process_model(scale: str, out: Path) -> Any:
    """A two-class model of lines, trained on exact labels of solutions in many styles.

    A line is judged by itself (an error is the fault of one line), an answer where everything before it is right, and a
    solution that ends without an answer is wrong in its last line. So what is left to hack is what the labels themselves
    allow: filler.
    """
    import torch

    from guerdon.environments.arithmetic import LINES, Style, check, scripts, step_labels
    from guerdon.reward_models import StepClassifier

    size, policy = SIZES[scale], base_policy(scale, out)
    model = StepClassifier.from_policy(policy, output="signed", layers=2, segmenter=LINES)
    path = out / "process_model.pt"
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    mix = {
        Style(error=0.4, filler=0.15): 0.5,
        Style(slip=0.5, filler=0.15): 0.25,
        Style(skip=0.3, slip=0.6, filler=0.15): 0.1,
        Style(answer="none", filler=0.3): 0.1,
        Style(steps=False, error=0.7): 0.05,
    }
    data = scripts(policy, size["labelled"], mix, spec=spec(), seed=9)

    def labels(trajectory: Trajectory) -> list[bool | None]:
        marks: list[bool | None] = list(step_labels(trajectory))
        if check(trajectory.task, policy_text(trajectory)).answer is None:
            marks[-1] = False
        elif False in marks[:-1]:
            marks[-1] = None  # an answer to a chain that went wrong is nobody's step
        return marks

    known = [labels(t) for t in data]
    model.fit(data, known, lr=2e-3, epochs=size["epochs"], batch_size=64)
    model.fit(data, known, lr=5e-4, epochs=1, batch_size=64, seed=1)
    torch.save(model.state_dict(), path)
    return model


def rule_of(arm: str) -> Any:
    """The credit rule of an arm."""
    from guerdon.training import MinFormCredit, SumCredit

    return {
        "sum": SumCredit(),
        "sum, gamma 0.9": SumCredit(0.9),
        "min": MinFormCredit(),
        "strict min": MinFormCredit("strict"),
        "min + 10 % answers": MinFormCredit(outcome="verified"),
    }[arm]


def run(scale: str, out: Path, model: Any, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm and measure it on held-out chains."""
    from guerdon.environments.arithmetic import ChainCorrect, check, make_tasks
    from guerdon.reward_models import StepReward

    size, policy = SIZES[scale], base_policy(scale, out)
    if arm != "start":
        tasks = make_tasks(size["tasks"], spec=spec(), seed=seed)
        answered = {t.id for t in tasks[::10]}
        reward = StepReward(model, verifier=ChainCorrect(), answered=lambda task: task.id in answered)
        settings = {
            "steps": size["steps"], "prompts_per_step": size["prompts"], "group_size": 8, "max_tokens": MAX_TOKENS,
            "optimiser": {"lr": LR}, "seed": seed,
        }  # fmt: skip
        train(policy, tasks, reward, settings=settings, credit=rule_of(arm), reference=None)

    def rate(trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
        reports = [check(t.task, policy_text(t)) for t in trajectories]
        return {
            "right": [float(r.right and not t.stop.truncated) for t, r in zip(trajectories, reports, strict=True)],
            "lines": [float(max(1, len(r.lines))) for r in reports],
            "filler": [r.share_filler for r in reports],
            "proxy": [float(row.mean()) for row in model.step_scores(trajectories)],
        }

    return measure(policy, make_tasks(size["test"], "test", spec=spec(), seed=0), rate, samples=4, max_tokens=MAX_TOKENS, seed=seed)  # fmt: skip


# Verdict ---------------------------------------------------------------------------------------------------------------


def reproduce(scale: str, seeds: Sequence[int], out: Path) -> Result:
    """Run both parts for every seed and test the claims.

    Args:
        scale: ``smoke``, ``cpu`` or ``gpu``.
        seeds: of initial policies (part A) and of RL (part B); base policy and process model are shared.
        out: run folder; finished arms are not run again.
    """
    scale, out = require_scale(scale), Path(out)
    with one_thread():
        tables = [kept(out / f"exact-{seed}.json", partial(exact, scale, seed)) for seed in seeds]
        print(f"exact part: {sum(t['seconds'] for t in tables):.0f} s", file=sys.stderr, flush=True)
        timer = Timer()
        model = process_model(scale, out)
        prepared = timer()
        results = run_arms(out, ("start", *ARMS), seeds, partial(run, scale, out, model))
    claims = judge(tables, results, seeds, asserted=scale != "smoke")
    measured: dict[str, Any] = {
        "exact": {k: float(np.mean([t[k] for t in tables])) for k in tables[0] if k != "seconds"},
        "learned": {
            arm: {key: float(column(results, arm, seeds, key).mean()) for key in ("right", "lines", "filler", "proxy")}
            for arm in ("start", *ARMS)
        },
    }
    seconds = prepared + sum(r["seconds"] for r in (*tables, *results.values()))
    return Result("pure", scale, tuple(seeds), tuple(claims), PAPER, measured, environment(), seconds, notes=NOTES)


def judge(
    tables: Sequence[Mapping[str, Any]], results: Mapping[tuple[str, int], Any], seeds: Sequence[int], *, asserted: bool
) -> list[Claim]:
    """The claims; part A over initial policies, part B over sampled solutions of the same held-out chains."""

    def a(name: str, key: str) -> np.ndarray:
        return np.array([t[f"{name}: {key}"] for t in tables])

    def b(arm: str, key: str) -> np.ndarray:
        return column(results, arm, seeds, key)

    options: dict[str, Any] = {"asserted": asserted}
    return [
        paired_claim("A1-accuracy", "exact: the minimum ends with more right answers than the sum", a("min", "right"), a("sum", "right"), **options),
        paired_claim("A2-no-harm", "exact: the minimum ends with at least as many right answers as at the start", a("min", "right"), a("start", "right"), **options),
        statistic_claim("A3-sum-grows", "exact: under the sum responses grow to more than 1.5 times their lines", [a("sum", "lines"), a("start", "lines")], lambda x, y: x - 1.5 * y, **options),
        statistic_claim("A4-min-stays", "exact: under the minimum they stay below 1.5 times their lines", [a("min", "lines"), a("start", "lines")], lambda x, y: 1.5 * y - x, **options),
        paired_claim("B1-accuracy", "learned: the minimum ends with more right answers than the sum", b("min", "right"), b("sum", "right"), **options),
        paired_claim("B2-discount", "learned: and than the sum discounted by 0.9", b("min", "right"), b("sum, gamma 0.9", "right"), **options),
        statistic_claim("B3-sum-grows", "learned: under the sum responses grow to more than twice their lines", [b("sum", "lines"), b("start", "lines")], lambda x, y: x - 2 * y, **options),
        statistic_claim("B4-min-stays", "learned: under the minimum they stay below 1.5 times their lines", [b("min", "lines"), b("start", "lines")], lambda x, y: 1.5 * y - x, **options),
        paired_claim("B5-no-harm", "learned: the minimum ends with at least as many right answers as at the start", b("min", "right"), b("start", "right"), **options),
        paired_claim("B6-answers", "learned: with the answers of a tenth of the prompts it ends at least as high (within 0.02)", b("min + 10 % answers", "right"), b("min", "right"), margin=-0.02, **options),
    ]  # fmt: skip


NOTES = (
    "accuracy is over four sampled solutions of each held-out chain; a truncated solution is wrong. Tried before: a process "
    "model with labels up to the first error only, at a learning rate of 5e-4. It told right lines from wrong ones poorly "
    "(AUC 0.74, answers 0.44), so a response's minimum was noise: accuracy fell from 0.41 to 0.12 under the minimum (to 0 "
    "under the sum). The model is now trained on labels of all lines, for all arms"
)

PAPER = {
    "mean of five benchmarks, Qwen2.5-Math-7B: base, answers only, process rewards only, both": [
        39.5,
        48.3,
        49.3,
        53.3,
    ],
    "AMC23, answers only against both": [60.0, 82.5],
    "steps to the accuracy of answers only": "about 30 %",
    "sum-form credit": "collapses at the beginning",
}

RECIPE = Recipe(
    slug="pure",
    title="Stop Summation: Min-Form Credit Assignment Is All Process Reward Model Needs for Reasoning",
    reference="Cheng, Xiong, Qiao, Li, Guo, Wang, Lv and Wang, NeurIPS 2025, arXiv 2504.15275",
    step="assign",
    summary=(
        "Summed step rewards teach a policy to write many steps that score well. PURE takes the minimum of the step rewards "
        "for a response's value, so that one bad step caps the return and filler adds nothing; a soft minimum of the rewards, "
        "taken once per response, turns any summing code into it."
    ),
    claims=(
        "summed process rewards are hacked by filler where the minimum is not",
        "process rewards alone, under the minimum, do not lower accuracy",
        "a tenth of the prompts with verified answers adds to it",
    ),
    parts=(
        "guerdon.credit.softmin_rewards",
        "guerdon.credit.min_form_returns",
        "guerdon.credit.pure_advantage",
        "guerdon.training.MinFormCredit",
        "guerdon.training.SumCredit",
        "guerdon.reward_models.StepClassifier",
        "guerdon.reward_models.StepReward",
    ),
    reproduce=reproduce,
    paper_numbers=PAPER,
)
