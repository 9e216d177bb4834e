"""Order of the data as a pure function of the step, so that the data position needs no state of its own."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable

import numpy as np

from guerdon.errors import DataError

__all__ = ["batch_indices", "digest", "steps_per_epoch"]


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


def digest(parts: Iterable[bytes | str]) -> str:
    """Short SHA-256 of a sequence, by which a resumed run knows its data again."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()[:16]
