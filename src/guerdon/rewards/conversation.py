"""From other projects' prompts and completions to trajectories: text, chat messages, replies of an OpenAI-format API.

A reply is what OpenAI, LiteLLM, vLLM and their like return, as an object or as JSON: a chat or text completion with
``choices``, one choice, one message, a line of a batch's output (``body``), or a response with ``output`` items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from guerdon.errors import DataError, RewardError
from guerdon.types import Message, StopReason, Task, Trajectory, Turn

__all__ = ["after_prompt", "score_all", "to_trajectory"]

_FINISHED = {"length": StopReason.LENGTH, "max_tokens": StopReason.LENGTH, "max_output_tokens": StopReason.LENGTH}
_DEPTH = 4


def _text(content: Any, where: str) -> str:
    """Text of a message's content, which may be a list of parts or absent (a tool call)."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if _listed(content):
        pieces = [p if isinstance(p, str) else _field(p, "text") for p in content]
        return "".join(p for p in pieces if isinstance(p, str))
    raise DataError(f"{where}: the content of a message must be text or a list of parts, got {type(content).__name__}")


def _field(message: Any, name: str) -> Any:
    if type(message) is dict or isinstance(message, Mapping):
        return message.get(name)
    return getattr(message, name, None)


def _listed(value: Any) -> bool:
    return type(value) is list or (isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray))


def to_trajectory(
    prompt: Any, completion: Any, reference: Any = None, *, task_id: str = "item", meta: Mapping[str, Any] | None = None
) -> Trajectory:
    """One prompt with its completion as a trajectory.

    Args:
        prompt: text, or chat messages.
        completion: text, chat messages, or a reply (see the module) with exactly one choice. What the assistant wrote are
            policy turns, all else (tool results, say) are environment turns, so that no reward reads it as the policy's
            words. Tool calls and reasoning that an API gives beside the text are in the turn's ``meta`` as
            ``tool_calls`` and ``reasoning``; a reply that was cut off has the stop reason ``length``.
        reference: of the task.
        task_id: for messages of errors.
        meta: of the task.

    Raises:
        DataError: something else.
    """
    messages: list[Message]
    if prompt is None or isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt or ""}]
    elif _listed(prompt):
        messages = [_message(m, task_id) for m in prompt]
    else:
        raise DataError(f"{task_id}: a prompt must be text or chat messages, got {type(prompt).__name__}")
    said, finish = _unwrapped(completion, task_id)
    turns = [Turn("policy", said)] if isinstance(said, str) else [_turn(m, k, task_id) for k, m in enumerate(said)]
    stop = StopReason.DONE if finish is None else _FINISHED.get(str(finish), StopReason.DONE)
    return Trajectory(Task(task_id, messages, reference, dict(meta) if meta else {}), tuple(turns), stop)


def _unwrapped(value: Any, task_id: str, depth: int = 0) -> tuple[str | Sequence[Any], Any]:
    """Text or messages, and why the reply ended where it says so."""
    if isinstance(value, str) or _listed(value):
        return value, None
    if depth < _DEPTH and value is not None:
        body = _field(value, "body")
        if body is not None:
            return _unwrapped(body, task_id, depth + 1)
        message = _field(value, "message")
        if message is not None:
            return [_assistant(message)], _field(value, "finish_reason")
        choices = _field(value, "choices")
        if choices is not None:
            if not _listed(choices) or len(choices) != 1:
                n = len(choices) if _listed(choices) else type(choices).__name__
                raise DataError(f"{task_id}: a reply must have one choice, got {n}; give one completion per choice")
            return _unwrapped(choices[0], task_id, depth + 1)
        if _field(value, "role") is not None:
            return [value], _field(value, "stop_reason")
        output = _field(value, "output")
        if _listed(output):
            return output, _field(_field(value, "incomplete_details"), "reason")
        text = _field(value, "text")
        if isinstance(text, str):
            return text, _field(value, "finish_reason")
    raise DataError(
        f"{task_id}: a completion must be text, chat messages or an OpenAI-format reply, got {type(value).__name__}"
    )


def _assistant(message: Any) -> dict[str, Any]:
    """The message of a choice, which is the assistant's whether it says so or not."""
    if isinstance(message, str):
        return {"role": "assistant", "content": message}
    names = ("content", "refusal", "tool_calls", "reasoning_content", "reasoning")
    return {"role": "assistant", **{name: _field(message, name) for name in names}}


def _message(message: Any, task_id: str) -> Message:
    if type(message) is dict:  # what nearly every trainer gives
        role, content = message.get("role"), message.get("content")
        if type(role) is str and type(content) is str:
            return {"role": role, "content": content}
    return {"role": str(_field(message, "role")), "content": _text(_field(message, "content"), task_id)}


def _turn(message: Any, k: int, task_id: str) -> Turn:
    if type(message) is dict and len(message) == 2 and message.get("role") == "assistant":
        said = message.get("content")
        if type(said) is str:
            return Turn("policy", said)
    role = _field(message, "role")
    # Items of a response that are no messages (calls, their results, reasoning) have a type instead of a role.
    if not isinstance(role, str) and not (role is None and isinstance(_field(message, "type"), str)):
        raise DataError(f"{task_id}: message {k} of the completion has no role; give {{role, content}}")
    content = _text(_field(message, "content"), task_id)
    if role != "assistant":
        return Turn("environment", content)
    refusal = _field(message, "refusal")
    aside = {
        "tool_calls": _field(message, "tool_calls"),
        "reasoning": _field(message, "reasoning_content") or _field(message, "reasoning"),
    }
    return Turn(
        "policy",
        content or (refusal if isinstance(refusal, str) else ""),
        meta={key: value for key, value in aside.items() if value},
    )


def after_prompt(query: str, prompt: str, strip: Sequence[str] = ()) -> str:
    """What stands behind the prompt in a query: only that is the policy's.

    Args:
        query: the prompt, and what the policy wrote behind it.
        prompt: the prompt.
        strip: texts that are taken off the end (``"<|im_end|>"``): a query that was decoded with its special tokens ends
            with them, and the policy's answer does not.

    Raises:
        RewardError: the query does not begin with the prompt.
    """
    if not query.startswith(prompt):
        raise RewardError(
            "a query must begin with its prompt, or its completion cannot be told; give the prompt as the policy saw it "
            "(a prompt that was cut to fit the context is not)"
        )
    text = query[len(prompt) :]
    while True:
        bare = text.rstrip()
        mark = next((m for m in strip if m and bare.endswith(m)), None)
        if mark is None:
            return text
        text = bare[: -len(mark)]


def score_all(reward: Any, trajectories: Sequence[Trajectory], **progress: Any) -> list[float | None]:
    """Values of a reward; None where it says that there is no honest one (``on_error="drop"``)."""
    return [s.value if s.valid else None for s in reward(trajectories, **progress)]
