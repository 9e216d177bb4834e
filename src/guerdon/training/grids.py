"""Between the flat layout of a step's streams and ``[B, T]`` grids whose rows are gathered to the left."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["Grid"]


class Grid:
    """Places chosen entries of a flat layout in rows, one row per owner, in order and without gaps.

    What is not chosen (an environment's tokens, say) has no column: in the grid it is no time step.

    Args:
        index: [n] positions in the flat layout, ascending within each owner.
        owner: [n] row of each.
        rows: number of rows; a row may stay empty.
        size: length N of the flat layout.
    """

    def __init__(self, index: np.ndarray, owner: np.ndarray, rows: int, size: int) -> None:
        counts = np.bincount(owner, minlength=rows)
        starts = np.concatenate(([0], np.cumsum(counts)))[:-1]
        order = np.argsort(owner, kind="stable")
        column = np.empty(len(index), dtype=np.int64)
        column[order] = np.arange(len(index)) - starts[owner[order]]
        self._flat = torch.from_numpy(np.ascontiguousarray(index))
        self._where = (torch.from_numpy(np.ascontiguousarray(owner)), torch.from_numpy(column))
        self._size = size
        self.mask = torch.zeros(rows, int(counts.max(initial=1)), dtype=torch.bool)
        self.mask[self._where] = True

    def gather(self, values: Tensor) -> Tensor:
        """[N] to [B, T]; 0 where the grid has no entry."""
        return self.place(values[self._flat])

    def place(self, values: Tensor) -> Tensor:
        """[n], one value per chosen entry, to [B, T]."""
        out = torch.zeros(self.mask.shape, dtype=values.dtype)
        out[self._where] = values
        return out

    def scatter(self, grid: Tensor) -> Tensor:
        """[B, T] to [N]; 0 on entries that were not chosen."""
        out = torch.zeros(self._size, dtype=grid.dtype)
        out[self._flat] = grid[self._where]
        return out

    def entries(self, grid: Tensor) -> Tensor:
        """[B, T] to [n], the values of the chosen entries."""
        return grid[self._where]
