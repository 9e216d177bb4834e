"""Tasks from a file, and their order as a pure function of the step, so that the data position needs no state."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.errors import DataError
from guerdon.types import Task

__all__ = ["batch_indices", "digest", "further_indices", "read_tasks", "steps_per_epoch", "tasks_digest"]


def steps_per_epoch(n: int, size: int, *, drop_last: bool) -> int:
    """Batches in one pass over ``n`` items."""
    return max(1, n // size) if drop_last else -(-n // size)


def batch_indices(n: int, size: int, step: int, *, seed: int, drop_last: bool) -> np.ndarray:
    """Indices of the items of batch ``step`` (from 0); every epoch is its own permutation.

    Args:
        n: items.
        size: items per batch.
        step: number of the batch over the whole run.
        seed: of the permutations.
        drop_last: leave out the incomplete batch at an epoch's end (no item is ever twice in a batch).

    Returns:
        int64 array of at most ``size`` indices.
    """
    if n < 1:
        raise DataError("there is nothing to train on: the data is empty")
    epoch, k = divmod(step, steps_per_epoch(n, size, drop_last=drop_last))
    return _permutation(n, seed, epoch)[k * size : (k + 1) * size]


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed & 0xFFFFFFFF, epoch]).permutation(n)


def further_indices(n: int, size: int, taken: Sequence[int], *, seed: Sequence[int]) -> list[int]:
    """At most ``size`` further items of ``n``, none of those ``taken``, in an order that depends on the seed alone."""
    order = np.random.default_rng([s & 0xFFFFFFFF for s in seed]).permutation(n)
    used = set(taken)
    return [int(i) for i in order if int(i) not in used][:size]


def read_tasks(path: str | Path) -> list[Task]:
    """Tasks of a JSONL file.

    Each line is an object with ``prompt`` (a text or chat messages), and where there are such ``reference``, ``id``
    (default: file name and line) and ``meta``; all other keys go into ``meta``.

    Raises:
        DataError: the file cannot be read or is empty, a line is no such object, an id occurs twice. The text names the
            first three lines.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(f"{path}: cannot be read ({reason}); give a JSONL file with prompt and reference") from None
    tasks: list[Task] = []
    bad: list[str] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            tasks.append(_task(json.loads(line), f"{path.stem}:{number}"))
        except ValueError as error:
            bad.append(f"line {number}: {error}")
            continue
        name = tasks[-1].id
        if name in seen:
            bad.append(f"line {number}: id {name!r} is that of line {seen[name]}")
        seen[name] = number
    if bad:
        raise DataError(f"{path}: {'; '.join(bad[:3])}{f'; and {len(bad) - 3} more' if len(bad) > 3 else ''}")
    if not tasks:
        raise DataError(f"{path} holds no tasks")
    return tasks


def _task(row: Any, name: str) -> Task:
    if not isinstance(row, dict):
        raise ValueError(f"an object is expected, got {type(row).__name__}")
    row = dict(row)
    prompt = row.pop("prompt", None)
    messages = isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    )
    if not (isinstance(prompt, str) and prompt.strip()) and not (messages and prompt):
        raise ValueError("prompt must be a text, or a list of messages with role and content")
    meta = row.pop("meta", {})
    if not isinstance(meta, dict):
        raise ValueError("meta must be an object")
    reference, given = row.pop("reference", None), row.pop("id", name)
    return Task(str(given), prompt, reference, {**meta, **row})


def tasks_digest(tasks: Iterable[Task]) -> str:
    """By which a resumed run knows its tasks again: their ids, in order."""
    return digest(task.id for task in tasks)


def digest(parts: Iterable[bytes | str]) -> str:
    """Short SHA-256 of a sequence, by which a resumed run knows its data again."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()[:16]
