"""Transforming and combining rewards (arXiv 2402.00742): is the sum of log-sigmoid rewards better than the sum of rewards?

Testbed: prompts with discrete candidate responses, so that every KL-regularised optimum is an exact tilt
``pi0 exp(u / gamma)`` and no noise of RL comes in. A candidate has two true attributes that pull against each other; it
is good on a count where the attribute beats the prompt's own 0.85 quantile. The proxies are Bradley-Terry logits of the
attributes with heavy-tailed errors, which a policy can hack. All arms are compared at equal mean KL, never at equal
gamma: their rewards have different scales. Run it with ``guerdon reproduce transform-combine``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.papers.evidence import Claim, Result, environment, paired_claim, require_scale
from guerdon.papers.recipe import Recipe

SIZES: Mapping[str, Mapping[str, int]] = {
    "smoke": {"prompts": 20, "candidates": 32, "samples": 16},
    "cpu": {"prompts": 300, "candidates": 256, "samples": 64},
    "gpu": {"prompts": 3000, "candidates": 1024, "samples": 64},
}
KLS = (0.5, 1.0, 2.0, 4.0)
WEIGHTS = tuple(round(0.1 * k, 1) for k in range(11))
BEST_OF = (4, 16, 64)


@dataclass(frozen=True)
class World:
    """Prompts with their candidates: all arrays are ``[P, C]``.

    Args:
        base: probability of each candidate under the base policy.
        good: hidden probability of being good on both counts.
        proxies: learned rewards by name.
        error: the proxies' errors, summed.
        samples: ``[P, m]`` indices of candidates drawn from the base policy, from which references are estimated.
    """

    base: np.ndarray
    good: np.ndarray
    proxies: Mapping[str, np.ndarray]
    error: np.ndarray
    samples: np.ndarray


def make_world(rng: np.random.Generator, prompts: int, candidates: int, samples: int) -> World:
    """Draw prompts: attributes correlated by -0.5, sharpness 4, errors of half a Student t with 2 degrees of freedom."""
    shape = (prompts, candidates)
    base = np.exp(rng.normal(size=shape))
    base /= base.sum(1, keepdims=True)
    first = rng.normal(size=shape)
    second = -0.5 * first + np.sqrt(0.75) * rng.normal(size=shape)
    good = np.ones(shape)
    proxies, error = {}, np.zeros(shape)
    for name, noise in (("helpful", first), ("harmless", second)):
        attribute = noise + rng.normal(size=(prompts, 1))
        good /= 1.0 + np.exp(-4.0 * (attribute - weighted_quantile(attribute, base, 0.85)[:, None]))
        wrong = 0.5 * rng.standard_t(2, size=shape)
        proxies[name] = 4.0 * attribute + rng.normal(size=(prompts, 1)) + wrong
        error += wrong
    drawn = np.stack([rng.choice(candidates, size=samples, p=row) for row in base])
    return World(base, good, proxies, error, drawn)


def weighted_quantile(values: np.ndarray, weights: np.ndarray, q: float) -> np.ndarray:
    """``[P]`` smallest value of each row at which the weights of it and all below reach ``q``."""
    order = values.argsort(1)
    mass = np.take_along_axis(weights, order, 1).cumsum(1)
    at = (mass >= q - 1e-12).argmax(1)
    return np.take_along_axis(np.take_along_axis(values, order, 1), at[:, None], 1)[:, 0]


def log_sigmoid_sum(world: World) -> np.ndarray:
    """The paper's utility, references being the 0.85 quantile of each prompt's base samples."""
    import torch

    from guerdon.shaping import AllGood, LogSigmoidCentered

    prompts = range(len(world.base))
    transforms = {
        name: LogSigmoidCentered().fit(prompts, np.take_along_axis(r, world.samples, 1))
        for name, r in world.proxies.items()
    }
    return AllGood(transforms)({name: torch.from_numpy(r) for name, r in world.proxies.items()}, prompts).numpy()


def weighted_sum(world: World, w: float) -> np.ndarray:
    """The baseline's utility; 0.5 is the plain sum but for its scale, which the KL takes care of."""
    return w * world.proxies["helpful"] + (1 - w) * world.proxies["harmless"]


