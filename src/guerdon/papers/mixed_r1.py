"""Mixed-R1 (arXiv 2505.24164): one run on a mixture of tasks, each with its own rule reward in [0, 1], on a common scale.

Testbed: pictures as symbols (``guerdon.environments.mixed_tasks``): yes or no and choices, bar charts, boxes, captions.
The policy is warmed up on demonstrations of which half are wrong, so that it is right about a third of the time. Pools
hold broken golds and pictures of every difficulty, as real pools do. Every arm starts from the same policy, with the same
settings; the embedding table of the caption reward is that policy's and stays as it was.

A specialist sees the samples of its type; the mixed run sees the union of all of them, so it makes four times as many
rollouts as each specialist and as many of each type as that type's specialist: one run in place of four. The filtered
run makes exactly as many training rollouts as the mixed one, on prompts that were kept after eight rollouts each of the
warm policy (which are not counted). Captions are judged by a hidden gold that no arm is paid for: F1 over triples of
shape, colour and place. Run it with ``guerdon reproduce mixed-r1``.

Choices where the paper's text leaves room: the raw IoU, the weight of the format 1, the arithmetic mean in BMAS, KL 0.04.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.environments.mixed_tasks import TYPES, mixed_tasks, mixed_words, triple_f1, write_response
from guerdon.papers._arms import column, kept, measure, one_thread, run_arms, train
from guerdon.papers.evidence import Claim, Result, environment, paired_claim, require_scale
from guerdon.papers.recipe import Recipe
from guerdon.rewards import (
    BMAS,
    AnswerReward,
    BoxIoU,
    ChoiceMatch,
    RelaxedNumber,
    Reward,
    RoutedReward,
    last_block,
    rouge,
    select_by_rollouts,
    source_statistics,
)
from guerdon.training.callbacks import Callback
from guerdon.types import Task, Trajectory, policy_text

SIZES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {"hidden": 96, "demos": 200, "sft": 3, "steps": 2, "prompts": 2, "pool": 32, "test": 16},
    "cpu": {"hidden": 96, "demos": 16_000, "sft": 400, "steps": 30, "prompts": 4, "pool": 480, "test": 400},
    "gpu": {"hidden": 288, "demos": 60_000, "sft": 1500, "steps": 200, "prompts": 16, "pool": 6400, "test": 800},
}  # fmt: skip
BROKEN = 0.25
EASY_TO_HARD = (1, 2, 3, 4)
MAX_TOKENS = 80
GROUP = 8
CONTINUOUS = ("iou", "open")
CAPTIONS = ("open, P only", "open, Q only", "open, ROUGE-L")
ARMS = ("base", *TYPES, "mixed", "mixed, exact match", "mixed, filtered", *CAPTIONS)


class Same(AnswerReward):
    """1 where the answer is the gold, word for word: one reward for all types."""

    def score_answer(self, answer: str, reference: Any, meta: Mapping[str, Any]) -> float:
        gold = " ".join(map(str, reference)) if isinstance(reference, list) else str(reference)
        return float(answer.lower().split() == gold.lower().split())


class RougeL(AnswerReward):
    """The longest common subsequence with the reference, as an F-measure."""

    def score_answer(self, answer: str, reference: Any, meta: Mapping[str, Any]) -> float:
        return rouge(answer, str(reference), ("L",), stem=False)


class BySource(Callback):
    """Keeps, for every step and type, the mean reward and the share of prompts whose rewards are all equal."""

    name = "by_source"

    def __init__(self) -> None:
        self.rows: list[dict[Any, dict[str, float]]] = []

    def on_step(self, run: Any, row: Mapping[str, Any], detail: Any) -> None:
        """Look at a step."""
        types = [t.task.meta["type"] for t in detail.trajectories]
        values = [s.value for s in detail.scores]
        self.rows.append(source_statistics(values, types, [t.task.id for t in detail.trajectories]))


def warm(scale: str, out: Path) -> Any:
    """The policy that all arms and seeds start from; kept in a folder."""
    from guerdon.policies import Policy, tiny_policy, train_bpe
    from guerdon.training import SftConfig, SftTrainer

    size, folder = SIZES[scale], out / "warm"
    if folder.is_dir():
        return Policy.load(folder, device="cpu")
    words = mixed_words()
    tokenizer = train_bpe(("a",), 266 + len(words), words=words)
    policy = tiny_policy(tokenizer, hidden=size["hidden"], layers=2, heads=2, max_context=192, init="recall")
    rng, data = random.Random("demonstrations"), []
    for task in mixed_tasks(size["demos"], split="demonstrations"):
        response = [*policy.encode(write_response(task, rng)), tokenizer.eos_token_id]
        data.append((policy.render(task.prompt), response, [1] * len(response)))
    optimiser: Any = {"lr": 3e-3, "schedule": "cosine", "warmup": min(20, size["sft"] - 1), "final": 0.05}
    SftTrainer(policy, data, SftConfig(steps=size["sft"], batch_size=64, optimiser=optimiser)).fit()
    policy.model.eval()
    policy.save(folder)
    return policy


def reward_of(arm: str, policy: Any) -> Reward:
    """The reward of an arm; ``policy`` gives the embedding table."""
    if arm == "mixed, exact match":
        return RoutedReward({kind: Same() for kind in TYPES})
    bmas = partial(BMAS.from_policy, policy)
    captions: dict[str, Any] = {
        "open, P only": partial(bmas, directions="p"),
        "open, Q only": partial(bmas, directions="q"),
        "open, ROUGE-L": RougeL,
    }
    return RoutedReward(
        {"matching": ChoiceMatch(), "chart": RelaxedNumber(), "iou": BoxIoU(), "open": captions.get(arm, bmas)()}
    )


def pool(scale: str, arm: str, seed: int) -> list[Task]:
    """The samples of an arm: those of its type, or of all."""
    tasks = mixed_tasks(SIZES[scale]["pool"], seed=seed, broken=BROKEN, sizes=EASY_TO_HARD)
    mine = arm.split(",")[0]
    return [t for t in tasks if mine not in TYPES or t.meta["type"] == mine]


def filtered(scale: str, out: Path, seed: int) -> list[Task]:
    """The samples of the whole pool from which the warm policy can learn something, as many of each type as there are of
    the rarest."""
    tasks, policy = pool(scale, "mixed", seed), warm(scale, out)
    routed = reward_of("mixed", policy)

    def rate(trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
        value = [s.parts["accuracy"] for s in routed(trajectories)]
        return {"mean": value, "square": [v * v for v in value]}

    found = measure(policy, tasks, rate, samples=GROUP, max_tokens=MAX_TOKENS, seed=10_000 + seed)
    mean = np.array(found["mean"])
    source = [t.meta["type"] for t in tasks]
    choose = partial(select_by_rollouts, mean, np.array(found["square"]) - mean**2, source, continuous=CONTINUOUS, min_var=1e-4)  # fmt: skip
    rarest = min(sum(source[k] == kind for k in choose()) for kind in TYPES)
    chosen = [tasks[k] for k in choose(per_source=max(1, rarest), seed=seed)]
    # A smoke run's policy may be so poor that hardly anything is left to learn from.
    return chosen if len(chosen) >= 4 * SIZES[scale]["prompts"] else tasks


def rate(trajectories: Sequence[Trajectory], routed: Reward) -> dict[str, list[float]]:
    """What is measured of each held-out response: its type's accuracy (hidden gold for captions), length, form."""
    scores = routed(trajectories)
    answers = [last_block(policy_text(t), "answer") or "" for t in trajectories]
    gold = [
        triple_f1(answer, t.task.meta["triples"]) if t.task.meta["type"] == "open" else s.parts["accuracy"]
        for t, s, answer in zip(trajectories, scores, answers, strict=True)
    ]
    return {
        "gold": gold,
        "length": [float(len(t)) for t in trajectories],
        "format": [s.parts["format"] for s in scores],
        "reward": [s.parts["accuracy"] for s in scores],
    }


