"""Backends in this process: a Python function and a policy here, recorded replies and injected faults beside it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from guerdon.routing.faults import FaultyBackend
from guerdon.routing.member import BackendError, Outcome, RawReply
from guerdon.routing.recorded import RecordedBackend, read_recorded
from guerdon.routing.secrets import scrub
from guerdon.routing.whole import WholeBackend, last_user_text
from guerdon.types import Message, StopReason

__all__ = ["CallableBackend", "FaultyBackend", "PolicyBackend", "RecordedBackend", "read_recorded"]


class CallableBackend(WholeBackend):
    """Asks a Python function.

    Args:
        function: takes the last user message's text and returns a text, ``(text, output_tokens)`` or a
            :class:`RawReply`; plain or async.
        blocking: a plain function that waits or computes for long; it runs in a thread. When its time is over
            the call ends, but the thread runs on until the function returns.
        identity: what its replies depend on. Without it they are not cached, since two functions of one name
            cannot be told apart.
    """

    def __init__(self, function: Callable[[str], Any], *, blocking: bool = False, identity: str | None = None) -> None:
        self._function, self._blocking, self.identity = function, blocking, identity

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        timeout: float = 60.0,
        **options: Any,
    ) -> RawReply:
        """One call; an exception of the function is a server error, another type than stated a bad reply."""
        text = last_user_text(messages)
        try:
            if self._blocking:
                value = await asyncio.wait_for(asyncio.to_thread(self._function, text), timeout)
            else:
                value = self._function(text)
            if inspect.isawaitable(value):
                value = await asyncio.wait_for(value, timeout)
        except BackendError:
            raise
        except TimeoutError:
            raise BackendError(Outcome.TIMEOUT, f"no reply within {timeout:g} s") from None
        except Exception as error:
            why = scrub(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
            raise BackendError(Outcome.SERVER_ERROR, f"the function raised {why}") from error
        return _raw(value)


def _raw(value: Any) -> RawReply:
    if isinstance(value, RawReply):
        return value
    if value is None or isinstance(value, str):
        return RawReply(value)
    match value:
        case (str() | None as text, int() as tokens) if tokens >= 0 and not isinstance(tokens, bool):
            return RawReply(text, None, tokens)
    raise BackendError(
        Outcome.BAD_REPLY,
        f"the function returned {type(value).__name__}; return a text, (text, output tokens) or a RawReply",
    )


class PolicyBackend(WholeBackend):
    """Asks a policy in this process through its engine.

    Args:
        engine: a :class:`guerdon.rollout.protocol.Engine` with a tokenizer, or a function without arguments
            that loads one; it is called in a thread when the first question comes.
        identity: of the policy's weights, for the cache; without it replies are not cached.
        render: messages to prompt ids; by default the policy's chat template.
    """

    def __init__(
        self,
        engine: Any,
        *,
        identity: str | None = None,
        render: Callable[[Sequence[Message]], list[int]] | None = None,
    ) -> None:
        self._load = engine if not hasattr(engine, "start") else None
        self._engine = None if self._load is not None else engine
        self._render = render
        self._loading: asyncio.Task[Any] | None = None
        self.identity = identity

    async def _loaded(self) -> Any:
        if self._engine is None:
            assert self._load is not None
            if self._loading is None:
                self._loading = asyncio.create_task(asyncio.to_thread(self._load))
            # Shielded, so that one impatient caller does not stop the loading for all.
            self._engine = await asyncio.shield(self._loading)
        return self._engine

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        timeout: float = 60.0,
        **options: Any,
    ) -> RawReply:
        """Generate one message; the time limit begins when the policy is loaded."""
        from guerdon.rollout.protocol import Sampling

        engine = await self._loaded()
        ids = (self._render or engine.policy.render)(messages)
        if len(ids) >= engine.max_context:
            raise BackendError(
                Outcome.CLIENT_ERROR, f"the prompt has {len(ids)} tokens, the model takes {engine.max_context}"
            )
        stream = engine.start(messages, ids)
        try:
            sampling = Sampling(
                max_tokens=min(max_tokens, engine.max_context - len(ids)),
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            )
            done = await asyncio.wait_for(stream.generate(sampling), timeout)
        except TimeoutError:
            raise BackendError(Outcome.TIMEOUT, f"no reply within {timeout:g} s") from None
        finally:
            stream.close()
        text = done.text
        for token in engine.tokenizer.all_special_tokens if engine.tokenizer is not None else ():
            text = text.removesuffix(token)
        why = "stop" if done.stop in (StopReason.EOS, StopReason.STOP_STRING) else "length"
        return RawReply(text.strip(), len(ids), len(done.token_ids), None, why)

    async def aclose(self) -> None:
        """Close the engine, if it was ever loaded."""
        if self._engine is not None:
            await self._engine.aclose()
