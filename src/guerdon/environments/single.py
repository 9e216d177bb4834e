"""One prompt, one answer: the environment of everything that is no dialogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from guerdon.rollout.protocol import Episode, Observation
from guerdon.types import Message, Task, Usage

__all__ = ["SingleTurn"]


class _Once:
    def __init__(self, prompt: Sequence[Message]) -> None:
        self._prompt = prompt

    @property
    def prompt(self) -> Sequence[Message]:
        return self._prompt

    async def step(self, action: str) -> Observation:
        return Observation(done=True)  # no reason given: the loop knows whether the policy was cut off

    def result(self) -> tuple[Usage, Mapping[str, Any]]:
        return Usage(), {}


class SingleTurn:
    """Shows the task's prompt; the episode is over after the policy's turn.

    Args:
        system: put before the prompt as a system message, unless the prompt has one.

    A turn that reached the token limit ends the trajectory with ``StopReason.LENGTH``, as everywhere.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system

    def start(self, task: Task, *, seed: int, group: int, member: int) -> Episode:
        """Begin ``task``."""
        prompt = task.prompt
        if self.system is not None and not any(m["role"] == "system" for m in prompt):
            prompt = ({"role": "system", "content": self.system}, *prompt)
        return _Once(prompt)
