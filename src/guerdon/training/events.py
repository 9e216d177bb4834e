"""One event loop for a whole run, so that connections opened by an environment outlive a step."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["EventLoop"]

T = TypeVar("T")


class EventLoop:
    """Runs coroutines on one loop; inside a notebook, whose own loop is busy, on one in a thread."""

    def __init__(self) -> None:
        self._here: asyncio.AbstractEventLoop | None = None
        self._thread: asyncio.AbstractEventLoop | None = None
        self._forget: list[weakref.finalize[..., EventLoop]] = []

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run to the end and return the result."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._run_here(coroutine)
        if self._thread is None:
            loop = self._thread = asyncio.new_event_loop()
            threading.Thread(target=_serve, args=(loop,), name="guerdon-events", daemon=True).start()
            self._forget.append(weakref.finalize(self, loop.call_soon_threadsafe, loop.stop))
        return asyncio.run_coroutine_threadsafe(coroutine, self._thread).result()

    def _run_here(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._here is None:
            self._here = asyncio.new_event_loop()
            # Whoever forgets close() at least leaks no file descriptors.
            self._forget.append(weakref.finalize(self, self._here.close))
        task = self._here.create_task(coroutine)
        try:
            return self._here.run_until_complete(task)
        except KeyboardInterrupt:
            task.cancel()
            self._here.run_until_complete(asyncio.gather(task, return_exceptions=True))
            raise

    def close(self) -> None:
        """Close the loop after its generators. Idempotent; the next ``run`` opens another."""
        if self._here is not None:
            self._here.run_until_complete(self._here.shutdown_asyncgens())
        for finalizer in self._forget:
            finalizer()
        self._here = self._thread = None
        self._forget = []


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()
