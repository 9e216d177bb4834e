"""Ratings of the members from their pairwise outcomes; blind to the question, cheap to keep up to date."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from guerdon.routing.bench.matrix import ScoreMatrix
from guerdon.routing.routers.base import Router

__all__ = ["Elo"]


class Elo(Router):
    """Bradley-Terry strengths on Elo's scale; the predicted quality is the mean expected score against the others.

    On each query every pair of members with different scores is a game that the higher score wins; equal
    scores are half a win each. Strengths are fitted to all games at once (they do not depend on the order
    of the games) with one drawn game added per pair, so that they exist where a member won or lost all.
    """

    kind = "elo"

    def __init__(self, *, alpha: float = 0.0) -> None:
        super().__init__(alpha=alpha)
        self.ratings = np.zeros(0)

    def _fit(self, matrix: ScoreMatrix) -> None:
        s = matrix.scores
        m = s.shape[1]
        wins = np.full((m, m), 0.5)
        for i in range(m):
            both = np.isfinite(s[:, i : i + 1]) & np.isfinite(s)
            wins[i] += np.where(both, (s[:, i : i + 1] > s) + 0.5 * (s[:, i : i + 1] == s), 0.0).sum(0)
        np.fill_diagonal(wins, 0.0)
        games = wins + wins.T
        strength = np.ones(m)
        for _ in range(1000):
            new = (
                wins.sum(1) / np.maximum((games / (strength[:, None] + strength)).sum(1), 1e-300) if m > 1 else strength
            )
            new = new / np.exp(np.log(new).mean())
            if np.abs(np.log(new / strength)).max() < 1e-10:
                break
            strength = new
        self.ratings = 1000 + 400 * np.log10(strength)

    def _predict(self, queries: Sequence[str]) -> np.ndarray:
        m = len(self.ratings)
        expected = 1 / (1 + 10 ** ((self.ratings[None] - self.ratings[:, None]) / 400))
        one = (expected.sum(1) - 0.5) / max(m - 1, 1)
        return np.tile(one, (len(queries), 1))

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {}, {"ratings": self.ratings}

    @classmethod
    def _restore(cls, params: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Router:
        out = cls()
        out.ratings = arrays["ratings"]
        return out
