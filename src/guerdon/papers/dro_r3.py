"""DRO with the reasoning reflection reward (arXiv 2506.13351): reward without a verifier, from the likelihood of a reference.

Testbed: a tiny policy works out a chain of three operations on four numbers and writes a report of some 35 tokens, of which
two are computed and the rest is boilerplate whose synonyms follow the register of the reasoning
(:mod:`guerdon.environments.reports`). The base policy writes the report always, and reasons rightly in a third of its
responses. Offline first: does R3 tell right from wrong traces of one prompt better than the plain sum of the reference's
log-probabilities? Then RL from one warm start: all arms share policy, prompts and settings, and none but ``correctness`` sees
whether a report is right. Run it with ``guerdon reproduce dro-r3``.

Choices where the paper leaves some. The scoring policy is the frozen base. Weights are deviations over their sum; the length
term has slope 1 and the weight that gives it the deviation of the other term on the first batch, in every arm that has it.
GRPO without length division, scaled by deviation, truncated responses masked, clip 0.2, KL weight 0.001. Filter: rho 0.05,
top-k 20, the lower half by deviation dropped, once before training. The policy has 0.16 million parameters in place of 2 to
4 million, and 3 seeds in place of 5, for the time of two cores. Tried for all arms: learning rates
of 4e-4 (more responses that do not end) and 1e-3 (every arm forgets its sums), and a KL weight of 0.05 (no difference).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.environments.reports import (
    END,
    START,
    outcome_of,
    report_tasks,
    report_words,
    right,
    write_report,
)
from guerdon.papers._arms import column, kept, measure, one_thread, run_arms, train
from guerdon.papers.evidence import Claim, Result, Timer, environment, paired_claim, require_scale, statistic_claim
from guerdon.papers.recipe import Recipe
from guerdon.rewards import FunctionReward
from guerdon.types import Task, Trajectory, policy_text

if TYPE_CHECKING:
    from guerdon.policies import Policy

SIZES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {"examples": 200, "sft": 3, "offline": 4, "traces": 4, "steps": 2, "prompts": 2, "group": 4, "tasks": 12, "pool": 6, "test": 6},
    "cpu": {"examples": 12_000, "sft": 700, "offline": 80, "traces": 16, "steps": 35, "prompts": 6, "group": 16, "tasks": 400, "pool": 40, "test": 120},
    "gpu": {"examples": 40_000, "sft": 2000, "offline": 200, "traces": 16, "steps": 150, "prompts": 32, "group": 16, "tasks": 1500, "pool": 300, "test": 400},
}  # fmt: skip
MAX_TOKENS = 84
LR, KL = 2e-4, 0.001
MODEL: Mapping[str, int] = {"hidden": 64, "layers": 2, "heads": 4}
ARMS = ("base", "aggregate", "R3", "R3 without length", "ROUGE-1", "correctness", "mixed pool", "mixed pool, filtered")
MIXED = (("learnable", 0.5), ("easy", 0.25), ("hard", 0.25))
MIXED_MOST = 320
"""There are 88 easy chains."""
RHO, TOP_K, DROP = 0.05, 20.0, 0.5


def warm(scale: str, out: Path) -> Policy:
    """The base policy: it always writes the report, and errs in its reasoning."""
    from guerdon.policies import Policy, tiny_policy, train_bpe
    from guerdon.training import SftConfig, SftTrainer

    folder = out / "warm" / f"reports-{scale}"
    if folder.is_dir():
        return Policy.load(folder, device="cpu")
    size, words = SIZES[scale], report_words()
    policy = tiny_policy(train_bpe(("0",), 512 + len(words), atoms=(), words=words), max_context=128, seed=0, **MODEL)
    rng = np.random.default_rng(0)
    common, easy = report_tasks(min(1500, size["examples"])), report_tasks(min(80, size["examples"]), kind="easy")
    tasks = [*common, *easy]
    shares = np.r_[np.full(len(common), 0.85 / len(common)), np.full(len(easy), 0.15 / len(easy))]
    end = policy.tokenizer.eos_token_id
    data = []
    for k in rng.choice(len(tasks), size["examples"], p=shares).tolist():
        ids = [*policy.encode(write_report(tasks[k], rng)), end]
        data.append((policy.render(tasks[k].prompt), ids, [1] * len(ids)))
    steps = size["sft"]
    optimiser = {"lr": 3e-3, "schedule": "cosine", "warmup": min(20, steps - 1), "final": 0.05}
    SftTrainer(policy, data, SftConfig(steps=steps, batch_size=48, optimiser=optimiser)).fit()  # type: ignore[arg-type]
    policy.model.eval()
    policy.save(folder)
    return policy


def reflection(policy: Policy, weight: str = "std", *, length: bool = True) -> Any:
    """The reward of the reflection arms: the frozen base scores."""
    from guerdon.reward_models import ReflectionReward
    from guerdon.shaping import ReasoningReflection

    return ReflectionReward(
        policy.reference(),
        ReasoningReflection(weight),  # type: ignore[arg-type]
        start=START,
        end=END,
        lambda_len="match" if length else 0.0,
        max_tokens=32_768,
    )


def reward_of(arm: str, policy: Policy) -> Any:
    """The reward of an arm."""
    from guerdon.rewards.overlap import rouge

    def overlap(trajectories: Sequence[Trajectory]) -> list[float]:
        said = [outcome_of(policy_text(t)) or "" for t in trajectories]
        return [rouge(text, t.task.reference, ("1",), stem=False) for text, t in zip(said, trajectories, strict=True)]

    if arm == "ROUGE-1":
        return FunctionReward(overlap, name="rouge-1")
    if arm == "correctness":
        return FunctionReward(
            lambda trajectories: [float(right(t.task, policy_text(t))) for t in trajectories], name="correctness"
        )
    return reflection(policy, "uniform" if arm == "aggregate" else "std", length=arm != "R3 without length")


def mixed(n: int, seed: int) -> list[Task]:
    """Tasks of which half can be learned from; a quarter is too easy, a quarter too hard."""
    counts = [round(share * n) for _, share in MIXED]
    tasks = [t for (kind, _), c in zip(MIXED, counts, strict=True) for t in report_tasks(c, kind=kind, seed=seed)]  # type: ignore[arg-type]
    return [tasks[int(k)] for k in np.random.default_rng([seed, 61]).permutation(len(tasks))]


def offline(scale: str, out: Path) -> dict[str, Any]:
    """For every prompt with right and wrong traces: the chance that a right one scores higher, by R3 and by the plain sum."""
    from guerdon.reward_models.style import auc
    from guerdon.shaping import ReasoningReflection
    from guerdon.training.arithmetic import solve

    size, policy = SIZES[scale], warm(scale, out)
    tasks = report_tasks(size["offline"], "test", seed=1)
    groups = solve(policy, tasks, group_size=size["traces"], max_tokens=MAX_TOKENS, seed=7)
    found = reflection(policy).reflect([t for g in groups for t in g.trajectories])
    row: dict[str, Any] = {"R3": [], "aggregate": [], "weight": [], "right": []}
    for group, one in zip(groups, found, strict=True):
        ok = one.valid.numpy()
        good = np.array([right(t.task, policy_text(t)) for t in group.trajectories])
        row["right"].append(float(good.mean()))
        if not good[ok].any() or good[ok].all():
            continue
        for name, weight in (("R3", "std"), ("aggregate", "uniform")):
            values = ReasoningReflection(weight)(one.L, one.M, one.valid).numpy()  # type: ignore[arg-type]
            row[name].append(auc(values[ok & good], values[ok & ~good]))
        ids = policy.encode(group.task.reference)
        digits = [policy.decode([t]).strip().isdigit() for t in ids]
        row["weight"].append(float(ReasoningReflection().weights_(one.L, one.valid)[digits].sum()))
    return row


def run(scale: str, out: Path, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm and measure it on held-out chains."""
    from guerdon.shaping import R3Filter
    from guerdon.training.arithmetic import solve

    size, policy = SIZES[scale], warm(scale, out)
    row: dict[str, Any] = {"rollouts": 0}
    if arm != "base":
        group, prompts = size["group"], size["prompts"]
        tasks = (
            mixed(min(size["tasks"], MIXED_MOST), seed)
            if arm.startswith("mixed")
            else report_tasks(size["tasks"], seed=seed)
        )
        if arm.endswith("filtered"):
            tasks, prompts = tasks[: size["pool"]], max(2, prompts // 2)
            traces = solve(policy, tasks, group_size=size["traces"], max_tokens=MAX_TOKENS, seed=seed)
            chosen = reflection(policy).select(traces, R3Filter(RHO, TOP_K, DROP))
            row["kept"] = {k: sum(tasks[int(i)].meta["kind"] == k for i in chosen) for k, _ in MIXED}
            row["rollouts"] = len(tasks) * size["traces"]
            kept_tasks = [tasks[int(i)] for i in chosen]
            # Of a smoke run's untrained policy the filter may leave next to nothing.
            tasks = kept_tasks if len(kept_tasks) >= prompts or scale != "smoke" else tasks
        row["rollouts"] += size["steps"] * prompts * group
        settings = {
            "algorithm": "dr_grpo", "scale": "std", "mask_truncated": True, "clip_low": 0.2, "clip_high": 0.2,
            "kl_coef": KL, "steps": size["steps"], "prompts_per_step": prompts, "group_size": group,
            "max_tokens": MAX_TOKENS, "optimiser": {"lr": LR, "schedule": "linear"}, "seed": seed, "on_reward_error": "drop",
        }  # fmt: skip
        train(policy, tasks, reward_of(arm, policy), settings=settings)
    test = report_tasks(size["test"], "test", seed=2)
    row |= measure(policy, test, partial(rate, policy), samples=4, max_tokens=MAX_TOKENS, seed=seed)
    return row


def rate(policy: Policy, trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
    """What is measured of each held-out response; the gap is of outcome and reference lengths, in tokens, 0 without an end."""
    rows = []
    for t in trajectories:
        text, outcome = policy_text(t), outcome_of(policy_text(t))
        ends = outcome is not None and not t.stop.truncated
        gap = abs(len(policy.encode(outcome or "")) - len(policy.encode(t.task.reference)))
        rows.append((float(right(t.task, text)), float(ends), float(gap * ends), float(len(t))))
    return {k: [row[i] for row in rows] for i, k in enumerate(("right", "ends", "gap", "length"))}


def reproduce(scale: str, seeds: Sequence[int], out: Path) -> Result:
    """Score traces offline, train every arm from the shared warm start for every seed, and test the claims."""
    scale, out = require_scale(scale), Path(out)
    timer = Timer()
    with one_thread():
        warm(scale, out)
        prepared = timer()
        table = kept(out / "offline.json", partial(offline, scale, out))
        results = run_arms(out, ARMS, seeds, partial(run, scale, out))
    claims = judge(table, results, seeds, asserted=scale != "smoke")
    measured: dict[str, Any] = {
        "offline": {
            "AUC of R3": _mean(table["R3"]), "AUC of aggregate": _mean(table["aggregate"]),
            "weight of the computed tokens": _mean(table["weight"]), "right": _mean(table["right"]),
            "prompts with right and wrong traces": len(table["R3"]),
        }
    }  # fmt: skip
    for arm in ARMS:
        means = {
            k: float(column(results, arm, seeds, k).mean()) for k in ("right", "gap", "ends", "length", "rollouts")
        }
        measured[arm] = {**means, "gap": means["gap"] / max(means["ends"], 1e-9)}
    measured["kept by the filter"] = [results[ARMS[-1], seed]["kept"] for seed in seeds]
    seconds = prepared + table["seconds"] + sum(row["seconds"] for row in results.values())
    return Result("dro-r3", scale, tuple(seeds), tuple(claims), PAPER, measured, environment(), seconds, notes=NOTES)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def judge(
    table: Mapping[str, Any], results: Mapping[tuple[str, int], Any], seeds: Sequence[int], *, asserted: bool
) -> list[Claim]:
    """The claims; accuracy is that of sampled reports on the same held-out chains for every arm."""
    right_of = {arm: column(results, arm, seeds, "right") for arm in ARMS}
    ended = [column(results, arm, seeds, key) for arm in ("R3 without length", "R3") for key in ("gap", "ends")]
    spent = {arm: column(results, arm, seeds, "rollouts") for arm in ARMS[-2:]}
    more: dict[str, Any] = {"asserted": asserted}
    # A smoke run's prompts may all be of one kind: nothing is asserted of them.
    pairs = (table["R3"], table["aggregate"]) if table["R3"] else ([0.0], [0.0])
    first = paired_claim("1-offline", "within a prompt R3 tells right from wrong traces better than the aggregate log-probability (p < .01)", [pairs[0]], [pairs[1]], **more)  # fmt: skip
    if asserted:
        first = dataclasses.replace(first, holds=bool(first.holds and first.p_value < 0.01))
    return [
        first,
        paired_claim("2-beats-aggregate", "R3 ends with more right reports than the aggregate log-probability", right_of["R3"], right_of["aggregate"], **more),
        paired_claim("3-beats-rouge", "and with more than ROUGE-1", right_of["R3"], right_of["ROUGE-1"], **more),
        statistic_claim("4-near-correctness", "R3 reaches 0.9 times the accuracy of training on correctness", [right_of["R3"], right_of["correctness"]], lambda a, b: a - 0.9 * b, **more),
        statistic_claim("5-length", "the length term brings outcomes that end nearer to the reference's length, in tokens", ended, lambda a, na, b, nb: a / np.maximum(na, 1e-9) - b / np.maximum(nb, 1e-9), **more),
        paired_claim("6-filter", "with the filter, accuracy is no more than 2 points lower", right_of["mixed pool, filtered"], right_of["mixed pool"], margin=-0.02, **more),
        statistic_claim("7-cheaper", "and at least 30% fewer responses are sampled, those of the filter included", [spent["mixed pool"], spent["mixed pool, filtered"]], lambda a, b: 1 - b / a - 0.3 + 1e-9, **more),
    ]  # fmt: skip


NOTES = (
    "accuracy is of four samples of each held-out chain; the pool of the last two arms is half learnable, a quarter too easy "
    "and a quarter too hard; AUC is within prompts that have right and wrong traces"
)

PAPER = {
    "ParaRev win rate against GPT-4o (GPT judge, Claude judge)": {
        "base 14B": [43.8, 48.6], "ROUGE-1": [31.1, 42.8], "aggregate, strict length": [31.1, 44.0],
        "aggregate, relaxed length": [47.9, 51.0], "R3": [51.8, 58.8],
    },
    "FinQA pass@1, 7B: base, aggregate, R3, correctness": [61.7, 63.0, 67.1, 68.0],
    "training time saved by the filter": 0.45,
}  # fmt: skip

RECIPE = Recipe(
    slug="dro-r3",
    title="Direct Reasoning Optimization: LLMs Can Reward And Refine Their Own Reasoning for Open-Ended Tasks",
    reference="Xu, Chakraborty, Sharma, Nunes, Kiciman, Lu and Chandra, 2025, arXiv 2506.13351",
    step="score",
    summary=(
        "A trace of reasoning is worth how much it makes the policy itself expect the reference, on those tokens of the "
        "reference whose likelihood varies over the traces. The same numbers tell which questions can be learned from."
    ),
    claims=(
        "weighting tokens by their deviation over traces tells right reasoning better than the plain sum",
        "R3 trains to more right reports than the aggregate and than ROUGE-1, and near to training on correctness",
        "a length term on the outcome keeps it near the reference's length",
        "the filter saves rollouts at the same accuracy",
    ),
    parts=(
        "guerdon.reward_models.ReflectionReward",
        "guerdon.reward_models.reference_logprobs",
        "guerdon.shaping.ReasoningReflection",
        "guerdon.shaping.reflection_weights",
        "guerdon.shaping.outcome_length_reward",
        "guerdon.shaping.R3Filter",
    ),
    reproduce=reproduce,
    paper_numbers=PAPER,
)
