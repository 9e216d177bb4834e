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
from pathlib import Path, PurePosixPath
from typing import Any

from guerdon.errors import ConfigError, GuerdonError
from guerdon.sandbox import codec
from guerdon.sandbox.limits import Job, Limits, Result, Status
from guerdon.sandbox.zygote import receive, send

__all__ = ["LocalSandbox", "SandboxError", "default_sandbox", "run_calls", "run_python", "run_sql"]

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
        message = _message(job)
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
            return _result(job, report)
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


def _bytes(content: str | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")


def _message(job: Job) -> dict[str, Any]:
    for name in job.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            raise ConfigError(f"files are written below the run's own folder; {name!r} is not a relative path in it")
    limits = job.limits
    return {
        "kind": job.kind,
        "code": job.code.encode("utf-8", "replace").decode(),
        "stdin": _bytes(job.stdin).hex(),
        "files": {name: _bytes(content).hex() for name, content in job.files.items()},
        "calls": [
            {"name": c.name, "args": codec.encode(list(c.args)), "kwargs": codec.encode(dict(c.kwargs))}
            for c in job.calls
        ],
        "database": None if job.database is None else str(Path(job.database).resolve()),
        "readable": [] if job.database is None else [str(Path(job.database).resolve())],
        "parameters": codec.encode(list(job.parameters)),
        "max_rows": job.max_rows,
        "limits": {name: getattr(limits, name) for name in Limits.__dataclass_fields__},
    }


def _result(job: Job, report: dict[str, Any]) -> Result:
    stdout, stderr = (bytes.fromhex(report[k]).decode("utf-8", "replace") for k in ("stdout", "stderr"))
    values, done = _values(report["values"])
    code: int = report["code"]
    stopped = report["stopped"]
    expects = job.kind != "program"
    last = next((line for line in reversed(stderr.strip().splitlines()) if line.strip()), "")
    status, error = Status.OK, None
    if stopped == "timeout":
        status, error = Status.TIMEOUT, f"it ran longer than {job.limits.wall_s:g} s"
    elif stopped == "output":
        status, error = Status.OUTPUT, f"it wrote more than {job.limits.output_bytes} bytes"
    elif code in (-signal.SIGXCPU, -signal.SIGKILL) and report["cpu_s"] >= job.limits.cpu_s * 0.9:
        status, error = Status.CPU, f"it used more than {job.limits.cpu_s:g} s of CPU time"
    elif code == 77 or last.startswith("MemoryError") or (code == -signal.SIGSEGV and "MemoryError" in stderr):
        status, error = Status.MEMORY, f"it needed more than {job.limits.memory_mb} MiB"
    elif code < 0:
        status, error = Status.KILLED, f"ended by {signal.Signals(-code).name}"
    elif code != 0:
        status, error = Status.ERROR, last or f"it exited with code {code}"
    elif expects and not done:
        status, error = Status.ERROR, "it ended before every call was answered"
    return Result(
        status,
        stdout,
        stderr,
        code if code >= 0 else None,
        values,
        error,
        float(report["wall_s"]),
        float(report["cpu_s"]),
    )


def _values(text: str) -> tuple[tuple[tuple[bool, Any], ...], bool]:
    """Read the answers; whatever else stands there came from the job and counts as nothing."""
    import json

    out: list[tuple[bool, Any]] = []
    done = False
    for line in text.split("\n"):
        if not line:
            continue
        if line == "done":
            done = True
            continue
        try:
            ok, form = json.loads(line)
            out.append((ok is True, codec.decode(form)))
        except (ValueError, TypeError, RecursionError) as error:
            out.append((False, f"unreadable answer: {type(error).__name__}"))
    return tuple(out), done


_DEFAULT: dict[int, LocalSandbox] = {}


def default_sandbox() -> LocalSandbox:
    """One sandbox per process, made on first use."""
    pid = os.getpid()
    if pid not in _DEFAULT or _DEFAULT[pid]._closed:
        _DEFAULT[pid] = LocalSandbox()
    return _DEFAULT[pid]


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
