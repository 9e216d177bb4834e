"""The table of a world-facts run: the trained router, every baseline, the same questions, the same pools, one ledger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from guerdon.errors import ConfigError, MissingDependency
from guerdon.routing import baselines
from guerdon.routing.evaluate import RouterMetrics, measure
from guerdon.routing.pool import Pool
from guerdon.types import Task

__all__ = ["baseline_rows", "learned_chooser", "policy_rows"]


def learned_chooser(kind: str, testbed: Any, *, seed: int = 42) -> baselines.Chooser:
    """A trained single-round router over shuffled pools.

    Names and skills change from question to question, so what is learned is which *domain* answers a question:
    every training question is put to a specialist of each domain, the label is the best one (the first on
    ties), and at test time the cheapest member whose descriptor holds the predicted domain is asked. This
    reads descriptors perfectly, which is more than the method's own description grants it.

    Args:
        kind: ``"knn"`` (k = 5, uniform, Euclidean) or ``"mlp"`` (128 and 64 units, ReLU, Adam 1e-3, L2 1e-4, 500
            iterations), both on TF-IDF features.
        testbed: a :class:`~guerdon.routing.testbed.WorldFactsTestbed`.
        seed: of the MLP.
    """
    from guerdon.environments.worldfacts import Skill, Specialist
    from guerdon.rewards.answer import exact_match

    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.neural_network import MLPClassifier
        from sklearn.pipeline import make_pipeline
    except ImportError as error:
        raise MissingDependency("the KNN and MLP routers need scikit-learn: pip install 'guerdon[routers]'") from error
    tasks = testbed.tasks("train")
    experts = [Specialist(Skill((d,)), testbed.world, testbed.register, testbed.seed) for d in testbed.domains]
    scores = np.array(
        [[exact_match(testbed.read(e(t.question)[0]), list(t.reference)) for e in experts] for t in tasks]
    )
    models = {
        "knn": lambda: KNeighborsClassifier(n_neighbors=5, weights="uniform"),
        "mlp": lambda: MLPClassifier(
            (128, 64),
            activation="relu",
            solver="adam",
            learning_rate_init=1e-3,
            alpha=1e-4,
            max_iter=500,
            random_state=seed,
        ),
    }
    if kind not in models:
        raise ConfigError(f"kind must be knn or mlp, got {kind!r}")
    model = make_pipeline(TfidfVectorizer(), models[kind]())
    model.fit([t.question for t in tasks], scores.argmax(1))

    def choose(query: str, pool: Pool, rng: np.random.Generator) -> str:
        domain = testbed.domains[int(model.predict([query])[0])]
        known = [m for m in pool.values() if domain in m.descriptor]
        return min(known or list(pool.values()), key=lambda m: m.output_price).name

    return choose


async def baseline_rows(
    testbed: Any, tasks: Sequence[Task], pool_for: Callable[[Task, int], Pool], *, learned: bool = True, seed: int = 0
) -> list[RouterMetrics]:
    """All baselines that need no language model: single call, oracle, and multi-round with a perfect decomposition."""
    rows = []
    choosers: dict[str, baselines.Chooser] = {
        "random": baselines.random_member,
        "cheapest": baselines.cheapest,
        "largest": baselines.largest,
    }
    if learned:
        choosers |= {"KNN": learned_chooser("knn", testbed), "MLP": learned_chooser("mlp", testbed)}
    for name, choose in choosers.items():
        found = await baselines.single_call(tasks, pool_for, choose, read=testbed.read, seed=seed)
        rows.append(measure(f"{name}, one call", found, competence=testbed.competence, writes_tags=False))
    found = await baselines.oracle(tasks, pool_for, read=testbed.read)
    rows.append(measure("oracle, one call", found, competence=testbed.competence, writes_tags=False))
    for name, choose in choosers.items():
        found = await baselines.decomposed(tasks, pool_for, choose, testbed.decompose, read=testbed.read, seed=seed)
        rows.append(measure(f"{name}*, decomposed", found, competence=testbed.competence, writes_tags=False))
    return rows


async def policy_rows(
    router: Any, env: Any, tasks: Sequence[Task], testbed: Any, *, seed: int = 0
) -> list[RouterMetrics]:
    """The untrained router's rows: answering alone, naming one member, and the whole protocol before RL."""
    from dataclasses import replace

    from guerdon.routing.protocol import ActionKind, parse_action

    alone = await router.play(replace(env, max_calls=0), tasks, seed=seed)
    whole = await router.play(env, tasks, seed=seed)
    named: dict[str, str] = {}
    for trajectory in whole:
        first = next((t.text for t in trajectory.turns if t.speaker == "policy"), "")
        action = parse_action(first)
        named[trajectory.task.id] = action.name if action.kind is ActionKind.ROUTE else ""
    order = iter(tasks)

    def choose(query: str, pool: Pool, rng: np.random.Generator) -> str:
        wanted = pool.resolve(named[next(order).id])
        return wanted if wanted is not None else next(iter(pool))

    prompted = await baselines.single_call(tasks, env.pool_for, choose, read=testbed.read, seed=seed)
    return [
        measure("direct answer", alone, competence=testbed.competence),
        measure("prompted router, one call", prompted, competence=testbed.competence, writes_tags=False),
        measure("router before RL", whole, competence=testbed.competence),
    ]
