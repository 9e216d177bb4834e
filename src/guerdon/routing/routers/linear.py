"""Routers that regress each member's score on features of the question: ridge, kernel ridge, TF-IDF ridge."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from guerdon.errors import ConfigError, DataError
from guerdon.routing.bench.matrix import ScoreMatrix
from guerdon.routing.routers.base import Router, TextEncoder
from guerdon.routing.routers.neighbours import Embedding

__all__ = ["KernelRidge", "Ridge", "TfidfRidge"]


def _solve(gram: np.ndarray, targets: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Dual ridge coefficients ``[n, m]`` and means ``[m]``; each member is fitted on the rows that have its score."""
    out, means = np.zeros_like(targets), np.zeros(targets.shape[1])
    known = np.isfinite(targets)
    groups: dict[bytes, list[int]] = {}
    for j in range(targets.shape[1]):
        groups.setdefault(known[:, j].tobytes(), []).append(j)
    for group in groups.values():
        columns = np.array(group)
        rows = np.flatnonzero(known[:, columns[0]])
        y = targets[np.ix_(rows, columns)]
        means[columns] = y.mean(0)
        system = gram[np.ix_(rows, rows)] + penalty * np.eye(len(rows))
        out[np.ix_(rows, columns)] = np.linalg.solve(system, y - means[columns])
    return out, means


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ConfigError(f"{name} must be positive, got {value}")
    return float(value)


