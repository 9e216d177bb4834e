"""The waiting interpreter: for every job it forks a child that is confined and runs it. Standard library only.

Run as ``python -I -c`` with the folder of this package as argument, by :class:`guerdon.sandbox.LocalSandbox`. Jobs and
reports are JSON with a length in front, over the socket that is its standard input. A child starts from this small,
clean process, so that untrusted code meets neither the caller's memory nor its environment, and starting it costs a
fork instead of an interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from typing import Any

_LOOK = 0.005


def receive(channel: socket.socket) -> Any:
    """One message, or None at the end."""
    head = _exactly(channel, 8)
    if head is None:
        return None
    body = _exactly(channel, struct.unpack("=Q", head)[0])
    return None if body is None else json.loads(body)


def send(channel: socket.socket, message: Any) -> None:
    """Write one message."""
    body = json.dumps(message).encode()
    channel.sendall(struct.pack("=Q", len(body)) + body)


def _exactly(channel: socket.socket, n: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < n:
        piece = channel.recv(min(1 << 20, n - len(parts)))
        if not piece:
            return None
        parts += piece
    return bytes(parts)


def main(package: str) -> None:
    """Serve jobs until the socket closes."""
    sys.path.insert(0, package)
    import codec  # noqa: F401  loaded once, before any fork
    import confine as rights

    sys.path.remove(package)
    # What programs use most is imported here, so that no child has to.
    for name in (
        "math",
        "re",
        "collections",
        "itertools",
        "functools",
        "heapq",
        "bisect",
        "string",
        "random",
        "datetime",
    ):
        __import__(name)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans of a job come to this process and are reaped here
    channel = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    place = _Place(rights)
    _prepare(place.folder)
    send(channel, {"ready": rights.support(), "folder": place.folder})
    gc.freeze()
    try:
        while (job := receive(channel)) is not None:
            send(channel, _serve(job, rights, place, channel.fileno()))
    finally:
        shutil.rmtree(place.folder, ignore_errors=True)


def _prepare(folder: str) -> None:
    """Make what every child needs alike: a child that makes nothing touches few pages, and each one costs a fault."""
    for signum in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(signum, signal.SIG_DFL)
    # The streams of a child's descriptors, made on pipes as they will be there.
    null = os.open(os.devnull, os.O_RDWR)
    reader, writer = os.pipe()
    for descriptor in (1, 2):
        os.dup2(writer, descriptor)
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False, buffering=1)  # noqa: SIM115
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    for descriptor in (null, reader, writer):
        os.close(descriptor)
    os.environ.update({"HOME": folder, "TMPDIR": folder})
    tempfile.tempdir = folder


class _Place:
    """The folder in which jobs run, one after the other, and what they may read."""

    def __init__(self, rights: Any) -> None:
        self.folder = tempfile.mkdtemp(prefix="guerdon-")
        system = (
            "/usr/lib", "/lib", "/lib64", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime",
        )  # fmt: skip
        self._readable = sorted({sys.prefix, sys.base_prefix, sys.exec_prefix, *system})
        self._rights = rights
        self._ruleset = rights.landlock(self.folder, self._readable)
        self.filters = rights.Filters()

    def ruleset(self, further: list[str]) -> int | None:
        """The rules of a job that may read ``further`` files too."""
        if not further:
            return self._ruleset
        return self._rights.landlock(self.folder, [*self._readable, *further])

    def release(self, ruleset: int | None) -> None:
        """Forget rules that were made for one job."""
        if ruleset is not None and ruleset != self._ruleset:
            os.close(ruleset)

    def clean(self) -> None:
        """Empty the folder; if a job made that impossible, take another one."""
        if not os.listdir(self.folder):
            return
        for entry in os.scandir(self.folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)
        if os.listdir(self.folder):
            raise OSError("the work folder cannot be emptied")


def _serve(job: dict[str, Any], rights: Any, place: _Place, private: int) -> dict[str, Any]:
    limits = job["limits"]
    started = time.monotonic()
    ruleset = place.ruleset(job["readable"])
    try:
        for name, content in job["files"].items():
            path = os.path.join(place.folder, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(bytes.fromhex(content))
        pipes = [os.pipe() for _ in range(3)]
        pid = os.fork()
        if pid == 0:
            _child(job, rights, place, ruleset, pipes, private)
        for _, end in pipes:
            os.close(end)
        texts, stopped = _collect(pid, [r for r, _ in pipes], limits, started)
        _, status, usage = os.wait4(pid, 0)
        if limits["processes"]:
            _reap(pid)
        for r, _ in pipes:
            os.close(r)
        return {
            "stdout": texts[0].hex(), "stderr": texts[1].hex(), "values": texts[2].decode("utf-8", "replace"),
            "code": os.waitstatus_to_exitcode(status), "stopped": stopped, "wall_s": time.monotonic() - started,
            "cpu_s": usage.ru_utime + usage.ru_stime,
        }  # fmt: skip
    finally:
        place.release(ruleset)
        place.clean()


def _collect(pid: int, readers: list[int], limits: dict[str, Any], started: float) -> tuple[list[bytes], str | None]:
    """Read what the child writes until it ends, or until it has gone on too long or written too much."""
    texts = [bytearray() for _ in readers]
    open_ = set(readers)
    stopped: str | None = None
    deadline = started + limits["wall_s"]
    ended = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
    over = False
    while True:
        left = deadline - time.monotonic()
        if left <= 0 and not over:
            stopped = "timeout"
            break
        watched = [*open_, ended] if ended is not None else list(open_)
        # Once the child has ended, only what is already in the pipes is read: a grandchild may hold them open.
        wait = 0.0 if over else left if ended is not None else min(left, _LOOK)
        ready = select.select(watched, [], [], wait)[0]
        if over and not [r for r in ready if r != ended]:
            break
        for r in ready:
            if r == ended:
                continue
            piece = os.read(r, 1 << 16)
            text = texts[readers.index(r)]
            text += piece
            if not piece:
                open_.discard(r)
            elif len(text) > limits["output_bytes"]:
                del text[limits["output_bytes"] :]
                stopped = "output"
        if stopped:
            break
        over = over or ended in ready or _over(pid)
    _kill(pid)
    if ended is not None:
        os.close(ended)
    return [bytes(t) for t in texts], stopped


def _over(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill(pid: int) -> None:
    for victim in (-pid, pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(victim, signal.SIGKILL)


def _reap(pid: int) -> None:
    """End what a job left behind: its process group, and whatever came to this process when its parent ended."""
    for _ in range(100):
        _kill(pid)
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                for orphan in _children():
                    _kill(orphan)
                time.sleep(0.001)
        except ChildProcessError:
            return


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            return [int(x) for x in file.read().split()]
    except OSError:
        return []


def _child(
    job: dict[str, Any], rights: Any, place: _Place, ruleset: int | None, pipes: list[Any], private: int
) -> None:
    """Never returns."""
    code = 1
    folder = place.folder
    try:
        os.setsid()
        os.close(private)
        stdin = (
            os.memfd_create("stdin")
            if hasattr(os, "memfd_create")
            else os.open(os.path.join(folder, ".stdin"), os.O_RDWR | os.O_CREAT)
        )
        os.write(stdin, bytes.fromhex(job["stdin"]))
        os.lseek(stdin, 0, 0)
        os.set_inheritable(stdin, True)
        ends = [stdin, *(w for _, w in pipes)]
        safe = [os.dup2(end, 200 + k) for k, end in enumerate(ends)]
        for k, end in enumerate(safe):
            os.dup2(end, k)
        if ruleset is not None:
            os.dup2(ruleset, 4)
            ruleset = 4
        os.closerange(5, 256)
        os.chdir(folder)
        limits = job["limits"]
        rights.confine(
            ruleset, place.filters, cpu_s=limits["cpu_s"], memory=limits["memory_mb"] << 20,
            file_bytes=limits["file_mb"] << 20, open_files=limits["open_files"], processes=limits["processes"],
        )  # fmt: skip
        if ruleset is not None:
            os.close(ruleset)
        code = {"program": _program, "calls": _calls, "sql": _sql}[job["kind"]](job)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            with contextlib.suppress(Exception):
                print(error.code, file=sys.stderr)
    except BaseException as error:  # noqa: BLE001  the child ends here whatever happened
        code = 77 if isinstance(error, MemoryError) else 1
        with contextlib.suppress(BaseException):
            _print_error()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):
                stream.flush()
        os._exit(code & 0xFF)


def _print_error() -> None:
    kind, error, trace = sys.exc_info()
    while trace is not None and trace.tb_frame.f_code.co_filename != "main.py":
        trace = trace.tb_next
    traceback.print_exception(kind, error, trace, limit=20)


def _program(job: dict[str, Any]) -> int:
    import types

    module = types.ModuleType("__main__")
    module.__dict__["__file__"] = "main.py"
    sys.modules["__main__"] = module
    sys.argv = ["main.py"]
    sys.path.insert(0, "")
    exec(compile(job["code"], "main.py", "exec"), module.__dict__)
    return 0


def _calls(job: dict[str, Any]) -> int:
    import types

    from codec import Unsupported, decode, encode

    # Bound before the job's code runs: what it does to modules does not reach them.
    dumps, write, exactly = json.dumps, os.write, Exception
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    exec(compile(job["code"], "main.py", "exec"), module.__dict__)
    for call in job["calls"]:
        try:
            target: Any = module.__dict__
            owner, _, method = call["name"].rpartition(".")
            if owner:
                target = getattr(target[owner](), method)
            else:
                target = target[method]
            value = target(*decode(call["args"]), **decode(call["kwargs"]))
            try:
                line = [True, encode(value)]
            except Unsupported as error:
                line = [False, f"returned a value that cannot be compared: {error}"]
        except MemoryError:
            line = [False, "MemoryError: out of memory"]
        except KeyError as error:
            missing = error.args and error.args[0] in (owner, method)
            line = [False, f"the code defines no {call['name']!r}" if missing else f"KeyError: {error}"]
        except exactly as error:
            line = [False, f"{type(error).__name__}: {str(error)[:500]}"]
        write(3, dumps(line).encode() + b"\n")
    write(3, b"done\n")
    return 0


def _sql(job: dict[str, Any]) -> int:
    import sqlite3

    from codec import decode, encode

    def allow(action: int, *_: Any) -> int:
        reading = action in (
            sqlite3.SQLITE_SELECT,
            sqlite3.SQLITE_READ,
            sqlite3.SQLITE_FUNCTION,
            sqlite3.SQLITE_RECURSIVE,
        )
        return sqlite3.SQLITE_OK if reading else sqlite3.SQLITE_DENY

    from urllib.parse import quote

    connection = sqlite3.connect(f"file:{quote(job['database'])}?mode=ro", uri=True, timeout=1.0)
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    connection.set_authorizer(allow)
    cursor = connection.execute(job["code"], decode(job["parameters"]))
    if cursor.description is None:
        raise sqlite3.OperationalError("the statement returns no rows; write a SELECT")
    rows = cursor.fetchmany(job["max_rows"] + 1)
    if len(rows) > job["max_rows"]:
        raise sqlite3.OperationalError(f"the query returns more than {job['max_rows']} rows")
    line = json.dumps([True, encode(([c[0] for c in cursor.description], [tuple(r) for r in rows]))])
    data = line.encode() + b"\ndone\n"
    while data:
        data = data[os.write(3, data) :]
    return 0


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main(sys.argv[1])
