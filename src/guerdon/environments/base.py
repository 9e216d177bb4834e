"""A list of tasks with an order of its own: shuffled anew every epoch, and resumable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from guerdon.errors import CheckpointError, DataError
from guerdon.types import Task

__all__ = ["Dataset"]


class Dataset(Sequence[Task]):
    """Tasks in memory, checked once.

    Args:
        tasks: with unique ids and non-empty gold answers.
        seed: of the order in each epoch.

    Raises:
        DataError: no task, an id twice, or a task without gold answers.
    """

    def __init__(self, tasks: Iterable[Task], *, seed: int = 0) -> None:
        self._tasks = list(tasks)
        self.seed = seed
        self._position = 0
        if not self._tasks:
            raise DataError("the dataset is empty; give at least one task")
        seen: set[str] = set()
        for task in self._tasks:
            if task.id in seen:
                raise DataError(f"task id {task.id!r} occurs twice; ids must be unique within a dataset")
            seen.add(task.id)
            _check_golds(task)

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks)

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> list[Task]: ...

    def __getitem__(self, index: int | slice) -> Task | list[Task]:
        return self._tasks[index]

    def order(self, epoch: int) -> list[int]:
        """Indices of epoch ``epoch`` (from 0) in its order; a function of the seed and the epoch alone."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self)).tolist()

    def take(self, n: int) -> list[Task]:
        """The next ``n`` tasks; an epoch's end is followed by the next epoch's beginning."""
        if n < 0:
            raise DataError(f"cannot take {n} tasks; give a number >= 0")
        out: list[Task] = []
        while len(out) < n:
            epoch, start = divmod(self._position, len(self))
            chosen = self.order(epoch)[start : start + n - len(out)]
            out += [self._tasks[i] for i in chosen]
            self._position += len(chosen)
        return out

    def state_dict(self) -> dict[str, int]:
        """The position, and what it is valid for."""
        return {"position": self._position, "seed": self.seed, "size": len(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position.

        Raises:
            CheckpointError: it was saved with another seed or another number of tasks.
        """
        for name, now in (("seed", self.seed), ("size", len(self))):
            if state.get(name) != now:
                raise CheckpointError(
                    f"the saved data position has {name} {state.get(name)}, this dataset {now}; "
                    "resume with the same data, or start anew"
                )
        self._position = int(state["position"])


def _check_golds(task: Task) -> None:
    golds = task.reference
    if isinstance(golds, list | tuple) and not golds:
        raise DataError(f"task {task.id!r} has an empty list of gold answers; give at least one")
    values = golds if isinstance(golds, list | tuple) else [golds]
    if any(v is None or (isinstance(v, str) and not v.strip()) for v in values):
        raise DataError(f"task {task.id!r} has a missing or blank gold answer; remove it or the task")
