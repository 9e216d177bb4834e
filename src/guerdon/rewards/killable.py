"""Calls that can be killed: a function in processes of its own, each call with a deadline, from any thread.

A thread cannot be stopped and ``signal.alarm`` works in the main thread only, and neither interrupts a computation
inside the interpreter's own C code. A process can be killed. One process per pool imports the function and waits; workers
are forked from it, so that one which overran its deadline, or died, is replaced in milliseconds. For trusted code on
hostile input; untrusted code belongs into :mod:`guerdon.sandbox`.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from guerdon.errors import ConfigError, RewardError
from guerdon.sandbox.zygote import receive, send

__all__ = ["Failed", "KillablePool", "Killed", "shared_pool"]

_START_S = 120.0


class Killed(RewardError):
    """The call did not end in time, or its process died; the process is gone."""


class Failed(RewardError):
    """The function raised; the text says what."""


class KillablePool:
    """Processes that call one function.

    Args:
        target: ``"module:function"``; it takes and returns what JSON holds. An attribute ``prepare`` of the function is called
            once, before workers are forked.
        workers: processes at once; default: one per core.
        memory_mb: address space of each, MiB; a call that needs more ends as :class:`Failed` or :class:`Killed`.

    Raises:
        ConfigError: fewer than one worker, or a system without fork.
    """

    def __init__(self, target: str, *, workers: int | None = None, memory_mb: int = 2048) -> None:
        if workers is not None and workers < 1:
            raise ConfigError(f"workers must be at least 1, got {workers}")
        if os.name != "posix":
            raise ConfigError("calls that can be killed need a POSIX system")
        self.target, self.memory_mb = target, memory_mb
        self.workers = workers or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0])
        self.kills = 0
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(self.workers):
            self._idle.put(None)
        self._mother: _Mother | None = None
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        _POOLS.add(self)

    def call(self, arguments: Sequence[Any], timeout: float) -> Any:
        """One call, from any thread; it waits for a free worker first.

        Args:
            arguments: of the function.
            timeout: seconds from when a worker takes it.

        Raises:
            Killed: no answer in time, or the worker died.
            Failed: the function raised.
        """
        worker = self._idle.get()
        try:
            worker = worker or self._fork()
            try:
                answer = worker.ask({"arguments": list(arguments), "timeout": timeout}, timeout)
            except (OSError, ValueError) as error:
                worker.kill()
                worker = None
                self.kills += 1
                reason = f"no result within {timeout:g} s" if isinstance(error, TimeoutError) else "its process died"
                raise Killed(f"{self.target}: {reason}") from None
        finally:
            self._idle.put(worker)
        if "error" in answer:
            raise Failed(str(answer["error"]))
        return answer["value"]

    def map(self, calls: Sequence[Sequence[Any]], timeout: float) -> list[Any]:
        """All calls on all workers, in order; a :class:`Killed` or :class:`Failed` stands where one failed."""

        def one(arguments: Sequence[Any]) -> Any:
            try:
                return self.call(arguments, timeout)
            except (Killed, Failed) as error:
                return error

        if len(calls) < 2 or self.workers == 1:
            return [one(c) for c in calls]
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="killable")
        return list(self._threads.map(one, calls))

    def close(self) -> None:
        """End all workers; the next call starts new ones."""
        with self._lock:
            mother, self._mother = self._mother, None
        if mother is not None:
            mother.close()

    def _fork(self) -> _Worker:
        with self._lock:
            if self._mother is None:
                self._mother = _Mother(self.target, self.memory_mb)
            try:
                return self._mother.fork()
            except OSError:  # it was killed from outside; another one is started
                self._mother.close()
                self._mother = _Mother(self.target, self.memory_mb)
                return self._mother.fork()


class _Mother:
    """The process that imports the function, and forks."""

    def __init__(self, target: str, memory_mb: int) -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "guerdon.rewards.killable", target, str(memory_mb)],
            stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
            start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self._socket = ours
        ours.settimeout(_START_S)
        try:
            ready = receive(ours)
        except (OSError, ValueError) as error:
            ready = {"error": f"{type(error).__name__}: {error}"}
        if not isinstance(ready, dict) or "error" in ready:
            self.close()
            reason = ready["error"] if isinstance(ready, dict) else "its process ended"
            raise RewardError(f"{target} cannot be used: {reason}")

    def fork(self) -> _Worker:
        """A new worker.

        Raises:
            OSError: the process is gone.
        """
        self._socket.sendall(b"f")
        said, descriptors, _, _ = socket.recv_fds(self._socket, 16, 2)
        if not descriptors:
            raise OSError("the process that forks workers ended")
        return _Worker(int(said), socket.socket(fileno=descriptors[0]), *descriptors[1:])

    def close(self) -> None:
        """End it and all its workers, which are of its session."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.close()


class _Worker:
    """One process and the socket to it."""

    def __init__(self, pid: int, channel: socket.socket, handle: int | None = None) -> None:
        self._pid, self._socket, self._handle = pid, channel, handle

    def ask(self, message: Any, timeout: float) -> dict[str, Any]:
        self._socket.settimeout(timeout)
        send(self._socket, message)
        answer = receive(self._socket)
        if not isinstance(answer, dict):
            raise OSError("it ended")
        return answer

    def kill(self) -> None:
        self._socket.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._handle is not None:
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
                os.close(self._handle)
            else:
                os.kill(self._pid, signal.SIGKILL)
        self._handle = None


_POOLS: weakref.WeakSet[KillablePool] = weakref.WeakSet()
_SHARED: dict[tuple[int, str], KillablePool] = {}
_SHARED_LOCK = threading.Lock()


def shared_pool(target: str) -> KillablePool:
    """One pool per process and function, made on first use."""
    key = (os.getpid(), target)
    with _SHARED_LOCK:
        if key not in _SHARED:
            _SHARED[key] = KillablePool(target)
        return _SHARED[key]


@atexit.register
def _close_all() -> None:
    for pool in list(_POOLS):
        pool.close()


def _main(target: str, memory_mb: int) -> None:
    """The side of the process that forks: a worker for every byte on the socket, until that closes."""
    import resource

    channel = socket.socket(fileno=os.dup(0))
    try:
        module, _, name = target.partition(":")
        function = getattr(importlib.import_module(module), name)
        getattr(function, "prepare", lambda: None)()
    except Exception as error:  # noqa: BLE001  said to the other side, which raises it
        send(channel, {"error": f"{type(error).__name__}: {error}"})
        return
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers need no burial
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    send(channel, {})
    gc.freeze()
    while channel.recv(1):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            channel.close()
            ours.close()
            resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
            _serve(theirs, function)
            os._exit(0)
        theirs.close()
        sent = [ours.fileno()]
        with contextlib.suppress(AttributeError, OSError):  # a system without handles of processes
            sent.append(os.pidfd_open(pid))
        socket.send_fds(channel, [str(pid).encode()], sent)
        ours.close()
        for handle in sent[1:]:
            os.close(handle)


def _serve(channel: socket.socket, function: Callable[..., Any]) -> None:
    """A worker's side: answer calls until the socket closes."""
    import resource

    while (message := receive(channel)) is not None:
        # The kernel ends a runaway call even where nobody is left to kill it.
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu = math.ceil(used.ru_utime + used.ru_stime + message["timeout"]) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, resource.RLIM_INFINITY))
        try:
            answer = {"value": function(*message["arguments"])}
        except Exception as error:  # noqa: BLE001  said to the other side, which raises it
            answer = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        send(channel, answer)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
