"""Runs each job in a Docker container of its own, through the ``docker`` command.

The container gets no network, a read-only root, a small folder in memory to write to, no capabilities, an ordinary user, and
limits on memory, processes and CPUs; inside, the job is confined as on the local machine. Nothing of this package has to
be in the image: it needs a Python of 3.11 or newer. The ``docker`` command finds its daemon as always (``DOCKER_HOST``,
contexts), so the containers may run on another machine; ``host="ssh://user@machine"`` says so in a configuration.

Not tried against a Docker daemon yet: the tests run the command line, the conversation and the code inside the container with
a stand-in for ``docker`` that executes the container's command on this machine without any of the flags. Whether a daemon
enforces the flags is Docker's affair, and is not tested here.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import struct
import subprocess
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from guerdon.errors import ConfigError
from guerdon.sandbox.limits import Job, Result, Status
from guerdon.sandbox.local import SandboxError
from guerdon.sandbox.reports import job_message, job_result

__all__ = ["DockerSandbox"]

_SOURCES = ("codec", "confine", "zygote", "contained")
_WORK, _DATABASE = "/work", "/guerdon-database.sqlite"
_SUPERVISOR_MB = 96
_SUPERVISOR_PIDS = 32
_SHIPPED_MB = 256

_BOOT = """
import json, os, struct, sys, tempfile
read = sys.stdin.buffer.read
opening = json.loads(read(struct.unpack("=Q", read(8))[0]))
package = tempfile.mkdtemp(prefix="package-")
for name, text in opening["sources"].items():
    with open(os.path.join(package, name + ".py"), "w", encoding="utf-8") as file:
        file.write(text)
