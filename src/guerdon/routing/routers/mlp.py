"""The multi-layer perceptron router: a classifier of the best member on the question's embedding."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from guerdon.errors import MissingDependency
from guerdon.routing.bench.matrix import ScoreMatrix
from guerdon.routing.routers.base import Router, TextEncoder
from guerdon.routing.routers.neighbours import Embedding, best_member

__all__ = ["Mlp"]


class Mlp(Embedding):
    """Hidden layers of 128 and 64, ReLU, Adam at 1e-3, L2 1e-4, 500 iterations, seed 42; the label is the best member.

    Source: Router-R1 (arXiv 2506.09033), MLP Router.
    """

    kind = "mlp"

    def __init__(
        self,
        hidden: Sequence[int] = (128, 64),
        *,
        iterations: int = 500,
        seed: int = 42,
        encoder: TextEncoder | str = "minilm",
        alpha: float = 0.0,
    ) -> None:
        super().__init__(encoder=encoder, alpha=alpha)
        self.hidden, self.iterations, self.seed = tuple(hidden), iterations, seed
        self._layers: list[tuple[np.ndarray, np.ndarray]] = []
        self._classes = np.zeros(0, dtype=int)

    def _fit(self, matrix: ScoreMatrix) -> None:
        try:
            from sklearn.exceptions import ConvergenceWarning
            from sklearn.neural_network import MLPClassifier
        except ImportError as error:
            raise MissingDependency("the mlp router needs scikit-learn: pip install 'guerdon[routers]'") from error
        rows, labels = best_member(matrix.scores)
        self._classes = np.unique(labels)
        self._layers = []
        if len(self._classes) == 1:
            return
        net = MLPClassifier(
            self.hidden,
            activation="relu",
            solver="adam",
            learning_rate_init=1e-3,
            alpha=1e-4,
            max_iter=self.iterations,
            random_state=self.seed,
        )
        with warnings.catch_warnings():
            # The number of iterations is the recipe's, whether or not it has converged by then.
            warnings.simplefilter("ignore", ConvergenceWarning)
            net.fit(self.encoder.encode([matrix.queries[i] for i in rows]), labels)
        self._layers = list(zip(net.coefs_, net.intercepts_, strict=True))

    def _predict(self, queries: Sequence[str]) -> np.ndarray:
        out = np.zeros((len(queries), len(self.members)))
        if not self._layers:
            out[:, self._classes] = 1.0
            return out
        h = self.encoder.encode(queries)
        for k, (w, b) in enumerate(self._layers):
            h = h @ w + b
            if k < len(self._layers) - 1:
                h = np.maximum(h, 0)
        if h.shape[1] == 1:
            # Two classes are fitted with one logistic output.
            h = np.concatenate([np.zeros_like(h), h], axis=1)
        p = np.exp(h - h.max(1, keepdims=True))
        out[:, self._classes] = p / p.sum(1, keepdims=True)
        return out

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        params = {"hidden": list(self.hidden), "iterations": self.iterations, "seed": self.seed, "encoder": self._ref()}
        arrays = {f"{n}{k}": a for k, layer in enumerate(self._layers) for n, a in zip("wb", layer, strict=True)}
        return {**params, "layers": len(self._layers)}, {"classes": self._classes, **arrays}

    @classmethod
    def _restore(cls, params: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Router:
        out = cls(params["hidden"], iterations=params["iterations"], seed=params["seed"], encoder=params["encoder"])
        out._classes = arrays["classes"]
        out._layers = [(arrays[f"w{k}"], arrays[f"b{k}"]) for k in range(params["layers"])]
        return out
