"""``guerdon route``: demo, train, eval, bench, ask, serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from guerdon.cli.common import emit, fresh_or_resumable, guarded, progress

__all__ = ["app"]

app = typer.Typer(
    help="Router-R1 and other routers over a priced pool of models.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PoolOption = Annotated[Path | None, typer.Option("--pool", help="The pool: a YAML file.")]


def _config(path: Path | None, overrides: list[str]) -> Any:
    from guerdon.routing.run import RunConfig
    from guerdon.training.settings import load_yaml

    if path is None:
        return RunConfig.from_mapping(load_yaml(None, overrides), source="overrides")
    return RunConfig.from_yaml(path, overrides)


def _show(rows: list[Any], as_json: bool) -> None:
    from guerdon.report.table import plain_table
    from guerdon.routing.evaluate import COLUMNS, rows_table

    emit([r.to_dict() for r in rows], as_json=as_json, text=plain_table(list(COLUMNS), rows_table(rows)))


@app.command("demo")
@guarded
def demo_command(
    out: Annotated[Path, typer.Option(help="Run folder; the same one resumes.")] = Path("runs/demo"),
    config: Annotated[Path | None, typer.Option(help="YAML in place of the demo's own settings.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings such as online.steps=20.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a small Router-R1 on the embedded pool, measure it beside the baselines, ask it one question.

    Example: guerdon route demo --out runs/demo
    """
    from guerdon.routing.demo import PRICED, demo

    settings = _config(config, [*(PRICED if config is None else ()), *(overrides or [])])
    folder = fresh_or_resumable(out)
    rows = demo(folder, say=progress, config=settings)
    _demo_result(folder, rows).write(folder)
    progress("")
    _show(rows, as_json)
    progress(
        f"wrote {folder}/ (router, result.json, pareto.png, evaluation.jsonl, metrics.jsonl, trajectories.jsonl, pool.yaml)"
    )
    progress(f'ask it more: guerdon route ask {folder} --pool {folder}/pool.yaml "capital of Peru"')


def _demo_result(folder: Path, rows: list[Any]) -> Any:
    """The demo's claims, from the rows' values per question, in the shape of ``guerdon reproduce``."""
    from guerdon.papers.evidence import Result, environment, paired_claim

    duration = json.loads((folder / "table.json").read_text(encoding="utf-8"))["duration_s"]
    trained, by_name = rows[0], {r.name: r for r in rows}
    single = max(
        (r for r in rows if r.name.endswith("one call") and not r.name.startswith("oracle")), key=lambda r: r.em
    )
    generalist, before = by_name["largest*, decomposed"], by_name["router before RL"]
    decomposed = max((r for r in rows if r.name.endswith("*, decomposed")), key=lambda r: r.em)
    claims = [
        paired_claim(
            "em-over-single-call",
            f"EM of the trained router exceeds that of the best single-call router ({single.name})",
            [trained.items["em"]], [single.items["em"]],
        ),
        paired_claim(
            "em-over-generalist", "EM of the trained router exceeds always asking the dear generalist, with a perfect decomposition",
            [trained.items["em"]], [generalist.items["em"]],
        ),
        paired_claim(
            "cheaper-than-generalist", "raw cost of always asking the generalist exceeds that of the trained router",
            [generalist.items["raw_cost"]], [trained.items["raw_cost"]],
        ),
        paired_claim(
            "em-over-decomposed", f"EM of the trained router exceeds that of the best control with a perfect decomposition ({decomposed.name})",
            [trained.items["em"]], [decomposed.items["em"]],
        ),
        paired_claim(
            "em-over-warm-start", "EM of the trained router exceeds that of the same router before RL",
            [trained.items["em"]], [before.items["em"]],
        ),
        paired_claim(
            "cheaper-than-warm-start", "raw cost of the router before RL exceeds that of the trained router",
            [before.items["raw_cost"]], [trained.items["raw_cost"]],
        ),
    ]  # fmt: skip
    measured = {"rows": [r.to_dict() for r in rows]}
    return Result(
        "router-r1-demo",
        "cpu",
        (0,),
        tuple(claims),
        {},
        measured,
        environment(),
        duration,
        "one seed: the interval is over questions only",
    )


@app.command("train")
@guarded
def train_command(
    config: Annotated[Path, typer.Argument(help="YAML file; an empty one trains the demo's router.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings such as reward.alpha=0.6.")] = None,
    out: Annotated[Path, typer.Option(help="Run folder; the same one resumes.")] = Path("runs/router"),
) -> None:
    """Warm start (world facts only) and reinforcement learning; the router is saved in OUT/router.

    Example: guerdon route train run.yaml online.steps=100 --out runs/router
    """
    from guerdon.routing.run import RouteRun

    settings = _config(config, overrides or [])
    folder = fresh_or_resumable(out)
    (folder / "config.json").write_text(settings.model_dump_json(indent=1) + "\n", encoding="utf-8")
    RouteRun(settings, folder, say=progress).train()
    progress(f"the router is in {folder / 'router'}")
    print(folder / "router")


