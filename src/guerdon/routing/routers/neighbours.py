"""Routers that ask the nearest training questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from guerdon.errors import ConfigError
from guerdon.routing.bench.matrix import ScoreMatrix
from guerdon.routing.routers.base import CachedEncoder, Router, TextEncoder

__all__ = ["Knn", "KnnRegression", "best_member"]


def best_member(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows with at least one score, and for each the member of highest score, the first on ties."""
    rows = np.flatnonzero(np.isfinite(scores).any(1))
    return rows, np.where(np.isfinite(scores[rows]), scores[rows], -np.inf).argmax(1)


class Embedding(Router):
    """Base of the routers that embed the question.

    Args:
        encoder: has ``encode(texts) -> [n, d]``; or the name of one. Only named encoders can be saved.
    """

    def __init__(self, *, encoder: TextEncoder | str = "minilm", alpha: float = 0.0) -> None:
        super().__init__(alpha=alpha)
        self.encoder = encoder if isinstance(encoder, CachedEncoder) else CachedEncoder(encoder)

    def _ref(self) -> str:
        if self.encoder.ref is None:
            raise ConfigError(f"router {self.kind!r} cannot be saved: its encoder has no name to load it by")
        return self.encoder.ref


class Knn(Embedding):
    """Classifier by ``k`` nearest questions (Euclidean, uniform votes); the label is the best member, first on ties.

    Source: Router-R1 (arXiv 2506.09033), KNN Router.
    """

    kind = "knn"

    def __init__(self, k: int = 5, *, encoder: TextEncoder | str = "minilm", alpha: float = 0.0) -> None:
        super().__init__(encoder=encoder, alpha=alpha)
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        self.k = k
        self._x = self._y = np.zeros((0, 0))

    def _fit(self, matrix: ScoreMatrix) -> None:
        rows, labels = best_member(matrix.scores)
        self._x = self.encoder.encode([matrix.queries[i] for i in rows])
        self._y = np.eye(len(matrix.members))[labels]

    def _predict(self, queries: Sequence[str]) -> np.ndarray:
        near = nearest_rows(self.encoder.encode(queries), self._x, self.k)
        return self._y[near].mean(1)

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {"k": self.k, "encoder": self._ref()}, {"x": self._x.astype(np.float32), "y": self._y.astype(np.float32)}

    @classmethod
    def _restore(cls, params: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Router:
        out = cls(int(params["k"]), encoder=params["encoder"])
        out._x, out._y = arrays["x"].astype(np.float64), arrays["y"].astype(np.float64)
        return out


class KnnRegression(Knn):
    """Mean score of each member on the ``k`` nearest questions; its overall mean where it was run on none of them."""

    kind = "knn-regression"

    def __init__(self, k: int = 40, *, encoder: TextEncoder | str = "minilm", alpha: float = 0.0) -> None:
        super().__init__(k, encoder=encoder, alpha=alpha)

    def _fit(self, matrix: ScoreMatrix) -> None:
        self._x = self.encoder.encode(matrix.queries)
        self._y = matrix.scores

    def _predict(self, queries: Sequence[str]) -> np.ndarray:
        near = self._y[nearest_rows(self.encoder.encode(queries), self._x, self.k)]
        known = np.isfinite(near)
        counts = known.sum(1)
        means = np.where(known, near, 0.0).sum(1) / np.maximum(counts, 1)
        return np.where(counts > 0, means, np.nanmean(self._y, axis=0))


def nearest_rows(queries: np.ndarray, known: np.ndarray, k: int) -> np.ndarray:
    """Indices ``[n, min(k, N)]`` of the nearest rows of ``known`` by Euclidean distance; the first on ties."""
    k = min(k, len(known))
    squares = (known**2).sum(1)
    out = np.empty((len(queries), k), dtype=int)
    for start in range(0, len(queries), 512):
        block = queries[start : start + 512]
        # Rounding makes equal points differ in the last digits, and then ties would fall by chance.
        distance = np.round(squares - 2 * block @ known.T, 9)
        out[start : start + 512] = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return out
