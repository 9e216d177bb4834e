"""Router-R1 (arXiv 2506.09033): does RL on rule rewards teach a policy when to call, whom, and when to stop?

Testbed: one- and two-hop questions over real facts, six simulated specialists whose names are shuffled over their
skills for every question, a policy of about a million parameters that was warm-started on scripts with uniformly
random members and a random number of calls. One warm start serves all arms and seeds; a seed draws the RL run and the
held-out questions. Run it with ``guerdon reproduce router-r1``. How the small policy learned to read the roster stands
in docs/decisions/004, and why a price from the first step ends in one call, in 006.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.papers.evidence import Claim, Result, environment, paired_claim, require_scale, statistic_claim
from guerdon.papers.recipe import Recipe

ARMS: Mapping[str, Mapping[str, Any]] = {
    "alpha 0": {"alpha": 0.0},
    "alpha 0.6": {"alpha": 0.6},
    "alpha 0.8": {"alpha": 0.8},
    "alpha 0.9": {"alpha": 0.9},
    "alpha 0.9, cost paid when wrong": {"alpha": 0.9, "gate_wrong": False},
    "no format reward": {"alpha": 0.0, "gate_format": False},
}
"""Settings of the reward, an arm each. The demo prices calls later in training, which the paper does not (decision 006)."""
FIRST_SEED_ONLY = ("alpha 0.6", "alpha 0.8")
"""Arms that no claim needs: points of the curve, run for the first seed."""

SIZES: Mapping[str, Mapping[str, int]] = {
    "smoke": {"rollouts": 200, "sft": 4, "steps": 2, "prompts": 4, "group": 4, "questions": 20},
    "cpu": {"rollouts": 9_600, "sft": 200, "steps": 40, "prompts": 12, "group": 12, "questions": 500},
    "gpu": {"rollouts": 40_000, "sft": 800, "steps": 100, "prompts": 32, "group": 16, "questions": 500},
}
"""Warm start, RL steps, prompts of each, group, held-out questions."""


def config(scale: str, arm: str = "alpha 0") -> Any:
    """The run's configuration at a scale, with the settings of an arm."""
    from guerdon.routing.run import RewardConfig, RunConfig

    size, reward = SIZES[scale], ARMS[arm]
    steps = size["steps"]
    base = RunConfig()
    assert base.warm_start is not None
    sft, online = base.warm_start.sft, base.online
    sft = sft.model_copy(
        update={
            "steps": size["sft"],
            "optimiser": sft.optimiser.model_copy(update={"warmup": min(sft.optimiser.warmup, size["sft"] - 1)}),
        }
    )
    online = online.model_copy(
        update={
            "steps": steps,
            "prompts_per_step": size["prompts"],
            "group_size": size["group"],
            "save_every": 0,
            "optimiser": online.optimiser.model_copy(update={"warmup": min(3, steps - 1)}),
        }
    )
    return base.model_copy(
        update={
            "warm_start": base.warm_start.model_copy(update={"rollouts": size["rollouts"], "sft": sft}),
            "online": online,
            "evaluation": base.evaluation.model_copy(update={"questions": size["questions"]}),
            "reward": RewardConfig(**reward),
        }
    )


def reproduce(scale: str, seeds: Sequence[int], out: Path) -> Result:
    """Train every arm from the shared warm start for every seed, and test the claims.

    Args:
        scale: ``smoke``, ``cpu`` or ``gpu``.
        seeds: of RL and of the evaluation's questions.
        out: run folder; finished arms are not run again.
    """
    scale = require_scale(scale)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    warm, warm_seconds = _warm_start(scale, out)
    jobs = [
        (scale, str(warm), str(out), arm, seed)
        for k, seed in enumerate(seeds)
        for arm in ARMS
        if k == 0 or arm not in FIRST_SEED_ONLY
    ]
    workers = max(1, min(len(jobs), len(os.sched_getaffinity(0)))) if scale != "gpu" else 1
    results: dict[tuple[str, int], dict[str, Any]] = {}
    if workers == 1:
        results = {(arm, seed): _arm(scale, w, o, arm, seed) for scale, w, o, arm, seed in jobs}
    else:
        # Many small operations: one process with one thread on each core is twice as fast as two threads.
        with multiprocessing.get_context("spawn").Pool(workers, initializer=_one_thread) as pool:
            for (_, _, _, arm, seed), done in zip(jobs, pool.starmap(_arm, jobs, chunksize=1), strict=True):
                results[arm, seed] = done
    began = time.perf_counter()
    baselines = [_baselines(scale, seed) for seed in seeds]
    claims, measured = _judge(results, baselines, list(seeds), asserted=scale != "smoke")
    # What was spent on every part, whichever start of the command it was spent in.
    spent = warm_seconds + sum(r["seconds"] for r in results.values()) + time.perf_counter() - began
    return Result(
        "router-r1", scale, tuple(seeds), tuple(claims), PAPER, measured, environment(), spent,
        notes=(
            "one warm start shared by all arms and seeds; intervals over seeds and held-out questions; duration_s is the "
            f"sum over warm start, arms and evaluation, of which {workers} ran at a time. Claims 6a and 6b are not the "
            "paper's: at alpha 0 money does not count, and within these steps some seeds stay with the dear generalist. The "
            "demo, whose price comes later and whose run is twice as long, leaves it (results/bench/router_r1_demo.json)"
        ),
    )  # fmt: skip


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _warm_start(scale: str, out: Path) -> tuple[Path, float]:
    """The shared warm start, made once, and the seconds that it took."""
    from guerdon.routing.run import RouteRun

    target, clock = out / "warm_start" / "policy", out / "warm_start" / "seconds.json"
    if not (target.is_dir() and clock.is_file()):
        began = time.perf_counter()
        run = RouteRun(config(scale), out, say=_say)
        prepared = run.prepare()
        run.warm_start(prepared)
        prepared.policy.save(target)
        clock.write_text(json.dumps(time.perf_counter() - began), encoding="utf-8")
    return target, float(json.loads(clock.read_text(encoding="utf-8")))


