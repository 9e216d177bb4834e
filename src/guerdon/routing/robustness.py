"""Evaluation of a trained router under a changing and failing pool.

Does the policy read descriptors, or has it memorised names? Members are renamed, re-priced, removed and
added, descriptors are swapped, and calls are made to fail; every variation is one row over the same questions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.errors import CheckpointError
from guerdon.rollout.loop import derive_seed
from guerdon.routing.evaluate import RouterMetrics, measure
from guerdon.routing.faults import FaultyBackend
from guerdon.routing.pool import Pool
from guerdon.routing.retry import RetryPolicy
from guerdon.types import Task

__all__ = ["FAULT_RATES", "evaluate_run", "variations"]

FAULT_RATES: Mapping[str, Mapping[str, float]] = {
    "30% time-outs": {"timeout": 0.3},
    "30% rate limits": {"429": 0.3},
    "30% null replies": {"null": 0.3},
    "30% forged answers": {"forged_answer": 0.3},
    "30% forged searches": {"forged_search": 0.3},
    "30% wrong model": {"wrong_model": 0.3},
}

PoolFor = Callable[[Task, int], Pool]


def variations(pool_for: PoolFor, held_out: PoolFor) -> dict[str, PoolFor]:
    """Pools per question under every variation of the members.

    Args:
        pool_for: the pools of the plain evaluation.
        held_out: pools with unseen names and unseen pairs of skills.
    """

    def rng(task: Task) -> np.random.Generator:
        return np.random.default_rng([11, derive_seed(task.id)])

    def renamed(task: Task, group: int) -> Pool:
        pool = pool_for(task, group)
        names = list(held_out(task, group))
        return pool.view(rename=dict(zip(pool, names, strict=True)))

    def shuffled(task: Task, group: int) -> Pool:
        pool = pool_for(task, group)
        names = list(pool)
        order = rng(task).permutation(len(names))
        return pool.view(rename={a: names[k] for a, k in zip(names, order, strict=True)})

    def swapped(task: Task, group: int) -> Pool:
        pool = pool_for(task, group)
        names = list(pool)
        # A rotation: every member wears another one's descriptor and price tag.
        others = names[1:] + names[:1]
        return pool.view(
            descriptors={a: pool[b].descriptor for a, b in zip(names, others, strict=True)},
            reprice={a: (pool[b].input_price, pool[b].output_price) for a, b in zip(names, others, strict=True)},
        )

    def repriced(task: Task, group: int) -> Pool:
        pool = pool_for(task, group)
        return pool.view(reprice={n: (m.input_price, 22.0 - m.output_price) for n, m in pool.items()})

    def without_one(task: Task, group: int) -> Pool:
        pool = pool_for(task, group)
        names = list(pool)
        gone = int(rng(task).integers(len(names)))
        return pool.view(members=[n for k, n in enumerate(names) if k != gone])

    def with_two(task: Task, group: int) -> Pool:
        pool, more = pool_for(task, group), held_out(task, group)
        firsts = {n.partition("-")[0] for n in pool}
        new = [n for n in more if n.partition("-")[0] not in firsts][:2]
        return pool.view(add=[(more[n], more.backend(n)) for n in new])

    return {
        "names shuffled": shuffled,
        "unseen names": renamed,
        "unseen names and skills": held_out,
        "descriptors swapped": swapped,
        "prices turned round": repriced,
        "one member removed": without_one,
        "unseen members added": with_two,
    }


def _faulty(pool_for: PoolFor, rates: Mapping[str, float]) -> PoolFor:
    def make(task: Task, group: int) -> Pool:
        pool = pool_for(task, group)
        return Pool(
            [
                (m, FaultyBackend(pool.backend(n), rates, seed=derive_seed(task.id, n) & 0xFFFFFFFF))
                for n, m in pool.items()
            ],
            ledger=pool.ledger,
            retry=RetryPolicy(attempts=1),
        )

    return make


async def evaluate_run(
    folder: str | Path,
    *,
    questions: int = 300,
    robustness: bool = True,
    data: Path | None = None,
    pool: Path | None = None,
    baselines: bool = True,
    seed: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> list[RouterMetrics]:
    """Measure the router of a run.

    Args:
        folder: what ``guerdon route train`` or ``demo`` wrote.
        questions: how many.
        robustness: add the rows under :func:`variations` and :data:`FAULT_RATES` (world facts only).
        data, pool: own questions (JSONL) and the pool that they are put to; world facts otherwise.
        baselines: add the baselines' rows (world facts only).
        seed: of the questions.
        say: told about progress.

    Raises:
        CheckpointError: the folder holds no whole router.
    """
    from guerdon.routing.router_r1 import RouterR1
    from guerdon.routing.run import _env, read_questions
    from guerdon.routing.table import baseline_rows
    from guerdon.routing.testbed import WorldFactsTestbed

    router = RouterR1.load(folder)
    try:
        if data is not None and pool is not None:
            members = Pool.from_yaml(pool)
            members.check()
            tasks = read_questions(data)[:questions]
            env = _env(router.policy, router.settings, pool=members)
            try:
                return [measure("Router-R1", await router.play(env, tasks, seed=seed))]
            finally:
                await members.aclose()
        register = "compact" if router.settings.prompt == "compact" else "natural"
        run_seed = _seed_of(Path(folder))
        testbed = WorldFactsTestbed(register, shuffled=_shuffled(Path(folder)), seed=run_seed)
        unseen = WorldFactsTestbed(register, held_out=True, seed=run_seed)
        tasks = testbed.balanced("test", questions, seed=seed)
        plain: PoolFor = lambda task, group: testbed.pool_for(task, 0)  # noqa: E731
        novel: PoolFor = lambda task, group: unseen.pool_for(task, 0)  # noqa: E731
        conditions: dict[str, PoolFor] = {"Router-R1": plain}
        if robustness:
            conditions |= {f"Router-R1, {name}": p for name, p in variations(plain, novel).items()}
            conditions |= {f"Router-R1, {name}": _faulty(plain, rates) for name, rates in FAULT_RATES.items()}
        rows = []
        for name, pool_for in conditions.items():
            say(name)
            env = replace(_env(router.policy, router.settings, pool_for=pool_for))
            rows.append(measure(name, await router.play(env, tasks, seed=seed), competence=testbed.competence))
        if baselines:
            say("baselines")
            rows += await baseline_rows(testbed, tasks, plain)
        return rows
    finally:
        await router.aclose()


def _setting(folder: Path, *keys: str, default: Any) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not a run's configuration: {error}") from error
    for key in keys:
        value = value.get(key, default) if isinstance(value, dict) else default
    return value


def _seed_of(folder: Path) -> int:
    return int(_setting(folder, "seed", default=0))


def _shuffled(folder: Path) -> bool:
    return bool(_setting(folder, "data", "shuffled", default=True))
