"""Runs jobs on this machine: a pool of waiting interpreters, each of which forks a confined child per job."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from guerdon.errors import ConfigError, GuerdonError
from guerdon.sandbox.limits import Job, Limits, Result, Sandbox, Status
from guerdon.sandbox.reports import job_message, job_result
from guerdon.sandbox.zygote import receive, send

__all__ = ["CHOICE", "LocalSandbox", "SandboxError", "default_sandbox", "run_calls", "run_python", "run_sql"]

CHOICE = "GUERDON_SANDBOX"
_GRACE_S = 5.0


class SandboxError(GuerdonError, RuntimeError):
    """The sandbox itself cannot be started or has failed; the job is not to blame."""


class LocalSandbox:
    """Confined processes on this machine.

    On Linux, as any user, a job cannot read or write files outside its own folder (but for the interpreter's and the
    system's libraries), open sockets, start or signal other processes, or exceed its limits; it is killed with all that
    it started. Where the kernel lacks Landlock (before 5.13) or a system-call filter, or on another system,
    :attr:`enforced` says what is missing, and the first run warns about it.

    Args:
        workers: interpreters that wait for jobs; default: one per core.
        strict: raise instead of warning where something cannot be enforced.

    Raises:
        ConfigError: fewer than one worker.
        SandboxError: no interpreter can be started, or with ``strict`` something cannot be enforced.
    """

    def __init__(self, workers: int | None = None, *, strict: bool = False) -> None:
        if workers is not None and workers < 1:
            raise ConfigError(f"workers must be at least 1, got {workers}")
        if os.name != "posix":
            raise SandboxError("the local sandbox needs a POSIX system; plug in a container or a remote sandbox")
        self.workers = workers or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0])
        self.strict = strict
        self.enforced: dict[str, bool] = {}
        self._idle: queue.LifoQueue[_Zygote | None] = queue.LifoQueue()
        for _ in range(self.workers):
            self._idle.put(None)
        self._all: weakref.WeakSet[_Zygote] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._closed = False
        _SANDBOXES.add(self)

    def run(self, job: Job) -> Result:
        """Run one job; safe to call from any thread, each waits for a free worker.

        Raises:
            SandboxError: the sandbox was closed, or its workers cannot be started.
        """
        if self._closed:
            raise SandboxError("this sandbox is closed")
        message = job_message(job)
        worker = self._idle.get()
        try:
            if worker is None:
                worker = self._start()
            try:
                report = worker.ask(message, job.limits.wall_s + _GRACE_S)
            except (OSError, ValueError, EOFError) as error:
                worker.kill()
                worker = None
                return Result(Status.KILLED, error=f"the worker was lost: {error or type(error).__name__}")
            return job_result(job, report)
        finally:
            self._idle.put(worker)

    def map(self, jobs: Iterable[Job]) -> list[Result]:
        """Run jobs on all workers; results in order."""
        return list(self._pool().map(self.run, jobs))

    async def arun(self, job: Job) -> Result:
        """:meth:`run` without holding up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool(), self.run, job)

    def close(self) -> None:
        """End all workers. Idempotent."""
        self._closed = True
        for worker in list(self._all):
            worker.kill()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> LocalSandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox")
            return self._threads

    def _start(self) -> _Zygote:
        worker = _Zygote()
        self._all.add(worker)
        first = not self.enforced
        self.enforced = dict(worker.support)
        missing = [name for name, there in self.enforced.items() if not there]
        if missing and self.strict:
            worker.kill()
            raise SandboxError(f"this machine cannot enforce: {', '.join(missing)} (strict=True)")
        if missing and first:
            warnings.warn(
                f"the sandbox cannot enforce here: {', '.join(missing)}; run only code that you would run anyway, "
                "or plug in a container",
                stacklevel=4,
            )
        return worker


class _Zygote:
    """A waiting interpreter and the socket to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        package = Path(__file__).resolve().parent
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(package / "zygote.py"), str(package)],
                stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, cwd="/",
                close_fds=True, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise SandboxError(f"cannot start an interpreter for the sandbox: {error}") from error
        finally:
            theirs.close()
        self._socket = ours
        self._folder: str | None = None
        try:
            ready = self._read(30.0)
            self.support: dict[str, bool] = ready["ready"]
            self._folder = ready["folder"]
        except (OSError, EOFError, ValueError) as error:
            self.kill()
            raise SandboxError(f"the sandbox's interpreter did not start ({sys.executable}): {error}") from error

    def ask(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send a job and wait for its report."""
        self._socket.settimeout(timeout)
        send(self._socket, message)
        return self._read(timeout)

    def _read(self, timeout: float) -> dict[str, Any]:
        self._socket.settimeout(timeout)
        report = receive(self._socket)
        if not isinstance(report, dict):
            raise EOFError("it ended without a report")
        return report

    def kill(self) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._socket.close()
        self._process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


_SANDBOXES: weakref.WeakSet[LocalSandbox] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for sandbox in list(_SANDBOXES):
        sandbox.close()


_DEFAULT: dict[tuple[int, str], Sandbox] = {}


def default_sandbox() -> Sandbox:
    """One sandbox per process, made on first use: this machine's, or the one that ``GUERDON_SANDBOX`` names.

    Raises:
        ConfigError: the variable names no sandbox; see :func:`guerdon.sandbox.make_sandbox`.
    """
    choice = os.environ.get(CHOICE, "")
    place = (os.getpid(), choice)
    found = _DEFAULT.get(place)
    if found is None or getattr(found, "_closed", False):
        from guerdon.sandbox.select import chosen

        found = _DEFAULT[place] = chosen(choice) if choice else LocalSandbox()
    return found


def run_python(code: str, stdin: str | bytes = "", *, limits: Limits | None = None, **options: Any) -> Result:
    """Run a program in the process's own sandbox; see :class:`~guerdon.sandbox.Job` for ``options``."""
    return default_sandbox().run(Job(code, "program", stdin, limits=limits or Limits(), **options))


def run_calls(code: str, calls: Sequence[Any], *, limits: Limits | None = None) -> Result:
    """Execute code, then call its functions; see :class:`~guerdon.sandbox.Call`."""
    return default_sandbox().run(Job(code, "calls", calls=tuple(calls), limits=limits or Limits()))


def run_sql(
    query: str,
    database: str | os.PathLike[str],
    parameters: Sequence[Any] = (),
    *,
    max_rows: int = 10_000,
    limits: Limits | None = None,
) -> Result:
    """Run one read-only statement against an SQLite file.

    Raises:
        ConfigError: the file does not exist.
    """
    path = Path(database)
    if not path.is_file():
        raise ConfigError(f"database {str(database)!r} does not exist; give the path of an SQLite file")
    # It is not opened here: closing a file drops the locks that this process may hold on it.
    return default_sandbox().run(
        Job(
            query, "sql", database=str(path), parameters=tuple(parameters), max_rows=max_rows, limits=limits or Limits()
        )
    )
