"""Files of JSON lines that outlive crashes: each line is one write, and a torn one never hides the next."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guerdon.errors import DataError

__all__ = ["LineWriter", "read_lines"]


class LineWriter:
    """Appends lines to a file; several processes may append to the same one.

    A line goes to the operating system in one call and without a buffer of our own, so that a process that
    is killed leaves either the whole line or a torn last one. The next writer begins on a new line.

    Args:
        path: made where it does not exist, folders included.

    Raises:
        OSError: it cannot be opened.
    """

    _fd: int | None = None

    def __init__(self, path: str | os.PathLike[str]) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._torn = _is_torn(target)
        self._fd = os.open(target, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)

    def write(self, lines: bytes) -> None:
        """Append whole lines (each ends with a newline).

        Raises:
            OSError: not all of it could be written, for example because no space is left. What was written of
                it is a torn line then.
        """
        if self._fd is None:
            raise OSError("the file is closed")
        data = memoryview(b"\n" + lines if self._torn else lines)
        self._torn = True
        while data:
            data = data[os.write(self._fd, data) :]
        self._torn = False

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __del__(self) -> None:
        self.close()


def _is_torn(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return False


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield line number and JSON object of each line; ``None`` for a torn line (it is not JSON).

    Raises:
        DataError: the file cannot be read, or a line is JSON but no object.
    """
    try:
        with Path(path).open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except ValueError:
                    yield number, None
                    continue
                if not isinstance(value, dict):
                    raise DataError(f"{path}, line {number}: a JSON {type(value).__name__} where an object is expected")
                yield number, value
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
