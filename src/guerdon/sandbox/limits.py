"""What untrusted code may use, and how a run ended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from guerdon.errors import ConfigError

__all__ = ["Call", "Job", "Limits", "Result", "Sandbox", "Status"]


class Status(str, Enum):
    """How a run ended."""

    OK = "ok"
    ERROR = "error"
    """It raised, exited with another code than 0, or ended before it was done."""
    TIMEOUT = "timeout"
    """Wall-clock time ran out."""
    CPU = "cpu"
    """CPU time ran out."""
    MEMORY = "memory"
    OUTPUT = "output"
    """It wrote more than it may."""
    KILLED = "killed"
    """A signal that the sandbox did not send ended it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one run.

    Args:
        cpu_s: CPU seconds (the kernel counts whole seconds, rounded up).
        wall_s: seconds by the clock.
        memory_mb: address space, MiB.
        output_bytes: of standard output, of standard error, and of returned values, each.
        file_mb: largest file that may be written, MiB.
        open_files: descriptors.
        processes: further processes; 0 forbids to fork and to execute programs.

    Raises:
        ConfigError: a limit that is not positive, or less memory than an interpreter needs.
    """

    cpu_s: float = 5.0
    wall_s: float = 10.0
    memory_mb: int = 512
    output_bytes: int = 1 << 20
    file_mb: int = 16
    open_files: int = 64
    processes: int = 0

    def __post_init__(self) -> None:
        for name in ("cpu_s", "wall_s", "memory_mb", "output_bytes", "file_mb", "open_files"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(f"{name} must be a positive number, got {value!r}")
        if self.memory_mb < 64:
            raise ConfigError(f"memory_mb must be at least 64 (an interpreter needs that much), got {self.memory_mb}")
        if self.open_files < 16:
            raise ConfigError(f"open_files must be at least 16, got {self.open_files}")
        if self.processes < 0:
            raise ConfigError(f"processes must be >= 0, got {self.processes}")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a function that the untrusted code defines.

    Args:
        name: ``"f"``, or ``"Class.method"`` for a method of a fresh ``Class()``.
        args, kwargs: plain values (numbers, texts, bytes, None, lists, tuples, sets, dictionaries of these).
    """

    name: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Job:
    """Something to run.

    Args:
        code: Python source; with ``kind="sql"`` one SQL statement.
        kind: ``"program"`` runs it as ``__main__``; ``"calls"`` executes it and then makes ``calls``, returning
            each value; ``"sql"`` runs it against ``database``, read-only.
        stdin: given to a program.
        files: relative path to content, written into the run's own folder first.
        calls: for ``"calls"``.
        database: SQLite file, for ``"sql"``; parameters are in ``parameters``.
        max_rows: most rows that a query may return.
        limits: of this run.
    """

    code: str
    kind: str = "program"
    stdin: str | bytes = ""
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    calls: tuple[Call, ...] = ()
    database: str | None = None
    parameters: tuple[Any, ...] = ()
    max_rows: int = 10_000
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if self.kind not in ("program", "calls", "sql"):
            raise ConfigError(f"kind must be 'program', 'calls' or 'sql', got {self.kind!r}")
        if (self.kind == "sql") != (self.database is not None):
            raise ConfigError("database is required for kind='sql', and only there")


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did.

    Attributes:
        status: how it ended.
        stdout, stderr: what it wrote, cut at the limit; undecodable bytes are replaced.
        exit_code: of the process; None where a signal ended it.
        values: for calls one entry per call that was answered, ``(True, value)`` or ``(False, "Type: message")``;
            for SQL one ``(True, (columns, rows))``.
        error: one line that says what went wrong.
        wall_s, cpu_s: what it took.
    """

    status: Status
    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None
    values: tuple[tuple[bool, Any], ...] = ()
    error: str | None = None
    wall_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether it ran to its end."""
        return self.status is Status.OK


class Sandbox(Protocol):
    """Runs jobs. :class:`~guerdon.sandbox.LocalSandbox` does it on this machine; a container or a remote service
    is plugged in by another class with this method."""

    def run(self, job: Job) -> Result:
        """Run one job to its end; never raises for what the job does."""
        ...
