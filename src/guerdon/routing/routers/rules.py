"""Routers that read no question: the rows beside which every learned router must be shown, and the bound above."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from guerdon.errors import ConfigError, UnknownName, nearest
from guerdon.routing.bench.matrix import ScoreMatrix
from guerdon.routing.routers.base import Router

__all__ = ["Cheapest", "Constant", "Dearest", "Largest", "Oracle", "RandomRouter"]


class _Fixed(Router):
    """Always the same member; its predicted quality is 1 and everybody else's 0, whatever alpha says."""

    learns = False

    def __init__(self) -> None:
        super().__init__()
        self.index = 0

    def _pick(self, matrix: ScoreMatrix) -> int:
        raise NotImplementedError

    def _fit(self, matrix: ScoreMatrix) -> None:
        self.index = self._pick(matrix)

    def _predict(self, queries: Sequence[str]) -> np.ndarray:
        out = np.zeros((len(queries), len(self.members)))
        out[:, self.index] = 1.0
        return out

    def weigh(self, predicted: np.ndarray, alpha: float | None = None) -> np.ndarray:
        """The prediction itself: a rule does not trade."""
        return predicted

    def route(self, question: str) -> tuple[str, str]:
        """The member."""
        return self.members[self.index], f"always {self.members[self.index]} ({self.name})"

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {"index": self.index}, {}

    @classmethod
    def _restore(cls, params: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Router:
        out = cls()
        out.index = int(params["index"])
        return out


class Constant(_Fixed):
    """Always the member of that name; without a name the one of highest mean quality in training, failures as 0."""

    kind = "constant"

    def __init__(self, member: str | None = None) -> None:
        super().__init__()
        self.member = member

    @property
    def name(self) -> str:
        """Says which member."""
        return "best single" if self.member is None else self.member

    def _pick(self, matrix: ScoreMatrix) -> int:
        if self.member is None:
            return int(np.nanargmax(matrix.mean_quality))
        if self.member not in matrix.members:
            raise UnknownName(f"no member {self.member!r} in the matrix{nearest(self.member, matrix.members)}")
        return matrix.members.index(self.member)


class Cheapest(_Fixed):
    """The member of lowest mean cost in training; the first on ties."""

    kind = "cheapest"

    def _pick(self, matrix: ScoreMatrix) -> int:
        return int(np.nanargmin(matrix.mean_cost))


class Dearest(_Fixed):
    """The member of highest mean cost in training; the first on ties."""

    kind = "dearest"

    def _pick(self, matrix: ScoreMatrix) -> int:
        return int(np.nanargmax(matrix.mean_cost))


class Largest(_Fixed):
    """The member with the most parameters; the dearest where no size is known."""

    kind = "largest"

    def _pick(self, matrix: ScoreMatrix) -> int:
        if not matrix.sizes:
            return int(np.nanargmax(matrix.mean_cost))
        keys = [(matrix.sizes.get(m, 0.0), c) for m, c in zip(matrix.members, matrix.mean_cost, strict=True)]
        return max(range(len(keys)), key=keys.__getitem__)


class RandomRouter(Router):
    """A member drawn uniformly, by seed and question: the same question gets the same member in any batch."""

    kind = "random"
    learns = False

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def _fit(self, matrix: ScoreMatrix) -> None:
        return None

    def _predict(self, queries: Sequence[str]) -> np.ndarray:
        m = len(self.members)
        return np.stack([np.random.default_rng([self.seed, zlib.crc32(q.encode())]).random(m) for q in queries])

    def weigh(self, predicted: np.ndarray, alpha: float | None = None) -> np.ndarray:
        """The draw itself."""
        return predicted

    def route(self, question: str) -> tuple[str, str]:
        """The member drawn."""
        return self.members[int(self.choose([question])[0])], f"drawn at random, seed {self.seed}"

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {"seed": self.seed}, {}

    @classmethod
    def _restore(cls, params: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Router:
        return cls(seed=int(params["seed"]))


class Oracle(Router):
    """The best member of each query, then the cheapest: a bound that reads the labels, not a router.

    With ``alpha`` it weighs the true quality against the members' mean costs.
    """

    kind = "oracle"
    learns = False
    needs_labels = True

    def _fit(self, matrix: ScoreMatrix) -> None:
        return None

    def _predict(self, queries: Sequence[str]) -> np.ndarray:
        raise ConfigError("the oracle reads labels: call decide(matrix), it cannot route a question")

    def decide(self, matrix: ScoreMatrix, *, alpha: float | None = None) -> np.ndarray:
        """Member indices ``[n]``; of equal utility the cheapest on that query, then the first."""
        utility = np.where(matrix.ran, self.weigh(np.nan_to_num(matrix.quality), alpha), -np.inf)
        best = utility >= utility.max(1, keepdims=True)
        return np.where(best, np.nan_to_num(matrix.cost, nan=np.inf), np.inf).argmin(1)