def tilt(world: World, utility: np.ndarray, kl: float) -> np.ndarray:
    """``[P, C]`` the optimum ``pi0 exp(u / gamma)`` whose KL to the base policy is ``kl`` nats on average over prompts."""
    low, high = -8.0, 8.0
    centred = utility - utility.max(1, keepdims=True)
    policy = world.base
    for _ in range(40):
        middle = (low + high) / 2
        logits = np.log(world.base) + centred * np.exp(middle)
        policy = np.exp(logits - logits.max(1, keepdims=True))
        policy /= policy.sum(1, keepdims=True)
        # A candidate without mass contributes nothing.
        terms = np.where(policy > 0, policy * np.log(np.maximum(policy, 1e-300) / world.base), 0.0)
        if terms.sum(1).mean() > kl:
            high = middle
        else:
            low = middle
    return policy


def reproduce(scale: str, seeds: Sequence[int], out: Path) -> Result:
    """Compute every arm's optimum at every KL for every seed, and test the claims.

    Args:
        scale: ``smoke``, ``cpu`` or ``gpu``.
        seeds: of the prompts, candidates and errors.
        out: unused; nothing here is worth keeping.
    """
    started = time.perf_counter()
    scale = require_scale(scale)
    size = SIZES[scale]
    rows: dict[tuple[str, float], dict[str, list[np.ndarray]]] = {}
    best: dict[tuple[str, int], list[np.ndarray]] = {}
    chosen: dict[float, list[float]] = {kl: [] for kl in KLS}
    before: list[np.ndarray] = []
    for seed in seeds:
        rng = np.random.default_rng([seed, 7])
        tuning, world = (make_world(rng, **size) for _ in range(2))
        before.append((world.base * world.good).sum(1))
        for kl in KLS:
            # The baseline's weight is chosen on other prompts, by the gold value itself: it could not be tuned better.
            gold = {w: (tilt(tuning, weighted_sum(tuning, w), kl) * tuning.good).sum(1).mean() for w in WEIGHTS}
            weight = max(WEIGHTS, key=lambda w, gold=gold: gold[w])  # type: ignore[misc]
            chosen[kl].append(weight)
            arms: dict[str, np.ndarray] = {
                "raw sum": weighted_sum(world, 0.5),
                "best weighted sum": weighted_sum(world, weight),
                "log-sigmoid sum": log_sigmoid_sum(world),
            }
            for arm, utility in arms.items():
                policy = tilt(world, utility, kl)
                found = rows.setdefault((arm, kl), {})
                after = (policy * world.good).sum(1)
                found.setdefault("good", []).append(after)
                found.setdefault("unimproved", []).append((after - before[-1] < 0.05).astype(float))
                found.setdefault("proxy", []).append((policy * (2 * weighted_sum(world, 0.5))).sum(1))
                found.setdefault("error", []).append((policy * world.error).sum(1))
        for k in BEST_OF:
            drawn = np.stack([rng.choice(size["candidates"], size=k, p=row) for row in world.base])
            for arm, utility in (("raw sum", weighted_sum(world, 0.5)), ("log-sigmoid sum", log_sigmoid_sum(world))):
                first = np.take_along_axis(utility, drawn, 1).argmax(1)
                at = np.take_along_axis(drawn, first[:, None], 1)
                best.setdefault((arm, k), []).append(np.take_along_axis(world.good, at, 1)[:, 0])
    claims = _judge(rows, best, asserted=scale != "smoke")
    measured: dict[str, Any] = {
        "good on both, base policy": float(np.mean(before)),
        "at equal mean KL": {
            f"{arm}, {kl} nats": {key: float(np.mean(values)) for key, values in found.items()}
            for (arm, kl), found in rows.items()
        },
        "weight of helpful in the best weighted sum": chosen,
        "best of k, good on both": {f"{arm}, k={k}": float(np.mean(values)) for (arm, k), values in best.items()},
    }
    return Result(
        "transform-combine", scale, tuple(seeds), tuple(claims), PAPER, measured, environment(),
        time.perf_counter() - started,
        notes="exact optima on discrete candidates; intervals over seeds and prompts; the weighted baseline's weight is "
        "chosen by gold on prompts of its own",
    )  # fmt: skip


