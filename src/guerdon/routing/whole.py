"""What backends have in common whose reply comes in one piece."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from guerdon.routing.member import RawReply
from guerdon.types import Message

__all__ = ["WholeBackend", "last_user_text"]


def last_user_text(messages: Sequence[Message]) -> str:
    """Content of the last user message."""
    return next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")


class WholeBackend:
    """A backend in this process: its stream is its completion, and what fails costs nothing."""

    identity: str | None = None
    model: str | None = None
    bills_failures = False

    async def complete(self, messages: Sequence[Message], **options: Any) -> RawReply:
        """One attempt; subclasses say how."""
        raise TypeError(f"{type(self).__name__} must override complete")

    async def stream(self, messages: Sequence[Message], **options: Any) -> AsyncGenerator[str | RawReply, None]:
        """The text, then the reply."""
        reply = await self.complete(messages, **options)
        if reply.text:
            yield reply.text
        yield reply

    def check(self) -> None:
        """Nothing can be missing."""

    async def aclose(self) -> None:
        """Nothing is held."""
