"""Waiting for slow rewards: coroutines and blocking calls, many at once, each with a deadline, from any thread.

Everything runs on one event loop in a thread of its own, so that a session opened by a remote reward in one call still
works in the next, and a caller inside a running loop (a notebook, a server) may wait as well.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any

from guerdon.types import Score

__all__ = ["Timeout", "may_wait", "wait", "wait_each"]


class Timeout(Exception):
    """A score did not arrive in time."""


class _Loop:
    """The loop, started when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def here(self) -> bool:
        """Whether the caller runs on the loop."""
        return threading.current_thread() is self._thread

    def get(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._serve, args=(self._loop,), name="guerdon-rewards", daemon=True
                )
                self._thread.start()
            return self._loop

    @staticmethod
    def _serve(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()


_LOOP = _Loop()


def wait(call: Callable[[], Any], timeout: float | None = None) -> Any:
    """Call, and await the result if it can be awaited.

    Args:
        call: may block or return an awaitable.
        timeout: seconds; without it, a call that does not return an awaitable runs right here.

    Raises:
        Timeout: nothing came in time. A coroutine is cancelled. A thread cannot be stopped: a blocking call goes on
            unheard, so untrusted or runaway code belongs into :mod:`guerdon.sandbox`.
    """
    if timeout is None:
        value = call()
        return _run(_finish(value)) if inspect.isawaitable(value) else value
    return _run(_limited(call, timeout))


def wait_each(calls: Sequence[Callable[[], Any]], *, timeout: float | None, workers: int | None) -> list[Any]:
    """Results of the calls in order; an :class:`Exception` stands where one failed.

    Args:
        calls: each may block or return an awaitable.
        timeout: seconds that each may take, from its own beginning.
        workers: how many run at once. ``None``: coroutines all at once, blocking calls one after the other.
    """
    if timeout is None and workers in (None, 1):
        values = [_caught(call) for call in calls]
        waiting = [k for k, value in enumerate(values) if may_wait(value)]
        if waiting:
            finished = _run(_all([_finish(values[k]) for k in waiting], workers))
            for k, value in zip(waiting, finished, strict=True):
                values[k] = value
        return values
    if not calls:
        return []
    blocking = workers is None and not any(_is_coroutine(call) for call in calls[:1])
    return _run(_all([_limited(call, timeout) for call in calls], 1 if blocking else workers))


_READY = frozenset({float, int, bool, type(None), Score})


def may_wait(value: Any) -> bool:
    """Whether a value is to be awaited; quick for the values that rewards return by the hundred thousand."""
    return type(value) not in _READY and inspect.isawaitable(value)


def _caught(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # noqa: BLE001  carried to the caller, who names and counts it
        return error


def _is_coroutine(call: Callable[[], Any]) -> bool:
    return inspect.iscoroutinefunction(getattr(call, "func", call))


async def _all(jobs: Sequence[Awaitable[Any]], workers: int | None) -> list[Any]:
    gate = asyncio.Semaphore(workers or max(1, len(jobs)))

    async def one(job: Awaitable[Any]) -> Any:
        async with gate:
            return await job

    return list(await asyncio.gather(*(one(job) for job in jobs), return_exceptions=True))


async def _finish(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


async def _limited(call: Callable[[], Any], timeout: float | None) -> Any:
    try:
        return await asyncio.wait_for(_called(call), timeout)
    except TimeoutError as error:
        # The call itself may have raised a TimeoutError of its own; only ours has a cancellation behind it.
        if isinstance(error.__cause__, asyncio.CancelledError):
            raise Timeout(f"no score within {timeout:g} s") from None
        raise


async def _called(call: Callable[[], Any]) -> Any:
    """Await a coroutine here, run a blocking call in a daemon thread: nobody has to wait for that one at exit."""
    if _is_coroutine(call):
        return await call()
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def deliver(value: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)

    def work() -> None:
        value: Any = None
        problem: Exception | None = None
        try:
            value = call()
        except Exception as error:  # noqa: BLE001  carried over to the waiting side
            problem = error
        except BaseException as error:  # noqa: BLE001  SystemExit would end the loop that everybody waits on
            problem = RuntimeError(f"{type(error).__name__}: {error}")
        if isinstance(problem, StopIteration):  # which no future can carry
            problem = RuntimeError(f"StopIteration: {problem}")
        loop.call_soon_threadsafe(deliver, value, problem)

    threading.Thread(target=work, daemon=True).start()
    return await _finish(await future)


def _run(job: Any) -> Any:
    loop = _LOOP.get()
    if not _LOOP.here():
        return asyncio.run_coroutine_threadsafe(_finish(job), loop).result()
    # A coroutine of one reward calls another reward as a plain function: the loop cannot wait for itself.
    found: Future[Any] = Future()

    def work() -> None:
        try:
            found.set_result(asyncio.run(_finish(job)))
        except BaseException as error:  # noqa: BLE001  carried over to the waiting side
            found.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return found.result()