def _judge(
    rows: Mapping[tuple[str, float], Mapping[str, Sequence[np.ndarray]]],
    best: Mapping[tuple[str, int], Sequence[np.ndarray]],
    *,
    asserted: bool,
) -> list[Claim]:
    def of(arm: str, kl: float, key: str) -> np.ndarray:
        return np.array(rows[arm, kl][key])

    ours, raw, tuned = "log-sigmoid sum", "raw sum", "best weighted sum"
    claims: list[Claim] = []

    def add(name: str, statement: str, better: Any, worse: Any, **details: Any) -> None:
        claims.append(paired_claim(name, statement, better, worse, asserted=asserted, details=details))

    for kl in (2.0, 4.0):
        add(
            f"1-both-good-kl{kl:g}",
            f"at a KL of {kl:g} nats, more probability of being good on both counts than the raw sum",
            of(ours, kl, "good"),
            of(raw, kl, "good"),
        )
        add(
            f"1-both-good-tuned-kl{kl:g}",
            f"at a KL of {kl:g} nats, also more than the best weighted sum",
            of(ours, kl, "good"),
            of(tuned, kl, "good"),
        )
        left, right = of(raw, kl, "unimproved"), of(ours, kl, "unimproved")
        add(
            f"2-unimproved-kl{kl:g}",
            f"at a KL of {kl:g} nats, fewer prompts whose probability of both rose by less than 0.05",
            left,
            right,
            mcnemar=mcnemar(left, right),
            share_raw=float(left.mean()),
            share_log_sigmoid=float(right.mean()),
        )
        add(
            f"3-errors-kl{kl:g}",
            f"at a KL of {kl:g} nats, less of the proxies' error is selected than under the raw sum",
            of(raw, kl, "error"),
            of(ours, kl, "error"),
        )
        add(
            f"4-raw-wins-its-own-kl{kl:g}",
            f"at a KL of {kl:g} nats, the raw sum has the higher raw proxy (as it must: it maximises it)",
            of(raw, kl, "proxy"),
            of(ours, kl, "proxy"),
        )
    add("5-best-of-16", "best of 16 by the log-sigmoid sum is good on both counts more often than best of 16 by the raw sum", np.array(best[ours, 16]), np.array(best[raw, 16]))  # fmt: skip
    return claims


def mcnemar(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Exact one-sided McNemar test that ``first`` is 1 more often than ``second`` on the same items."""
    from scipy.stats import binomtest

    more, less = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
    p = binomtest(more, more + less, 0.5, alternative="greater").pvalue if more + less else 1.0
    return {"only_first": more, "only_second": less, "p_value": float(p)}


PAPER: Mapping[str, Any] = {
    "abstract": "substantial improvements over the baseline for helpful and harmless RLHF (no figure is given there)"
}

RECIPE = Recipe(
    slug="transform-combine",
    title="Transforming and Combining Rewards for Aligning Large Language Models",
    reference="Wang, Nagpal, Berant, Eisenstein, D'Amour, Koyejo and Veitch, ICML 2024, arXiv 2402.00742",
    step="shape",
    summary=(
        "A Bradley-Terry reward is centred on the score of a reference-quality response to the same prompt and passed "
        "through the log-sigmoid: the log-probability that the response is good. The sum over several rewards is the "
        "log-probability of being good on all counts, with diminishing returns on each."
    ),
    claims=(
        "at equal KL, the sum of log-sigmoid rewards is good on all counts more often than the (weighted) sum of rewards",
        "improvement is spread over prompts: fewer are left where they were",
        "errors of the reward models are exploited less",
    ),
    parts=(
        "guerdon.shaping.LogSigmoidCentered",
        "guerdon.shaping.AllGood",
        "guerdon.shaping.AllGoodScores",
        "guerdon.shaping.best_of_k_kl",
    ),
    reproduce=reproduce,
    paper_numbers=PAPER,
    seeds=5,
)
