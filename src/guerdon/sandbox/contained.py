"""One job inside a container: the process with which the container starts. Standard library only.

It reads the job from standard input and writes the report to standard output, each as JSON with its length in front. The
job itself runs in a confined child, as on the local machine: the container is a second wall. The child has no descriptor of
the report, and this process cannot be opened by it (it is not dumpable, and signals do not reach the first process of a
container), so that a report is never the job's own work.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from typing import Any

__all__ = ["main"]

_PR_SET_DUMPABLE = 4


def main(message: dict[str, Any], package: str) -> None:
    """Run one job and report."""
    sys.path.insert(0, package)
    import codec  # noqa: F401  loaded before any fork
    import confine
    import zygote

    sys.path.remove(package)
    answer = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(null, number)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    place = zygote._Place(confine)
    content = message.pop("database_content", None)
    if content is not None:
        message["database"] = os.path.join(place.folder, "database.sqlite")
        message["files"] = {**message["files"], "database.sqlite": content}
        message["readable"] = []
    report = zygote._serve(message, confine, place, answer)
    body = json.dumps(report).encode()
    data = struct.pack("=Q", len(body)) + body
    while data:
        data = data[os.write(answer, data) :]
