"""Prompts and responses as text, brought into the form of sampled trajectories."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.errors import DataError
from guerdon.types import Span, StopReason, Task, Trajectory, Turn

if TYPE_CHECKING:
    from guerdon.policies import Policy

__all__ = ["joined_steps", "text_trajectories", "text_trajectory"]


def text_trajectory(policy: Policy, prompt: Any, response: Any, *, id: str = "text") -> Trajectory:
    """One policy turn that said ``response`` to ``prompt``.

    Args:
        policy: whose tokenizer and chat template are used.
        prompt: text (one user message), chat messages, or token ids as they stand.
        response: text, which gets the end token behind it (unless it is empty: an empty response has no token), or
            token ids as they stand.
        id: of the task.

    Raises:
        DataError: the prompt is of another type or has no tokens.
    """
    if isinstance(prompt, str):
        messages: Any = ({"role": "user", "content": prompt},)
    else:
        messages = tuple(prompt) if isinstance(prompt, Iterable) else ()
    if messages and all(isinstance(m, int | np.integer) for m in messages):
        prompt_ids, messages = tuple(int(i) for i in messages), ()
    elif messages and all(isinstance(m, Mapping) for m in messages):
        prompt_ids = tuple(policy.render(messages))
    else:
        raise DataError(f"a prompt is text, chat messages, or token ids, got {_short(prompt)}")
    task = Task(id, messages)
    if isinstance(response, str):
        ids, ends = _encode(policy, response)
        end = policy.tokenizer.eos_token_id
        if ids and ids[-1] != end and end is not None:
            ids, ends = (*ids, end), (*ends, len(response))
        turn = Turn("policy", response, ids, token_ends=ends)
    else:
        ids = tuple(int(i) for i in response)
        turn = Turn("policy", policy.decode(ids), ids)
    return Trajectory(task, (turn,), StopReason.DONE, prompt_ids=prompt_ids)


def text_trajectories(policy: Policy, prompts: Sequence[Any], responses: Sequence[Any]) -> list[Trajectory]:
    """:func:`text_trajectory` for each pair.

    Raises:
        DataError: another number of responses than of prompts.
    """
    if isinstance(prompts, str) or isinstance(responses, str):
        raise DataError("prompts and responses are sequences, one entry per response; got a single text")
    if len(prompts) != len(responses):
        raise DataError(f"{len(responses)} responses for {len(prompts)} prompts; give one prompt per response")
    return [
        text_trajectory(policy, prompt, response, id=f"text-{k}")
        for k, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]


def joined_steps(
    policy: Policy, prompt: Any, steps: Sequence[str], *, separator: str, prefix: str, id: str = "text"
) -> tuple[Trajectory, tuple[Span, ...]]:
    """A response made of given steps, and the tokens of each.

    A separator belongs to the step that it closes, the end token to the last one. A token that straddles a border
    belongs to the step in which it starts, so a step may be left without a token.

    Args:
        policy: as in :func:`text_trajectory`.
        prompt: likewise.
        steps: texts; an empty sequence is an empty response.
        separator: between steps.
        prefix: before each step; ``{k}`` is its number, from 1.
        id: of the task.

    Raises:
        DataError: a step is blank.
    """
    if isinstance(steps, str):
        raise DataError(f"steps of one response are a sequence of texts, got the text {_short(steps)}")
    for k, step in enumerate(steps):
        if not step.strip():
            raise DataError(f"step {k} of {id} is blank; leave it out")
    pieces = [prefix.replace("{k}", str(k + 1)) + step for k, step in enumerate(steps)]
    trajectory = text_trajectory(policy, prompt, separator.join(pieces), id=id)
    turn = trajectory.turns[0]
    borders = np.cumsum([len(piece) + len(separator) for piece in pieces])[:-1].tolist()
    starts = [0, *(turn.token_ends or ())[:-1]] if len(turn) else []
    cuts = [0, *(sum(s < border for s in starts) for border in borders), len(turn)] if pieces else []
    return trajectory, tuple(Span(a, b) for a, b in pairwise(cuts))


def _encode(policy: Policy, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a text, and where each ends in it."""
    clean = text.encode("utf-8", "replace").decode()  # lone surrogates have no encoding
    tokenizer = policy.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        from guerdon.rollout.text import TokenText

        ids = tuple(policy.encode(clean))
        return ids, TokenText(tokenizer, policy.decode).text_and_ends(ids)[1]
    made = tokenizer(clean, add_special_tokens=False, return_offsets_mapping=True)
    ends = np.maximum.accumulate([b for _, b in made["offset_mapping"]]).tolist() if made["input_ids"] else []
    return tuple(made["input_ids"]), (*ends[:-1], len(text)) if ends else ()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
