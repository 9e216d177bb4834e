"""From other projects' prompts and completions to trajectories: plain text or chat messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from guerdon.errors import DataError
from guerdon.types import Message, StopReason, Task, Trajectory, Turn

__all__ = ["score_all", "to_trajectory"]


def _text(content: Any) -> str:
    """Text of a message's content, which may be a list of parts or absent (a tool call)."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "".join(p if isinstance(p, str) else str(p.get("text", "")) for p in content)
    raise DataError(f"the content of a message must be text or a list of parts, got {type(content).__name__}")


def _field(message: Any, name: str) -> Any:
    return message.get(name) if isinstance(message, Mapping) else getattr(message, name, None)


def to_trajectory(
    prompt: Any, completion: Any, reference: Any = None, *, task_id: str = "item", meta: Mapping[str, Any] | None = None
) -> Trajectory:
    """One prompt with its completion as a trajectory.

    Args:
        prompt: text, or chat messages.
        completion: text, or chat messages: those of the assistant are policy turns, all others (tool results, say) are
            environment turns, so that no reward reads them as the policy's words.
        reference: of the task.
        task_id: for messages of errors.
        meta: of the task.

    Raises:
        DataError: something else.
    """
    messages: list[Message]
    if prompt is None or isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt or ""}]
    elif isinstance(prompt, Sequence):
        messages = [{"role": str(_field(m, "role")), "content": _text(_field(m, "content"))} for m in prompt]
    else:
        raise DataError(f"{task_id}: a prompt must be text or chat messages, got {type(prompt).__name__}")
    turns: list[Turn]
    if isinstance(completion, str):
        turns = [Turn("policy", completion)]
    elif isinstance(completion, Sequence):
        turns = [
            Turn("policy" if _field(m, "role") == "assistant" else "environment", _text(_field(m, "content")))
            for m in completion
        ]
    else:
        raise DataError(f"{task_id}: a completion must be text or chat messages, got {type(completion).__name__}")
    return Trajectory(Task(task_id, messages, reference, dict(meta or {})), tuple(turns), StopReason.DONE)


def score_all(reward: Any, trajectories: Sequence[Trajectory], **progress: Any) -> list[float | None]:
    """Values of a reward; None where it says that there is no honest one (``on_error="drop"``)."""
    return [s.value if s.valid else None for s in reward(trajectories, **progress)]