@app.command("eval")
@guarded
def eval_command(
    run: Annotated[Path, typer.Argument(help="Folder of a run that guerdon route train or demo wrote.")],
    questions: Annotated[int, typer.Option(min=1, help="How many held-out questions.")] = 300,
    robustness: Annotated[bool, typer.Option(help="Also change the pool and inject failures.")] = True,
    data: Annotated[Path | None, typer.Option(help="JSONL with question and golds, in place of world facts.")] = None,
    pool: PoolOption = None,
    baselines: Annotated[bool, typer.Option(help="Also measure the baselines (world facts only).")] = True,
    as_json: JsonOption = False,
) -> None:
    """Measure a trained router: quality, money, calls; under renamed, re-priced and failing members too.

    Example: guerdon route eval runs/demo --questions 300
    """
    import asyncio

    from guerdon.errors import ConfigError
    from guerdon.routing.robustness import evaluate_run

    if (data is None) != (pool is None):
        raise ConfigError("--data and --pool belong together: own questions are put to an own pool")
    rows = asyncio.run(
        evaluate_run(
            run, questions=questions, robustness=robustness, data=data, pool=pool, baselines=baselines, say=progress
        )
    )
    _show(rows, as_json)


@app.command("ask")
@guarded
def ask_command(
    run: Annotated[Path, typer.Argument(help="Folder of a trained router.")],
    question: Annotated[str, typer.Argument(help="The question.")],
    pool: Annotated[Path, typer.Option("--pool", help="The pool: a YAML file.")],
    max_cost_usd: Annotated[float | None, typer.Option(min=0, help="Hard cap on the money of this question.")] = None,
    max_calls: Annotated[int | None, typer.Option(min=0, help="Hard cap on its calls.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Answer one question and show the trace: thoughts, calls, replies, costs.

    Example: guerdon route ask runs/demo --pool runs/demo/pool.yaml "capital of Peru"
    """
    import asyncio

    from guerdon.routing.pool import Pool
    from guerdon.routing.record import RouteRecord, trace_lines
    from guerdon.routing.router_r1 import RouterR1

    members = Pool.from_yaml(pool)
    members.check()
    router = RouterR1.load(run, members)

    async def ask() -> Any:
        try:
            return await router.answer(question, max_cost_usd=max_cost_usd, max_calls=max_calls)
        finally:
            await router.aclose()
            await members.aclose()

    answer = asyncio.run(ask())
    if as_json:
        emit(answer.record, as_json=True)
        return
    for line in trace_lines(RouteRecord(**answer.record))[:-2]:
        progress(line)
    progress(f"cost      ${answer.usage.usd:.8f} for {answer.usage.calls} calls")
    print(answer.text)


@app.command("bench")
@guarded
def bench_command(
    path: Annotated[Path, typer.Argument(help="Recorded answers: LLMRouter, RouterBench or plain CSV/JSON(L).")],
    format: Annotated[str, typer.Option(help="auto, llmrouter, scores, routerbench, csv or gsm8k.")] = "auto",
    pool: Annotated[
        Path | None, typer.Option("--pool", help="Prices and descriptors of the members (LLMRouter's JSON).")
    ] = None,
    second: Annotated[Path | None, typer.Option(help="A second file, where the format needs one (gsm8k).")] = None,
    seed: Annotated[int, typer.Option(help="Of the split and the bootstrap.")] = 0,
    router_r1: Annotated[
        bool,
        typer.Option(
            "--router-r1", help="Also train Router-R1 over the recorded replies, in several rounds (gsm8k format)."
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json, router_r1.json and frontier.png.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train and compare single-round routers on recorded answers: quality, cost, frontier, arena, optimality, AIQ, APGR.

    Example: guerdon route bench answers.csv --out runs/bench
    """
    from guerdon.errors import ConfigError
    from guerdon.report.table import plain_table
    from guerdon.routing.bench import run_bench_from_files

    if router_r1 and (format != "gsm8k" or second is None):
        raise ConfigError("--router-r1 replays recorded GSM8K replies: give --format gsm8k and --second FILE")
    if out is not None:
        fresh_or_resumable(out)
    result = run_bench_from_files(path, format=format, pool=pool, second=second, out=out, seed=seed)
    rounds = None
    if router_r1:
        from guerdon.routing.bench.multi_round import run_multi_round

        assert second is not None
        rounds = run_multi_round(path, second, seed=seed, say=progress)
        if out is not None:
            text = json.dumps(rounds, indent=1, ensure_ascii=False, default=float)
            (out / "router_r1.json").write_text(text + "\n", encoding="utf-8")
    if as_json:
        value = result.to_dict()
        emit(value if rounds is None else {**value, "router_r1": rounds}, as_json=True)
        return
    headers, rows = result.table()
    print(plain_table(headers, rows))
    if rounds is not None:
        from guerdon.routing.bench.multi_round import rounds_table

        print()
        print(plain_table(*rounds_table(rounds)))


def _serve() -> None:
    from guerdon.cli.serve import serve_command

    app.command("serve")(serve_command)


_serve()