sys.path.insert(0, package)
import contained
sys.path.remove(package)
contained.main(opening["job"], package)
"""


class DockerSandbox:
    """Containers on this machine or on another one.

    Args:
        image: has ``python3`` of 3.11 or newer; it must be there already (``docker pull``), since a job waits for no download.
        workers: containers at once, in :meth:`map`.
        host: the daemon, as ``docker --host`` takes it; by default what the command itself finds.
        runtime: of the container (``runsc`` for gVisor), as ``docker run --runtime`` takes it.
        cpus: that one container may use.
        startup_s: seconds that starting and removing a container may take, beyond the job's own limit.
        command: the client; ``podman`` takes the same options.

    Raises:
        ConfigError: an argument out of range.
    """

    def __init__(
        self,
        image: str = "python:3.12-slim",
        *,
        workers: int = 2,
        host: str | None = None,
        runtime: str | None = None,
        cpus: float = 1.0,
        startup_s: float = 60.0,
        command: str = "docker",
    ) -> None:
        for name, number in (("workers", workers), ("cpus", cpus), ("startup_s", startup_s)):
            if isinstance(number, bool) or not isinstance(number, int | float) or number <= 0:
                raise ConfigError(f"{name} must be a positive number, got {number!r}")
        for name, text in (("image", image), ("command", command), ("host", host), ("runtime", runtime)):
            # What begins with a dash would be read as an option.
            if text is not None and (not isinstance(text, str) or not text or text.startswith("-")):
                raise ConfigError(f"{name} must be a name, got {text!r}")
        self.image, self.workers, self.host, self.runtime = image, int(workers), host, runtime
        self.cpus, self.startup_s, self.command = float(cpus), float(startup_s), command
        self._sources = {name: (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8") for name in _SOURCES}
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._closed = False

    def run(self, job: Job) -> Result:
        """Run one job; safe to call from any thread.

        Raises:
            SandboxError: the sandbox was closed, there is no ``docker``, or it cannot start the container.
            ConfigError: a database that is missing, or too large for a daemon on another machine.
        """
        if self._closed:
            raise SandboxError("this sandbox is closed")
        message, mount, shipped = self._message(job)
        body = json.dumps({"sources": self._sources, "job": message}).encode()
        name = f"guerdon-{secrets.token_hex(8)}"
        try:
            done = subprocess.run(
                self.arguments(job, name, mount, shipped), input=struct.pack("=Q", len(body)) + body, capture_output=True,
                timeout=job.limits.wall_s + self.startup_s, check=False,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise SandboxError(
                f"there is no command {self.command!r}; install Docker, or use another sandbox"
            ) from error
        except OSError as error:
            raise SandboxError(f"{self.command} cannot be started: {error}") from error
        except subprocess.TimeoutExpired:
            self._remove(name)
            return Result(Status.KILLED, error=f"the container gave no report within {self.startup_s:g} s of its limit")
        return self._read(job, done)

    def arguments(self, job: Job, name: str, mount: str | None = None, shipped_mb: int = 0) -> list[str]:
        """The command line of one container.

        Args:
            job: its limits count.
            name: of the container.
            mount: a database on the daemon's machine, mounted read-only.
            shipped_mb: room for a database that is sent along.
        """
        limits = job.limits
        scratch = limits.file_mb + shipped_mb + 8
        memory = limits.memory_mb + scratch + _SUPERVISOR_MB
        options = [
            *("--rm", "--interactive", "--pull", "never", "--name", name),
            *("--network", "none", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
            *("--user", "65534:65534", "--workdir", _WORK),
            *("--tmpfs", f"{_WORK}:rw,exec,nosuid,nodev,size={scratch}m,mode=1777"),
            *("--memory", f"{memory}m", "--memory-swap", f"{memory}m"),
            *("--pids-limit", str(limits.processes + _SUPERVISOR_PIDS), "--cpus", f"{self.cpus:g}"),
            *("--ulimit", "core=0", "--log-driver", "none"),
            *("--env", f"TMPDIR={_WORK}", "--env", f"HOME={_WORK}", "--env", "LANG=C.UTF-8"),
        ]
        if self.runtime is not None:
            options += ["--runtime", self.runtime]
        if mount is not None:
            options += ["--mount", f"type=bind,source={mount},target={_DATABASE},readonly"]
        return [*self._client(), "run", *options, self.image, "python3", "-I", "-c", _BOOT]

    def map(self, jobs: Iterable[Job]) -> list[Result]:
        """Run jobs, so many containers at once; results in order."""
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="docker")
        return list(self._threads.map(self.run, jobs))

    def close(self) -> None:
        """Take no further jobs. Idempotent."""
        self._closed = True
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> DockerSandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _client(self) -> list[str]:
        return [self.command, *(() if self.host is None else ("--host", self.host))]

    def _elsewhere(self) -> bool:
        daemon = self.host or os.environ.get("DOCKER_HOST", "")
        return bool(daemon) and not daemon.startswith("unix://")

    def _message(self, job: Job) -> tuple[dict[str, Any], str | None, int]:
        """The job, the file to mount, and MiB of a database that is sent along."""
        message = job_message(job)
        if job.database is None:
            return message, None, 0
        path = Path(job.database).resolve()
        if not path.is_file():
            raise ConfigError(f"database {job.database!r} does not exist; give the path of an SQLite file")
        if self._elsewhere():
            size = -(-path.stat().st_size // 2**20)
            if size > _SHIPPED_MB:
                raise ConfigError(
                    f"database {job.database!r} has {size} MiB; at most {_SHIPPED_MB} are sent to a daemon on another machine"
                )
            message["database_content"] = path.read_bytes().hex()
            return message, None, int(size)
        if "," in str(path):
            raise ConfigError(f"database {job.database!r}: docker cannot mount a path with a comma; rename it")
        message["database"], message["readable"] = _DATABASE, [_DATABASE]
        return message, str(path), 0

    def _read(self, job: Job, done: subprocess.CompletedProcess[bytes]) -> Result:
        """The result; where there is no whole report the container is to blame or the daemon."""
        if done.returncode in (125, 126, 127):
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()
            raise SandboxError(f"{self.command} cannot run {self.image}: {said[0] if said else 'it does not say why'}")
        if len(done.stdout) >= 8:
            (length,) = struct.unpack("=Q", done.stdout[:8])
            if len(done.stdout) == 8 + length:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    return job_result(job, json.loads(done.stdout[8:]))
        if done.returncode == 137:
            return Result(Status.MEMORY, error="the container was killed: it needed more memory than it may have")
        return Result(Status.KILLED, error=f"the container ended without a report (exit code {done.returncode})")

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                [*self._client(), "rm", "--force", name], capture_output=True, timeout=self.startup_s, check=False
            )
