"""Scripted rollouts for the supervised warm start: the right form, an arbitrary choice.

The script asks a uniformly random member each time and stops after a random number of calls, so the warm start teaches
the protocol and nothing about whom to ask or when to stop. The thought before a call says which skills the question
still needs, as any language model would know them, and then one skill of the member that is about to be asked, drawn
without regard to the need. So "what is needed" and "who has this skill" are learnable from the scripts; that the two
should agree, and whom to prefer among several that know it, are left for reinforcement learning to find out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from guerdon.environments.worldfacts.pools import Entry
from guerdon.environments.worldfacts.questions import Hop, Register, phrase, sub_question
from guerdon.environments.worldfacts.specialists import informative, read_answer
from guerdon.errors import ConfigError
from guerdon.types import Task

__all__ = ["Segment", "practice_task", "scripted_rollout"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Text by the policy or by the environment."""

    speaker: Literal["policy", "environment"]
    text: str


def practice_task(task: Task, names: Sequence[str], rng: np.random.Generator) -> tuple[Task, Callable[[str, str], str]]:
    """The same question about arbitrary names, and members that reply with arbitrary names.

    It teaches to copy any name of the vocabulary from question to query and from reply to answer, and no
    fact: subjects and replies are drawn uniformly and have nothing to do with each other.
    """
    chain = tuple(replace(hop, subject=names[int(rng.integers(len(names)))]) for hop in task.meta["chain"])
    text = phrase(chain, task.meta["register"])
    scrambled = Task(f"practice/{text}", text, list(task.reference), {**task.meta, "chain": chain})  # type: ignore[arg-type]

    def ask(member: str, query: str) -> str:
        reply = names[int(rng.integers(len(names)))]
        filler = " ." * int(rng.integers(0, 8))
        return f"= {reply}{filler}" if task.meta["register"] == "compact" else f"The answer is {reply}."

    return scrambled, ask


def scripted_rollout(
    task: Task,
    pool: Sequence[Entry],
    ask: Callable[[str, str], str],
    rng: np.random.Generator,
    *,
    wrap: Callable[[str], str],
    max_calls: int = 3,
    min_calls: int = 1,
    guesses: Sequence[str] = ("unknown",),
) -> list[Segment]:
    """Write one rollout.

    Calls follow the question's chain, each with the answer read from the reply before it; calls beyond
    the chain repeat its last question. The final answer is that of the last reply that holds one.

    Args:
        task: from :func:`~guerdon.environments.worldfacts.questions.make_tasks`.
        pool: members on offer.
        ask: ``ask(name, query)`` returns a member's reply.
        rng: chooses members, thoughts, guesses and the number of calls (uniform in ``min_calls`` .. ``max_calls``).
        wrap: turns a reply into the observation that the environment would show.
        max_calls, min_calls: most and least calls.
        guesses: one of them is the answer where no reply holds any.

    Returns:
        Segments; policy segments together are valid under the format reward.

    Raises:
        ConfigError: an empty pool, no guess, not 0 <= ``min_calls`` <= ``max_calls``.
    """
    if not pool or not guesses:
        raise ConfigError("a scripted rollout needs at least one pool member and one guess")
    if not 0 <= min_calls <= max_calls:
        raise ConfigError(f"min_calls and max_calls must be 0 <= min <= max, got {min_calls} and {max_calls}")
    register: Register = task.meta["register"]
    compact = register == "compact"
    chain = task.meta["chain"]
    segments: list[Segment] = []
    subject, query, answer = chain[0].subject, "", None
    for k in range(int(rng.integers(min_calls, max_calls + 1))):
        if k < len(chain):
            query = sub_question(chain[k].relation, subject, register)
        member = pool[int(rng.integers(len(pool)))]
        skill = member.skill.domains[int(rng.integers(len(member.skill.domains)))]
        ask_text = f"try {skill} {member.name}" if compact else f"I try {member.name}, which knows {skill}."
        segments.append(
            Segment(
                "policy",
                f"<think> {_need(chain[min(k, len(chain) - 1) :], compact)} {ask_text} </think><search> {member.name} : {query} </search>",
            )
        )
        reply = ask(member.name, query)
        segments.append(Segment("environment", wrap(reply)))
        if informative(reply):
            answer = subject = read_answer(reply)
    if answer is None:
        answer = guesses[int(rng.integers(len(guesses)))]
    done = "done" if compact else "I have what I need."
    segments.append(Segment("policy", f"<think> {done} </think><answer> {answer} </answer>"))
    return segments


def _need(rest: Sequence[Hop], compact: bool) -> str:
    """What the question still needs."""
    domains = [hop.domain for hop in rest]
    return f"need {' , '.join(domains)} ;" if compact else f"This needs {' and then '.join(domains)}."
