"""Routers that do not learn by RL, run over the same pool and booked in the same ledger.

Single call: a rule or a trained single-round router picks one member, which answers once. Multi-round
without RL (the paper's starred baselines): the question is decomposed, every part is routed, and the
answers are put together. Together they are the controls for "it just calls the big one" and for "it
just calls more often".

Source: Router-R1 (arXiv 2506.09033), baselines, and the recipes of the authors' router toolkit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import numpy as np

from guerdon.errors import ConfigError
from guerdon.rewards import ExactMatch
from guerdon.routing.env import CallStep
from guerdon.routing.member import Reply
from guerdon.routing.pool import Pool
from guerdon.types import StopReason, Task, Trajectory, Turn, Usage

__all__ = [
    "Chooser",
    "Decompose",
    "cheapest",
    "dearest",
    "decomposed",
    "fixed",
    "largest",
    "oracle",
    "random_member",
    "single_call",
]

Chooser = Callable[[str, Pool, np.random.Generator], str]
"""``choose(query, pool, generator)`` returns the name of a member."""

PoolFor = Callable[[Task, int], Pool]
Read = Callable[[str], str]
"""Turns a member's reply into a short answer."""


class Decompose(Protocol):
    """Splits a question. ``earlier`` holds the answers of the parts so far; ``None`` ends."""

    def __call__(self, task: Task, earlier: Sequence[str]) -> str | None: ...


def fixed(name: str) -> Chooser:
    """Always the same member."""
    return lambda query, pool, rng: name


def cheapest(query: str, pool: Pool, rng: np.random.Generator) -> str:
    """The member with the lowest output price; the first on ties."""
    return min(pool.values(), key=lambda m: m.output_price).name


def dearest(query: str, pool: Pool, rng: np.random.Generator) -> str:
    """The member with the highest output price; the first on ties."""
    return max(pool.values(), key=lambda m: m.output_price).name


def largest(query: str, pool: Pool, rng: np.random.Generator) -> str:
    """The member with the most parameters; the dearest where sizes are not stated."""
    if all(m.size_b is None for m in pool.values()):
        return dearest(query, pool, rng)
    return max(pool.values(), key=lambda m: (m.size_b or 0.0, m.output_price)).name


def random_member(query: str, pool: Pool, rng: np.random.Generator) -> str:
    """A member drawn uniformly."""
    return list(pool)[int(rng.integers(len(pool)))]


async def single_call(
    tasks: Sequence[Task],
    pool_for: PoolFor,
    choose: Chooser,
    *,
    read: Read = str.strip,
    seed: int = 0,
    helper_prompt: str | None = None,
    max_tokens: int = 512,
) -> list[Trajectory]:
    """Ask one member per question and take its reply as the answer."""

    async def one(index: int, task: Task) -> Trajectory:
        pool = pool_for(task, index)
        call = await _ask(
            pool, task, 0, choose(task.question, pool, _rng(seed, index, 0)), task.question, helper_prompt, max_tokens
        )
        return _trajectory(task, [call], read(call.reply.text or "") if call.reply.ok else None, pool)

    return await _gather(one, tasks)


async def oracle(
    tasks: Sequence[Task],
    pool_for: PoolFor,
    *,
    read: Read = str.strip,
    helper_prompt: str | None = None,
    max_tokens: int = 512,
) -> list[Trajectory]:
    """The single call that turns out best: highest exact match, then cheapest.

    It knows the gold answers and is an upper bound for single-call routers, not a router. Only the
    chosen call is counted in the trajectory; the ledger holds all that were made.
    """
    match = ExactMatch()

    async def one(index: int, task: Task) -> Trajectory:
        pool = pool_for(task, index)
        calls = [await _ask(pool, task, 0, name, task.question, helper_prompt, max_tokens) for name in pool]

        def rank(call: CallStep) -> tuple[float, float]:
            answer = read(call.reply.text or "") if call.reply.ok else ""
            right = (
                match.text(completion=f"<answer>{answer}</answer>", reference=task.reference).value if answer else 0.0
            )
            return (-right, call.reply.usd)

        best = min(calls, key=rank)
        return _trajectory(task, [best], read(best.reply.text or "") if best.reply.ok else None, pool)

    return await _gather(one, tasks)


async def decomposed(
    tasks: Sequence[Task],
    pool_for: PoolFor,
    choose: Chooser,
    decompose: Decompose,
    *,
    read: Read = str.strip,
    aggregate: Callable[[Task, Sequence[tuple[str, str]]], Awaitable[str | None]] | None = None,
    seed: int = 0,
    helper_prompt: str | None = None,
    max_tokens: int = 512,
    max_parts: int = 4,
) -> list[Trajectory]:
    """Route every part of a decomposed question; the paper's starred baselines.

    Args:
        decompose: gives the next part, or ``None``.
        aggregate: makes the final answer from (part, answer) pairs; the default is the last answer.
        max_parts: at most so many parts (the paper: 1 to 4).
    """
    if max_parts < 1:
        raise ConfigError(f"max_parts must be at least 1, got {max_parts}")

    async def one(index: int, task: Task) -> Trajectory:
        pool = pool_for(task, index)
        calls: list[CallStep] = []
        answers: list[tuple[str, str]] = []
        for part in range(max_parts):
            query = decompose(task, [a for _, a in answers])
            if query is None:
                break
            name = choose(query, pool, _rng(seed, index, part))
            call = await _ask(pool, task, part, name, query, helper_prompt, max_tokens)
            calls.append(call)
            answers.append((query, read(call.reply.text or "") if call.reply.ok else ""))
        final = await aggregate(task, answers) if aggregate else (answers[-1][1] if answers else None)
        return _trajectory(task, calls, final, pool)

    return await _gather(one, tasks)


async def _ask(
    pool: Pool, task: Task, turn: int, name: str, query: str, helper_prompt: str | None, max_tokens: int
) -> CallStep:
    content = query if helper_prompt is None else helper_prompt.replace("{query}", query)
    reply: Reply = await pool.call(
        name, [{"role": "user", "content": content}], max_tokens=max_tokens, trajectory_id=task.id
    )
    return CallStep(turn, "", name, query, reply, reply.text or "")


def _trajectory(task: Task, calls: Sequence[CallStep], answer: str | None, pool: Pool) -> Trajectory:
    usage = sum(
        (Usage(1, c.reply.input_tokens, c.reply.output_tokens, c.reply.usd, c.reply.latency_s) for c in calls), Usage()
    )
    info: dict[str, Any] = {
        "answer": answer,
        "routes": len(calls),
        "valid_routes": sum(c.reply.ok for c in calls),
        "raw_cost": float(sum(c.reply.output_tokens * c.reply.output_price for c in calls)),
        "calls": tuple(calls),
        "members": tuple(pool),
        "roster": tuple(pool.values()),
    }
    turns = (Turn("policy", answer or ""),)
    return Trajectory(task, turns, StopReason.DONE, usage=usage, info=info)


async def _gather(one: Callable[[int, Task], Awaitable[Trajectory]], tasks: Sequence[Task]) -> list[Trajectory]:
    return list(await asyncio.gather(*(one(i, t) for i, t in enumerate(tasks))))


def _rng(seed: int, index: int, part: int) -> np.random.Generator:
    return np.random.default_rng([seed, index, part])
