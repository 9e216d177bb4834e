"""Processes that score, and the queue in front of them.

A reward may take long, use a core, crash its interpreter or never return. In a process of its own it holds up nobody: the
server goes on answering, a batch that is out of time is really ended (its process is killed and another one started), and
as many batches are scored at once as there are processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from guerdon.errors import ConfigError
from guerdon.serve import wire
from guerdon.serve.problems import Problem

__all__ = ["Scorers"]

_START_S = 300.0
_RETRY_S = 1.0


class Scorers:
    """A fixed number of scoring processes.

    Args:
        spec: the reward, as YAML spells it.
        workers: processes.
        on_restart: called whenever a process had to be replaced.
    """

    def __init__(self, spec: Any, workers: int, *, on_restart: Callable[[], None] | None = None) -> None:
        self.spec = spec
        self.workers = workers
        self._on_restart = on_restart
        self._free: asyncio.Queue[_Process] = asyncio.Queue()
        self._all: set[_Process] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    @property
    def alive(self) -> int:
        """Processes that are ready or busy; fewer than ``workers`` while one is being replaced."""
        return len(self._all)

    async def start(self) -> None:
        """Start the processes; returns when all are ready.

        Raises:
            ConfigError: the reward cannot be made.
        """
        try:
            for process in await asyncio.gather(*(self._open() for _ in range(self.workers))):
                self._free.put_nowait(process)
        except ConfigError:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """End all processes. Idempotent."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        for process in list(self._all):
            await process.end()
        self._all.clear()

    async def score(self, records: Sequence[dict[str, Any]], deadline: float) -> list[dict[str, Any]]:
        """Rows of :func:`guerdon.evaluation.score_records`, one a record, in order.

        Args:
            records: as ``guerdon score`` reads them.
            deadline: point on the monotonic clock.

        Raises:
            Problem: 504 out of time, 422 the reward refuses its set-up or the records, 500 it has a bug or its process died.
        """
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                process = await self._free.get()
        except TimeoutError:
            raise Problem(
                504, "deadline_exceeded", "every scorer was busy for the whole time limit; send fewer at once, or start "
                "the server with more --workers", retry_after=1,
            ) from None  # fmt: skip
        # Where the client goes away the batch is finished all the same: that is cheaper than a new process.
        return await asyncio.shield(self._spawn(self._run(process, records, deadline)))

    async def _run(self, process: _Process, records: Sequence[dict[str, Any]], deadline: float) -> list[dict[str, Any]]:
        answer: Any = None
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                answer = await process.ask(records)
        except TimeoutError:
            raise Problem(
                504, "deadline_exceeded", "the rewards took longer than the time limit and were stopped; send fewer records "
                "at once, or start the server with a longer --timeout",
            ) from None  # fmt: skip
        except (OSError, EOFError, ValueError):
            raise Problem(
                500, "scorer_died", f"the scoring process ended ({await process.how()}); its standard error says more"
            ) from None
        finally:
            if answer is not None:
                self._free.put_nowait(process)
            else:
                self._all.discard(process)
                if not self._closed:
                    self._spawn(self._replace(process))
        if "rows" in answer:
            return list(answer["rows"])
        if "error" in answer:
            raise Problem(422, "reward_refused", str(answer["error"]))
        raise Problem(500, "reward_bug", f"the reward raised {answer['bug']}; the server's standard error says where")

    async def _open(self) -> _Process:
        process = _Process()
        self._all.add(process)
        try:
            await process.open(self.spec)
        except BaseException:
            self._all.discard(process)
            await process.end()
            raise
        return process

    async def _replace(self, old: _Process) -> None:
        await old.end()
        if self._on_restart is not None:
            self._on_restart()
        while not self._closed:
            try:
                self._free.put_nowait(await self._open())
                return
            except ConfigError as error:
                print(f"guerdon: a scorer cannot be started again: {error}", file=sys.stderr, flush=True)
                await asyncio.sleep(_RETRY_S)

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited has it; where nobody does, it is no news


class _Process:
    """One scoring process and the socket to it."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self, spec: Any) -> None:
        """Start it and wait until it has its reward.

        Raises:
            ConfigError: the reward cannot be made, or the process does not start.
        """
        ours, theirs = socket.socketpair()
        try:
            self._child = await asyncio.to_thread(_launch, theirs.fileno())
        except OSError as error:
            ours.close()
            raise ConfigError(f"cannot start a scoring process: {error}") from error
        finally:
            theirs.close()
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        try:
            async with asyncio.timeout(_START_S):
                answer = await self.ask({"spec": spec})
        except TimeoutError:
            raise ConfigError(f"a scoring process was not ready after {_START_S:g} s") from None
        except (OSError, EOFError, ValueError):
            raise ConfigError(f"a scoring process did not start ({await self.how()})") from None
        if "error" in answer:
            raise ConfigError(str(answer["error"]))

    async def ask(self, message: Any) -> dict[str, Any]:
        """Send a message and wait for its answer.

        Raises:
            OSError, EOFError, ValueError: the process is gone, or what it says is no answer.
        """
        assert self._reader is not None and self._writer is not None
        body = wire.dumps(message)
        self._writer.write(struct.pack("=Q", len(body)) + body)
        await self._writer.drain()
        (length,) = struct.unpack("=Q", await self._reader.readexactly(8))
        answer = json.loads(await self._reader.readexactly(length))
        if not isinstance(answer, dict):
            raise ValueError("no answer")
        return answer

    async def how(self) -> str:
        """How it ended, in words."""
        if self._child is None:
            return "not started"
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._child.wait, 1.0)
        code = self._child.returncode
        if code is None:
            return "it still runs"
        return f"by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    async def end(self) -> None:
        """Kill it, with what it started."""
        if self._writer is not None:
            self._writer.close()
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
            await asyncio.to_thread(self._child.wait)


def _launch(channel: int) -> subprocess.Popen[bytes]:
    # A session of its own: a signal from the terminal reaches the server alone, which drains first.
    return subprocess.Popen(
        [sys.executable, "-m", "guerdon.serve.scorer_process"], stdin=channel, stdout=2, close_fds=True,
        start_new_session=True,
    )  # fmt: skip