class Ridge(Embedding):
    """Linear regression of each member's score on the question's embedding, with an L2 penalty.

    Args:
        penalty: weight of the squared coefficients; the mean is not penalised.
        encoder, alpha: see the base classes.
    """

    kind = "ridge"

    def __init__(self, penalty: float = 1.0, *, encoder: TextEncoder | str = "minilm", alpha: float = 0.0) -> None:
        super().__init__(encoder=encoder, alpha=alpha)
        self.penalty = _positive("penalty", penalty)
        self._w = self._b = self._centre = np.zeros(0)

    def _fit(self, matrix: ScoreMatrix) -> None:
        x = self.encoder.encode(matrix.queries)
        self._centre = x.mean(0)
        x = x - self._centre
        dual, self._b = _solve(x @ x.T, matrix.scores, self.penalty)
        self._w = x.T @ dual

    def _predict(self, queries: Sequence[str]) -> np.ndarray:
        return (self.encoder.encode(queries) - self._centre) @ self._w + self._b

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {"penalty": self.penalty, "encoder": self._ref()}, {"w": self._w, "b": self._b, "centre": self._centre}

    @classmethod
    def _restore(cls, params: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Router:
        out = cls(params["penalty"], encoder=params["encoder"])
        out._w, out._b, out._centre = arrays["w"], arrays["b"], arrays["centre"]
        return out


class KernelRidge(Embedding):
    """Ridge regression in the space of a Gaussian kernel on the question's embedding.

    Args:
        penalty: added to the kernel's diagonal.
        gamma: the kernel is ``exp(-gamma |x - y|^2)``.
    """

    kind = "kernel-ridge"

    def __init__(
        self, penalty: float = 1.0, gamma: float = 1.0, *, encoder: TextEncoder | str = "minilm", alpha: float = 0.0
    ) -> None:
        super().__init__(encoder=encoder, alpha=alpha)
        self.penalty, self.gamma = _positive("penalty", penalty), _positive("gamma", gamma)
        self._x = self._dual = self._b = np.zeros((0, 0))

    def _kernel(self, x: np.ndarray) -> np.ndarray:
        squares = (x**2).sum(1)[:, None] + (self._x**2).sum(1) - 2 * x @ self._x.T
        return np.exp(-self.gamma * np.maximum(squares, 0))

    def _fit(self, matrix: ScoreMatrix) -> None:
        self._x = self.encoder.encode(matrix.queries)
        self._dual, self._b = _solve(self._kernel(self._x), matrix.scores, self.penalty)

    def _predict(self, queries: Sequence[str]) -> np.ndarray:
        return self._kernel(self.encoder.encode(queries)) @ self._dual + self._b

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        params = {"penalty": self.penalty, "gamma": self.gamma, "encoder": self._ref()}
        return params, {"x": self._x.astype(np.float32), "dual": self._dual, "b": self._b}

    @classmethod
    def _restore(cls, params: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Router:
        out = cls(params["penalty"], params["gamma"], encoder=params["encoder"])
        out._x, out._dual, out._b = arrays["x"].astype(np.float64), arrays["dual"], arrays["b"]
        return out


_WORD = re.compile(r"\w+|[^\w\s]")


def _terms(text: str) -> Counter[str]:
    words = [("0" if w.isdigit() else w) for w in _WORD.findall(text.lower())]
    return Counter(words) + Counter(f"{a} {b}" for a, b in pairwise(words))


class TfidfRidge(Router):
    """Ridge regression on words and pairs of words, weighted by sublinear TF-IDF; needs no encoder.

    Args:
        penalty: weight of the squared coefficients.
        min_count: a term must occur in as many training questions.
        max_terms: most frequent terms kept.
    """

    kind = "tfidf-ridge"

    def __init__(
        self, penalty: float = 3.0, *, min_count: int = 3, max_terms: int = 20_000, alpha: float = 0.0
    ) -> None:
        super().__init__(alpha=alpha)
        self.penalty, self.min_count, self.max_terms = _positive("penalty", penalty), min_count, max_terms
        self._column: dict[str, int] = {}
        self._idf = self._w = self._b = np.zeros(0)

    def _features(self, texts: Sequence[str]) -> Any:
        from scipy.sparse import csr_matrix

        values, columns, ends = [], [], [0]
        for text in texts:
            found = [(self._column[t], c) for t, c in _terms(text).items() if t in self._column]
            where = np.array([c for c, _ in found], dtype=int)
            row = (
                (1 + np.log(np.array([c for _, c in found], dtype=float))) * self._idf[where] if found else np.zeros(0)
            )
            norm = float(np.sqrt((row**2).sum()))
            values.append(row / norm if norm else row)
            columns.append(where)
            ends.append(ends[-1] + len(found))
        shape = (len(texts), len(self._column))
        return csr_matrix((np.concatenate(values), np.concatenate(columns), ends), shape=shape)

    def _fit(self, matrix: ScoreMatrix) -> None:
        seen: Counter[str] = Counter()
        for q in matrix.queries:
            seen.update(_terms(q).keys())
        kept = sorted((t for t, c in seen.items() if c >= self.min_count), key=lambda t: (-seen[t], t))[
            : self.max_terms
        ]
        if not kept:
            raise DataError(f"no term occurs in {self.min_count} training questions; lower min_count")
        self._column = {t: k for k, t in enumerate(kept)}
        self._idf = np.array([np.log((1 + len(matrix)) / (1 + seen[t])) + 1 for t in kept])
        x = self._features(matrix.queries)
        dual, self._b = _solve((x @ x.T).toarray(), matrix.scores, self.penalty)
        self._w = np.asarray(x.T @ dual)

    def _predict(self, queries: Sequence[str]) -> np.ndarray:
        return np.asarray(self._features(queries) @ self._w) + self._b

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        params = {
            "penalty": self.penalty,
            "min_count": self.min_count,
            "max_terms": self.max_terms,
            "terms": list(self._column),
        }
        return params, {"idf": self._idf, "w": self._w.astype(np.float32), "b": self._b}

    @classmethod
    def _restore(cls, params: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Router:
        out = cls(params["penalty"], min_count=params["min_count"], max_terms=params["max_terms"])
        out._column = {t: k for k, t in enumerate(params["terms"])}
        out._idf, out._w, out._b = arrays["idf"], arrays["w"].astype(np.float64), arrays["b"]
        return out
