"""Jobs and their results on the way to the process that runs them and back: one form for every kind of sandbox."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from guerdon.errors import ConfigError
from guerdon.sandbox import codec
from guerdon.sandbox.limits import Job, Limits, Result, Status

__all__ = ["job_message", "job_result"]


def _bytes(content: str | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")


def job_message(job: Job) -> dict[str, Any]:
    """A job in JSON's types, as the process that runs it reads it.

    Raises:
        ConfigError: a file outside the run's own folder.
    """
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


def job_result(job: Job, report: Mapping[str, Any]) -> Result:
    """The result of a job from the report of the process that ran it."""
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
