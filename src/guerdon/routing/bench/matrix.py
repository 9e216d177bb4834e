"""The one table that every routing benchmark is read into: what each member scored and cost on each query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from guerdon.errors import DataError

__all__ = ["ScoreMatrix"]


@dataclass(frozen=True)
class ScoreMatrix:
    """Outcomes of ``m`` members on ``n`` queries.

    Args:
        queries: ``[n]`` texts.
        members: ``[m]`` distinct names.
        scores: ``[n, m]`` quality; NaN where the member was not run (or failed).
        cost: ``[n, m]`` USD of that call; NaN where the member was not run.
        failed: ``[n, m]`` True where the member was run and gave no reply. Such a call is worth 0 when a
            router is measured, and it is no label when a router is trained: an outage says nothing
            about what a model can do.
        tasks: ``[n]`` name of the benchmark each query comes from.
        sizes: billions of parameters, where known.
        replies: member to ``[n]`` recorded texts, where the source has them.
        name: of the dataset.
        notes: assumptions that went into it (estimators, prices), for the record.

    Raises:
        DataError: shapes disagree, a cost is missing, negative or infinite, or there is nothing in it.
    """

    queries: tuple[str, ...]
    members: tuple[str, ...]
    scores: np.ndarray
    cost: np.ndarray
    failed: np.ndarray | None = None
    tasks: tuple[str, ...] = ()
    sizes: Mapping[str, float] = field(default_factory=dict)
    replies: Mapping[str, Sequence[str | None]] | None = None
    name: str = "matrix"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "queries", tuple(self.queries))
        put(self, "members", tuple(self.members))
        put(self, "scores", np.array(self.scores, dtype=np.float64))
        put(self, "cost", np.array(self.cost, dtype=np.float64))
        shape = (len(self.queries), len(self.members))
        put(self, "failed", np.zeros(shape, bool) if self.failed is None else np.array(self.failed, dtype=bool))
        put(self, "tasks", tuple(self.tasks) or ("all",) * shape[0])
        if 0 in shape:
            raise DataError(f"a score matrix needs queries and members, got {shape[0]} and {shape[1]}")
        if len(set(self.members)) != shape[1]:
            raise DataError("two members of a score matrix have the same name")
        for which in ("scores", "cost", "failed"):
            got = getattr(self, which).shape
            if got != shape:
                raise DataError(f"{which} has shape {got} for {shape[0]} queries and {shape[1]} members")
        if len(self.tasks) != shape[0]:
            raise DataError(f"tasks names {len(self.tasks)} queries of {shape[0]}")
        if np.isinf(self.scores).any():
            raise DataError("scores must be finite, or NaN where a member was not run")
        if not self.ran.any():
            raise DataError("no member was run on any query")
        bad = self.ran & ~(np.isfinite(self.cost) & (self.cost >= 0))
        if bad.any():
            i, j = np.argwhere(bad)[0]
            raise DataError(
                f"member {self.members[j]!r} has no usable cost on query {i} ({self.cost[i, j]}); "
                f"a cost must be a finite number >= 0 wherever a member was run ({int(bad.sum())} such cells)"
            )
        self.scores[self.fails] = np.nan
        self.cost[~self.ran] = np.nan

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def fails(self) -> np.ndarray:
        """``failed`` as an array, never None."""
        assert self.failed is not None
        return self.failed

    @property
    def ran(self) -> np.ndarray:
        """``[n, m]`` True where the member was run, failed calls included."""
        return self.fails | ~np.isnan(self.scores)

    @property
    def quality(self) -> np.ndarray:
        """``[n, m]`` what a call counts when a router is measured: its score, 0 where it failed, NaN where not run."""
        return np.where(self.fails, 0.0, self.scores)

    @property
    def mean_cost(self) -> np.ndarray:
        """``[m]`` mean USD of the member's calls; NaN for one that was never run."""
        counts = self.ran.sum(0)
        sums = np.where(self.ran, self.cost, 0.0).sum(0)
        return np.divide(sums, counts, out=np.full(len(self.members), np.nan), where=counts > 0)

    @property
    def mean_quality(self) -> np.ndarray:
        """``[m]`` mean worth of the member's calls, failed ones included as 0; NaN for one that was never run."""
        counts = self.ran.sum(0)
        sums = np.where(self.ran, np.nan_to_num(self.quality), 0.0).sum(0)
        return np.divide(sums, counts, out=np.full(len(self.members), np.nan), where=counts > 0)

    def take(self, rows: Sequence[int] | np.ndarray) -> ScoreMatrix:
        """The same members on some of the queries, in the order of ``rows``."""
        rows = np.asarray(rows, dtype=int)
        return ScoreMatrix(
            tuple(self.queries[i] for i in rows),
            self.members,
            self.scores[rows],
            self.cost[rows],
            self.fails[rows],
            tuple(self.tasks[i] for i in rows),
            self.sizes,
            None if self.replies is None else {m: [r[i] for i in rows] for m, r in self.replies.items()},
            self.name,
            self.notes,
        )

    def split(self, shares: Sequence[float], seed: int) -> list[np.ndarray]:
        """Rows of disjoint random parts, stratified by task: each task is cut in the same shares.

        Args:
            shares: positive, summing to 1.
            seed: of the shuffle.

        Raises:
            DataError: shares that do not sum to 1, or a part that would be empty.
        """
        if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
            raise DataError(f"shares must be positive and sum to 1, got {tuple(shares)}")
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(self))
        # Sorting by task keeps the shuffle within each task.
        order = order[np.argsort(np.array([self.tasks[i] for i in order]), kind="stable")]
        edges = np.cumsum(shares)
        # A low-discrepancy walk over (0, 1) spreads every task over the parts in the stated shares.
        position = (0.5 + np.arange(len(order)) * 0.6180339887498949) % 1.0
        part = np.minimum(np.searchsorted(edges, position, side="right"), len(shares) - 1)
        out = [np.sort(order[part == k]) for k in range(len(shares))]
        if any(len(rows) == 0 for rows in out):
            raise DataError(f"{len(self)} queries are too few for {len(shares)} parts with shares {tuple(shares)}")
        return out
