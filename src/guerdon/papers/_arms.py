"""What recipes on the arithmetic testbed share: arms that are trained from one warm start, measured, and kept in files."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.types import Task, Trajectory

if TYPE_CHECKING:
    from guerdon.policies import Policy

__all__ = ["column", "kept", "measure", "one_thread", "run_arms", "train"]

Row = dict[str, Any]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Models of a tenth of a million parameters are fastest on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def kept(path: Path, work: Callable[[], Row]) -> Row:
    """The JSON in ``path``, or what ``work`` returns, written there; ``seconds`` in it are those really spent."""
    if path.is_file():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    began = time.perf_counter()
    row = work()
    row["seconds"] = time.perf_counter() - began
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(row), encoding="utf-8")
    os.replace(temporary, path)
    return row


def run_arms(
    out: Path, arms: Sequence[str], seeds: Sequence[int], work: Callable[[str, int], Row]
) -> dict[tuple[str, int], Row]:
    """``work(arm, seed)`` for all; finished ones in ``out`` are not run again.

    Arms run in as many processes as there are cores to run on, one thread each: small models gain nothing from a
    second thread. ``work`` is a module's function, or a ``partial`` of one. The first arm runs here, so that what
    all share (warm starts kept in ``out``) is mostly made once it is done.
    """
    jobs = [(out, work, arm, seed) for seed in seeds for arm in arms]
    results = {}

    def done(job: tuple[Any, ...], row: Row) -> None:
        results[job[2], job[3]] = row
        print(f"{job[2]}, seed {job[3]}: {row['seconds']:.0f} s", file=sys.stderr, flush=True)

    workers = min(len(jobs) - 1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    if jobs:
        done(jobs[0], _job(*jobs[0]))
    if workers < 2:
        for job in jobs[1:]:
            done(job, _job(*job))
        return results
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for job, row in zip(jobs[1:], pool.imap(_packed, jobs[1:]), strict=True):
            done(job, row)
    return results


def _job(out: Path, work: Callable[[str, int], Row], arm: str, seed: int) -> Row:
    name = "".join(c if c.isalnum() else "-" for c in arm)
    return kept(out / "arms" / f"{name}-{seed}.json", lambda: work(arm, seed))


def _packed(job: tuple[Any, ...]) -> Row:
    with one_thread():
        return _job(*job)


def train(
    policy: Policy, tasks: Sequence[Task], reward: Any, *, settings: Mapping[str, Any], **parts: Any
) -> list[dict[str, Any]]:
    """Train a policy in place on the testbed and return the metrics of every step.

    Args:
        policy: usually a fresh copy of a warm start.
        tasks: of the training split.
        reward: of trajectories.
        settings: of :class:`~guerdon.training.OnlineConfig`.
        parts: further arguments of :class:`~guerdon.training.OnlineTrainer`.
    """
    from guerdon.environments.arithmetic import Solve
    from guerdon.rollout import TransformersEngine
    from guerdon.training import OnlineConfig, OnlineTrainer

    trainer = OnlineTrainer(
        policy, TransformersEngine(policy, max_slots=256), Solve(), tasks, reward, OnlineConfig(**settings), **parts
    )
    try:
        return list(trainer.fit().history)
    finally:
        trainer.close()


def measure(
    policy: Policy,
    tasks: Sequence[Task],
    rate: Callable[[Sequence[Trajectory]], Mapping[str, Sequence[float]]],
    *,
    samples: int,
    max_tokens: int,
    seed: int,
    temperature: float = 1.0,
) -> dict[str, list[float]]:
    """Means over the samples of each task of what ``rate`` says about every trajectory: ``{name: [tasks]}``."""
    from guerdon.training.arithmetic import solve

    groups = solve(
        policy, tasks, group_size=samples, max_tokens=max_tokens, seed=seed, temperature=temperature, max_slots=256
    )
    columns = rate([t for group in groups for t in group.trajectories])
    return {k: np.reshape(v, (len(tasks), -1)).mean(1).tolist() for k, v in columns.items()}


def column(results: Mapping[tuple[str, int], Row], arm: str, seeds: Sequence[int], *path: str) -> np.ndarray:
    """``[seeds, items]`` of one arm: the list found under ``path`` in each seed's row."""
    rows = []
    for seed in seeds:
        found: Any = results[arm, seed]
        for key in path:
            found = found[key]
        rows.append(np.atleast_1d(np.asarray(found, dtype=np.float64)))
    return np.array(rows)
