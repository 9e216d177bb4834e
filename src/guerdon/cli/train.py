"""``guerdon train``: online reinforcement learning from one YAML file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from guerdon.cli.common import emit, fresh_or_resumable, guarded, progress

__all__ = ["train_command"]


@guarded
def train_command(
    config: Annotated[Path, typer.Argument(help="YAML file: policy, tasks, reward, and the settings of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings such as optimiser.lr=1e-5.")] = None,
    out: Annotated[Path, typer.Option(help="Run folder; the same command with the same folder resumes.")] = Path(
        "runs/last"
    ),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the resolved settings, load no model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the last row of metrics as JSON.")] = False,
) -> None:
    """Train a policy on a reward; the policy is saved in OUT/policy.

    Ctrl-C finishes the step and saves; the same command goes on. Exits 0 when the run is done, 1 when it ended for
    want of anything to learn, 2 on bad input, 130 when interrupted.

    Example: guerdon train run.yaml algorithm=dapo optimiser.lr=1e-5 --out runs/dapo
    """
    from guerdon.errors import ConfigError
    from guerdon.training.assemble import assemble, check_tasks
    from guerdon.training.data import tasks_digest
    from guerdon.training.job import JobConfig, make_reward
    from guerdon.training.loop import check_folder

    settings = JobConfig.from_yaml(config, overrides or [])
    tasks, held_out = settings.read()
    reward = make_reward(settings.reward)
    parts = assemble(settings.online())
    problems = list(check_tasks(parts, reward=reward, tasks=tasks))
    trackers = _trackers(settings.trackers)
    if problems:
        raise ConfigError(f"{config}: {'; '.join(problems)}")
    identity = {**parts.config.flat(), "tasks": tasks_digest(tasks), **parts.identity()}
    check_folder(out, identity, parts.config.free_on_resume())
    _check_job(out, settings)
    if dry_run:
        emit(_resolved(settings, reward, tasks, held_out), as_json=True)
        progress(f"{config} is fine: {settings.steps} steps of {settings.trajectories_per_step} trajectories")
        return
    folder = fresh_or_resumable(out)
    (folder / "config.json").write_text(settings.model_dump_json(indent=1) + "\n", encoding="utf-8")
    result = _train(settings, reward, tasks, held_out, trackers, folder)
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    progress(
        f"{result.stopped} after step {result.step}; the policy is in {folder / 'policy'}, metrics in metrics.jsonl"
    )
    last = result.history[-1] if result.history else _last_row(folder)
    if int(os.environ.get("RANK", "0")) == 0:  # of several processes one answers
        emit(last, as_json=as_json, text=str(folder / "policy"))
    raise typer.Exit(1 if result.stopped == "no_signal" else 0)


def _check_job(folder: Path, settings: Any) -> None:
    """Refuse a folder whose run had another policy, reward or environment: a resumed run would mix the two."""
    from guerdon.errors import ConfigError

    record = folder / "config.json"
    if not record.exists():
        return
    before, now = json.loads(record.read_text(encoding="utf-8")), json.loads(settings.model_dump_json())
    for key in ("policy", "reward", "environment"):
        if before.get(key) != now[key]:
            raise ConfigError(
                f"{folder} belongs to a run with other settings: {key} (was {before.get(key)!r}, is {now[key]!r}); "
                "use another folder or the old settings"
            )


def _train(settings: Any, reward: Any, tasks: Any, held_out: Any, trackers: Any, folder: Path) -> Any:
    from guerdon.policies import LoraSpec, load_policy
    from guerdon.training import Console, HeldOut, OnlineTrainer, TrajectoryWriter
    from guerdon.training.distributed import make_world
    from guerdon.training.engines import make_engine
    from guerdon.training.job import make_environment, make_reward

    # Before the policy, so that each process loads it on a GPU of its own.
    main = make_world(settings.distributed).main
    spec = settings.policy
    lora = None if spec.lora is None else LoraSpec(spec.lora.r, spec.lora.alpha, 0.0, spec.lora.targets)
    ppo = settings.algorithm == "ppo"
    progress(f"loading {spec.base}")
    policy = load_policy(
        spec.base, lora=lora, value_head=ppo, device=spec.device, dtype=spec.dtype, seed=settings.seed
    )  # fmt: skip
    callbacks = [Console(), *trackers]
    if settings.record_every:
        callbacks.append(TrajectoryWriter(folder / "trajectories.jsonl", every=settings.record_every))
    trainer = OnlineTrainer(
        policy,
        make_engine(policy, kind=settings.distributed.engine),
        make_environment(settings.environment),
        tasks,
        reward,
        settings.online(),
        critic="shared" if ppo else None,
        # A reward of its own: one with running statistics must not see the training trajectories.
        evaluate=HeldOut(held_out, make_reward(settings.reward)) if held_out else None,
        callbacks=callbacks,
        out=folder,
    )
    try:
        result = trainer.fit()
    finally:
        trainer.close()
    if result.stopped != "interrupted" and main:
        policy.save(folder / "policy")
    return result


def _trackers(given: list[Any]) -> list[Any]:
    from guerdon.training.trackers import tracker

    made = []
    for one in given:
        options = {"name": one} if isinstance(one, str) else dict(one)
        made.append(tracker(options.pop("name", ""), **options))
    return made


def _resolved(settings: Any, reward: Any, tasks: Any, held_out: Any) -> dict[str, Any]:
    """The settings as they will be used, with the names of what the algorithm chose."""
    traits = settings.credit_traits(), settings.objective_traits()
    return {
        **json.loads(settings.model_dump_json()),
        "resolved": {
            "credit": traits[0].name,
            "objective": traits[1].name,
            "reward": reward.name,
            "tasks": len(tasks),
            "held_out": len(held_out),
        },
    }


def _last_row(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return json.loads(lines[-1]) if lines else {}