def run(scale: str, out: Path, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm and measure it on held-out samples of all types."""
    size, policy = SIZES[scale], warm(scale, out)
    routed, row = reward_of("mixed", policy), {}
    if arm != "base":
        tasks = filtered(scale, out, seed) if arm == "mixed, filtered" else pool(scale, arm, seed)
        prompts = size["prompts"] * (4 if arm.startswith("mixed") else 1)
        watch = BySource()
        settings = {
            "steps": size["steps"],
            "prompts_per_step": prompts,
            "group_size": GROUP,
            "max_tokens": MAX_TOKENS,
            "optimiser": {"lr": LR, "schedule": "linear"},
            "kl_coef": 0.04,
            "seed": seed,
        }
        train(policy, tasks, reward_of(arm, policy), settings=settings, callbacks=[watch])
        row = {"sources": watch.rows, "samples": len(tasks), "broken": sum(t.meta["source"] == "broken" for t in tasks)}
    test = mixed_tasks(size["test"], split="test", sizes=EASY_TO_HARD)
    found = measure(policy, test, partial(rate, routed=routed), samples=4, max_tokens=MAX_TOKENS, seed=seed)
    for k, kind in enumerate(TYPES):  # the types come in turn
        row[kind] = {key: values[k :: len(TYPES)] for key, values in found.items()}
    return row


LR = 5e-4


def reproduce(scale: str, seeds: Sequence[int], out: Path) -> Result:
    """Train every arm from the shared warm policy for every seed, and test the claims.

    Args:
        scale: ``smoke``, ``cpu`` or ``gpu``.
        seeds: of the pools and of RL; the warm policy is shared.
        out: run folder; finished arms are not run again.
    """
    scale, out = require_scale(scale), Path(out)

    def start() -> dict[str, Any]:
        warm(scale, out)
        return {}

    with one_thread():
        prepared = kept(out / "warm.json", start)["seconds"]
        results = run_arms(out, ARMS, seeds, partial(run, scale, out))
    claims = judge(results, seeds, asserted=scale != "smoke")
    measured: dict[str, Any] = {
        arm: {
            **{f"{kind} {key}": float(column(results, arm, seeds, kind, key).mean()) for kind in TYPES for key in ("gold", "length", "format", "reward")},
            "average": float(average(results, arm, seeds).mean()),
        }
        for arm in ARMS
    }  # fmt: skip
    for arm in ("mixed", "mixed, filtered"):
        rows = [step for s in seeds for step in results[arm, s]["sources"]]
        for kind in TYPES:
            shares = [step[kind]["zero_variance"] for step in rows if kind in step]
            measured[arm][f"{kind} prompts without variance"] = float(np.mean(shares)) if shares else None
        measured[arm]["samples"] = [results[arm, s]["samples"] for s in seeds]
        measured[arm]["samples with broken golds"] = [results[arm, s]["broken"] for s in seeds]
    seconds = prepared + sum(r["seconds"] for r in results.values())
    return Result("mixed-r1", scale, tuple(seeds), tuple(claims), PAPER, measured, environment(), seconds, notes=NOTES)


def average(results: Mapping[tuple[str, int], Any], arm: str, seeds: Sequence[int]) -> np.ndarray:
    """``[seeds, items]`` mean over types; an item is one held-out sample of each type."""
    return np.mean([column(results, arm, seeds, kind, "gold") for kind in TYPES], axis=0)


def judge(results: Mapping[tuple[str, int], Any], seeds: Sequence[int], *, asserted: bool) -> list[Claim]:
    """The claims, over seeds and held-out samples, each sampled four times."""

    def of(arm: str, kind: str, key: str = "gold") -> np.ndarray:
        return column(results, arm, seeds, kind, key)

    options: dict[str, Any] = {"asserted": asserted}
    mixed = average(results, "mixed", seeds)
    claims = [
        paired_claim(f"1-average-{kind}", f"on average over the types, the mixed run is better than the specialist of {kind}", mixed, average(results, kind, seeds), **options)
        for kind in TYPES
    ]  # fmt: skip
    claims += [
        paired_claim(f"2-own-{kind}", f"on {kind} itself, it is within 0.03 of that specialist", of("mixed", kind), of(kind, kind), margin=-0.03, **options)
        for kind in TYPES
    ]  # fmt: skip
    claims += [
        paired_claim(f"3-routed-{kind}", f"on {kind}, routed rewards beat exact match for all types", of("mixed", kind), of("mixed, exact match", kind), **options)
        for kind in CONTINUOUS
    ]  # fmt: skip
    q, both, p = "open, Q only", "open", "open, P only"
    return [
        *claims,
        paired_claim("4-long-Q", "captions paid by Q alone are longer than by BMAS", of(q, "open", "length"), of(both, "open", "length"), **options),
        paired_claim("4-short-P", "captions paid by P alone are shorter than by BMAS", of(both, "open", "length"), of(p, "open", "length"), **options),
        paired_claim("5-triples-P", "BMAS names more of the picture rightly (triple F1) than P alone", of(both, "open"), of(p, "open"), **options),
        paired_claim("5-triples-Q", "and than Q alone", of(both, "open"), of(q, "open"), **options),
        paired_claim("6-filter", "at equal training rollouts, the filtered pool is at least as good as the unfiltered one", average(results, "mixed, filtered", seeds), mixed, **options),
    ]  # fmt: skip


NOTES = (
    "accuracy is over four samples of each held-out picture; captions are measured by triple F1, which no arm is paid for; a "
    "specialist sees the prompts of its type, the mixed run the union of all; ROUGE-L is reported beside BMAS, nothing is "
    "asserted of it; 'at least as good' is tested strictly: the lower bound of the difference must exceed 0"
)

PAPER = {"Mixed-45K": "about 45,000 samples", "Qwen2.5-VL and InternVL, reasoning benchmarks": "consistent gains of the mixed reward (no figure confirmed)"}  # fmt: skip

RECIPE = Recipe(
    slug="mixed-r1",
    title="Mixed-R1: Unified Reward Perspective For Reasoning Capability in Multimodal Large Language Models",
    reference="Xu, Li, Yang, Zhang, Sun, Chow, Li, Song, Xu, Tong, Li and Fei, 2025, arXiv 2505.24164",
    step="score",
    summary=(
        "Every sample of a mixture carries a type and gets that type's rule reward (match, relaxed number, IoU, or two-way "
        "similarity of static token embeddings for free text), all in [0, 1], so that one run of GRPO serves them all."
    ),
    claims=(
        "one mixed run is about as good as the specialists on each type, and better than each on average",
        "rewards of each type's own kind beat exact match for all",
        "two-way similarity is a usable reward for text, and each direction alone is hacked",
        "samples that the model always or never gets right are better left out",
    ),
    parts=(
        "guerdon.rewards.RoutedReward",
        "guerdon.rewards.ThinkAnswerFormat",
        "guerdon.rewards.ChoiceMatch",
        "guerdon.rewards.RelaxedNumber",
        "guerdon.rewards.BoxIoU",
        "guerdon.rewards.BMAS",
        "guerdon.rewards.max_average_similarity",
        "guerdon.rewards.select_by_rollouts",
    ),
    reproduce=reproduce,
    paper_numbers=PAPER,
)
