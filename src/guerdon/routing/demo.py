"""The demo: train a small Router-R1 on world facts, measure it beside the baselines, and ask it one question."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from guerdon.routing.evaluate import COLUMNS, RouterMetrics, rows_table
from guerdon.routing.run import Prepared, RouteRun, RunConfig, write_rows
from guerdon.training.settings import load_yaml

__all__ = ["PRICED", "demo", "simulated_pool_yaml"]

PRICED = ("reward.alpha=0.6", "reward.alpha_after=20", "reward.alpha_ramp=10")
"""The demo's own settings: learn to answer first, then what calls cost (docs/decisions/006)."""


def simulated_pool_yaml(entries: Sequence[Any], register: str = "compact", seed: int = 0) -> str:
    """A pool file with these simulated specialists, for ``guerdon route ask`` and ``guerdon serve``."""
    import yaml

    from guerdon.environments.worldfacts import descriptor

    members = [
        {
            "name": e.name,
            "descriptor": descriptor(e.skill, register),  # type: ignore[arg-type]
            "input_price": 0.0,
            "output_price": e.skill.price,
            "specialist": {
                "domains": list(e.skill.domains), "accuracy": e.skill.accuracy, "outside": e.skill.outside,
                "verbosity": e.skill.verbosity, "register": register, "seed": seed,
            },
        }
        for e in entries
    ]  # fmt: skip
    return yaml.safe_dump({"members": members}, sort_keys=False)


def demo(
    out: str | Path, *, say: Callable[[str], None], config: RunConfig | None = None, figures: bool = True
) -> list[RouterMetrics]:
    """Run it all; a second start with the same folder goes on where the first one stopped.

    Returns:
        The rows of the table, the trained router first.
    """
    started = time.perf_counter()
    folder = Path(out)
    config = config or RunConfig.from_mapping(load_yaml(None, PRICED))
    run = RouteRun(config, folder, say=say)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.model_dump_json(indent=1) + "\n", encoding="utf-8")
    prepared = run.prepare()
    run.warm_start(prepared)
    before = _snapshot(prepared, folder)
    run.online(prepared)
    from guerdon.routing.record import append_records, trace_lines
    from guerdon.routing.router_r1 import RouterR1
    from guerdon.routing.table import baseline_rows, policy_rows

    router = RouterR1(prepared.policy, settings=prepared.settings)
    router.save(folder / "router")
    say(f"evaluating on {len(prepared.test)} held-out questions, with every baseline")
    row, records = run.evaluate(prepared, router)
    pool_for = lambda task, group: prepared.testbed.pool_for(task, 0)  # noqa: E731
    rows = [row]
    untrained = RouterR1(before, settings=prepared.settings)
    env = replace(prepared.env, pool_for=pool_for)

    async def others() -> list[RouterMetrics]:
        return [
            *await policy_rows(untrained, env, prepared.test, prepared.testbed),
            *await baseline_rows(prepared.testbed, prepared.test, pool_for),
        ]

    rows += asyncio.run(others())
    path = folder / "evaluation.jsonl"
    path.unlink(missing_ok=True)
    append_records(path, records)
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        if (folder / "online" / name).is_file():
            shutil.copyfile(folder / "online" / name, folder / name)
    if figures:
        from guerdon.registry import registry

        figure = registry("figure", {"frontier": "guerdon.report.frontier:plot_frontier"})
        figure["frontier"](
            [(r.name, r.usd_per_1000, r.em) for r in rows], folder / "pareto.png",
            xlabel="USD per 1,000 questions", ylabel="exact match", title="Router-R1 and baselines, world facts",
        )  # fmt: skip
    entries = prepared.testbed.entries(prepared.test[0], 0)
    (folder / "pool.yaml").write_text(
        simulated_pool_yaml(entries, prepared.testbed.register, config.seed), encoding="utf-8"
    )
    write_rows(folder / "table.json", rows, {"duration_s": round(time.perf_counter() - started, 1)})
    question = next(t for t in prepared.test if t.meta["hops"] == 2)
    router.pool = prepared.testbed.pool(entries)

    async def ask() -> Any:
        return await router.answer(question.question, golds=[str(g) for g in question.reference])

    answer = asyncio.run(ask())
    from guerdon.routing.record import RouteRecord

    say("")
    say("one question, live:")
    for line in trace_lines(RouteRecord(**answer.record)):
        say(f"  {line}")
    say(f"  gold      {', '.join(map(str, question.reference))}")
    (folder / "answer.json").write_text(
        json.dumps(answer.record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return rows


def _snapshot(prepared: Prepared, folder: Path) -> Any:
    """The policy as the warm start left it, for the rows before RL."""
    from guerdon.policies import Policy

    target = folder / "warm_start" / "policy"
    if not target.is_dir():
        prepared.policy.save(target)
    return Policy.load(target)


def table(rows: Sequence[RouterMetrics]) -> tuple[Sequence[str], list[list[str]]]:
    """Headers and cells of the printed table."""
    return COLUMNS, rows_table(rows)