def _arm(scale: str, warm: str, out: str, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm and measure it; the result is kept in a file, so that a second start skips it."""
    from guerdon.policies import Policy
    from guerdon.routing.evaluate import measure
    from guerdon.routing.router_r1 import RouterR1
    from guerdon.routing.run import RouteRun
    from guerdon.routing.testbed import WorldFactsTestbed

    folder = Path(out) / "arms" / f"{arm.replace(' ', '_').replace(',', '')}-{seed}"
    done = folder / "done.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    began = time.perf_counter()
    settings = config(scale, arm)
    settings = settings.model_copy(update={"online": settings.online.model_copy(update={"seed": seed})})
    run = RouteRun(settings, folder)
    prepared = replace(run.prepare(), policy=Policy.load(warm))
    run.online(prepared)
    router = RouterR1(prepared.policy, settings=prepared.settings)
    testbed = prepared.testbed
    unseen = WorldFactsTestbed(testbed.register, held_out=True, seed=testbed.seed)
    tasks = testbed.balanced("test", SIZES[scale]["questions"], seed=seed + 1)

    async def rows() -> dict[str, Any]:
        plain = replace(prepared.env, pool_for=lambda task, group: testbed.pool_for(task, 0))
        novel = replace(prepared.env, pool_for=lambda task, group: unseen.pool_for(task, 0))
        out = {
            "greedy": measure(arm, await router.play(plain, tasks, seed=seed), competence=testbed.competence),
        }
        if arm in ("alpha 0", "no format reward"):
            out["sampled"] = measure(
                arm, await router.play(plain, tasks, seed=seed, temperature=1.0), competence=testbed.competence
            )
        if arm == "alpha 0":
            out["unseen"] = measure(arm, await router.play(novel, tasks, seed=seed), competence=unseen.competence)
        await router.aclose()
        return {name: row.to_dict(items=True) for name, row in out.items()}

    value = asyncio.run(rows()) | {"seconds": time.perf_counter() - began}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = done.with_suffix(".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, done)
    _say(
        f"{arm}, seed {seed}: EM {value['greedy']['em']:.3f}, calls {value['greedy']['calls']:.2f}, raw cost {value['greedy']['raw_cost']:.1f}"
    )
    return value


def _baselines(scale: str, seed: int) -> list[dict[str, Any]]:
    from guerdon.routing.table import baseline_rows
    from guerdon.routing.testbed import WorldFactsTestbed

    testbed = WorldFactsTestbed("compact", shuffled=config(scale).data.shuffled, seed=0)
    tasks = testbed.balanced("test", SIZES[scale]["questions"], seed=seed + 1)
    rows = asyncio.run(baseline_rows(testbed, tasks, lambda task, group: testbed.pool_for(task, 0)))
    return [row.to_dict(items=True) for row in rows]


def _judge(
    results: Mapping[tuple[str, int], Mapping[str, Any]],
    baselines: Sequence[Sequence[Mapping[str, Any]]],
    seeds: Sequence[int],
    *,
    asserted: bool,
) -> tuple[list[Claim], dict[str, Any]]:
    def arm(name: str, key: str, how: str = "greedy", hops: int | None = None) -> np.ndarray:
        rows = []
        for seed in seeds:
            items = results[name, seed][how]["items"]
            values = np.array(items[key], dtype=float)
            rows.append(values if hops is None else values[np.array(items["hops"]) == hops])
        return np.array(rows)

    def baseline(name: str, key: str, hops: int | None = None) -> np.ndarray:
        rows = []
        for per_seed in baselines:
            items = next(r for r in per_seed if r["name"] == name)["items"]
            values = np.array(items[key], dtype=float)
            rows.append(values if hops is None else values[np.array(items["hops"]) == hops])
        return np.array(rows)

    singles = [r["name"] for r in baselines[0] if r["name"].endswith("one call") and not r["name"].startswith("oracle")]
    best = max(singles, key=lambda n: baseline(n, "em").mean())
    generalist = "largest*, decomposed"
    options: dict[str, Any] = {"asserted": asserted}
    claims = [
        paired_claim("1a-two-hop", f"EM on two-hop questions exceeds the best single-call router's ({best})", arm("alpha 0", "em", hops=2), baseline(best, "em", hops=2), **options),
        paired_claim("1b-more-calls", "two-hop questions get more calls than one-hop questions", arm("alpha 0", "calls", hops=2), arm("alpha 0", "calls", hops=1), **options),
        paired_claim("2a-cheaper", "raw cost at alpha = 0.9 is below that at alpha = 0", arm("alpha 0", "raw_cost"), arm("alpha 0.9", "raw_cost"), **options),
        paired_claim("2b-no-worse", "EM at alpha = 0 is at least that at alpha = 0.9 minus 0.02", arm("alpha 0", "em"), arm("alpha 0.9", "em"), margin=-0.02, **options),
        statistic_claim("3-unseen", "EM with unseen names and skill pairs is at least 0.9 times that with training names", [arm("alpha 0", "em", "unseen"), arm("alpha 0", "em")], lambda u, p: u - 0.9 * p, **options),
        paired_claim("4a-gate-calls", "paying cost when wrong, at alpha = 0.9, gives fewer calls", arm("alpha 0.9", "calls"), arm("alpha 0.9, cost paid when wrong", "calls"), **options),
        paired_claim("4b-gate-em", "paying cost when wrong, at alpha = 0.9, gives lower EM", arm("alpha 0.9", "em"), arm("alpha 0.9, cost paid when wrong", "em"), **options),
        paired_claim("5-format", "without the format reward more sampled responses break the format", arm("no format reward", "format_error", "sampled"), arm("alpha 0", "format_error", "sampled"), **options),
        paired_claim("6a-generalist-em", "EM exceeds always asking the dear generalist with a perfect decomposition", arm("alpha 0", "em"), baseline(generalist, "em"), **options),
        paired_claim("6b-generalist-cost", "raw cost is below always asking the dear generalist with a perfect decomposition", baseline(generalist, "raw_cost"), arm("alpha 0", "raw_cost"), **options),
    ]  # fmt: skip

    def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        keys = (
            "em",
            "f1",
            "usd_per_1000",
            "raw_cost",
            "calls",
            "valid_route_rate",
            "format_error_rate",
            "competent_rate",
        )
        out: dict[str, Any] = {k: float(np.mean([r[k] for r in rows])) for k in keys if rows[0][k] is not None}
        for key in ("em", "calls"):
            out[f"{key}_by_hops"] = {
                h: float(np.mean([r["by_hops"][h][key] for r in rows])) for h in rows[0]["by_hops"]
            }
        return out

    measured: dict[str, Any] = {
        name: {
            how: summary([results[name, s][how] for s in seeds if (name, s) in results])
            for how in results[name, seeds[0]]
            if how != "seconds"
        }
        for name in ARMS
    }
    measured["seconds_per_arm"] = float(np.mean([r["seconds"] for r in results.values()]))
    measured["competent_rate_per_seed"] = [results["alpha 0", s]["greedy"]["competent_rate"] for s in seeds]
    measured["baselines"] = {
        row["name"]: summary([next(r for r in per if r["name"] == row["name"]) for per in baselines])
        for row in baselines[0]
    }
    return claims, measured


PAPER = {
    "exact match, Router-R1-Qwen, mean of seven sets": 0.416,
    "exact match, largest LLM, mean of seven sets": 0.338,
    "alpha sweep, HotpotQA: alpha to (EM, raw cost)": {
        "0.0": [0.352, 138.6],
        "0.6": [0.332, 124.3],
        "0.8": [0.238, 28.2],
        "0.9": [0.186, 5.3],
    },
    "unseen members, EM before and after, mean of four sets": [0.458, 0.463],
}

RECIPE = Recipe(
    slug="router-r1",
    title="Router-R1: Teaching LLMs Multi-Round Routing and Aggregation via Reinforcement Learning",
    reference="Zhang, Feng and You, NeurIPS 2025, arXiv 2506.09033",
    step="route",
    summary=(
        "The router is itself a language model: it thinks, asks members of a priced pool in several rounds, reads their "
        "replies and answers. It is trained by RL on a format gate, the outcome, and a running-percentile cost."
    ),
    claims=(
        "multi-round routing beats the best single-call router where one call cannot answer",
        "the cost coefficient trades quality for money",
        "unseen members are used by their descriptors, without retraining",
        "without the wrong-answer gate the policy learns to call nobody",
        "the format reward keeps the protocol intact",
    ),
    parts=(
        "guerdon.routing.env.RoutingEnv",
        "guerdon.routing.reward.HierarchicalReward",
        "guerdon.rewards.RouterFormat",
        "guerdon.rewards.ExactMatch",
        "guerdon.shaping.RunningPercentileCost",
        "guerdon.shaping.hierarchical",
        "guerdon.routing.router_r1.router_r1_train",
        "guerdon.routing.router_r1.evaluate_router",
    ),
    reproduce=reproduce,
    paper_numbers=PAPER,
    needs=("testbeds", "routers"),
)
