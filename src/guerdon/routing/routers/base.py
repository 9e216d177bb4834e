"""What every single-round router can do: fit, predict, choose under a cost weight, route, save, load."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from guerdon.errors import ConfigError, DataError
from guerdon.registry import registry
from guerdon.routing.bench.matrix import ScoreMatrix

__all__ = ["ROUTERS", "CachedEncoder", "Router", "TextEncoder", "load_router"]

_HERE = "guerdon.routing.routers"
ROUTERS = registry(
    "router",
    {
        "blend": f"{_HERE}.blend:Blend",
        "cheapest": f"{_HERE}.rules:Cheapest",
        "constant": f"{_HERE}.rules:Constant",
        "dearest": f"{_HERE}.rules:Dearest",
        "elo": f"{_HERE}.elo:Elo",
        "kernel-ridge": f"{_HERE}.linear:KernelRidge",
        "knn": f"{_HERE}.neighbours:Knn",
        "knn-regression": f"{_HERE}.neighbours:KnnRegression",
        "largest": f"{_HERE}.rules:Largest",
        "mlp": f"{_HERE}.mlp:Mlp",
        "oracle": f"{_HERE}.rules:Oracle",
        "random": f"{_HERE}.rules:RandomRouter",
        "ridge": f"{_HERE}.linear:Ridge",
        "tfidf-ridge": f"{_HERE}.linear:TfidfRidge",
    },
)

Self = TypeVar("Self", bound="Router")


class TextEncoder(Protocol):
    """Embeds texts."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """``[n, d]``, rows in the order of ``texts``."""
        ...


class CachedEncoder:
    """Embeds a text once while it is remembered.

    Args:
        encoder: does the work; or the name of one, loaded at first use.
        limit: most texts remembered, the newest; ``None`` for all (for a benchmark, not for a server).

    Attributes:
        ref: the name it is loaded by; None where an object was given that has none.
    """

    def __init__(self, encoder: TextEncoder | str, *, limit: int | None = 1024) -> None:
        self._encoder, self._limit = encoder, limit
        name = encoder if isinstance(encoder, str) else getattr(encoder, "name", None)
        self.ref = name if isinstance(name, str) else None
        self._known: dict[str, np.ndarray] = {}

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """``[n, d]`` float64."""
        new = [t for t in dict.fromkeys(texts) if t not in self._known]
        if new:
            if isinstance(self._encoder, str):
                from guerdon.policies.encoder import load_encoder

                self._encoder = load_encoder(self._encoder)
            vectors = np.asarray(self._encoder.encode(new), dtype=np.float64)
            self._known.update(zip(new, vectors, strict=True))
        out = np.stack([self._known[t] for t in texts])
        if self._limit is not None and len(self._known) > self._limit:
            self._known = dict(list(self._known.items())[-self._limit :] if self._limit else [])
        return out


class Router:
    """Base of the routers. A subclass writes :meth:`_fit` and :meth:`_predict`, and to be saved
    :meth:`_state` and :meth:`_restore`.

    Args:
        alpha: weight of money in [0, 1]: the member chosen has the highest
            ``(1 - alpha) * predicted quality - alpha * normalised cost``, where costs are the members' mean
            costs in training, scaled so that the cheapest is 0 and the dearest 1.

    Attributes:
        members: names, after fitting.
        unit_cost: ``[m]`` mean USD per call in training.
    """

    kind: ClassVar[str] = "router"
    learns: ClassVar[bool] = True
    """Whether the choice depends on what was seen in training, so that a sweep over alpha says something."""
    needs_labels: ClassVar[bool] = False
    """True for a bound that looks at the outcomes of the very queries it routes."""

    def __init__(self, *, alpha: float = 0.0) -> None:
        self.alpha = _alpha(alpha)
        self.members: tuple[str, ...] = ()
        self.unit_cost = np.zeros(0)

    @property
    def name(self) -> str:
        """For tables."""
        return self.kind

    def fit(self: Self, matrix: ScoreMatrix) -> Self:
        """Learn from recorded outcomes; failed calls and calls not made are no labels.

        Raises:
            DataError: a member was never run, or has no score to learn from.
        """
        cost = matrix.mean_cost
        for j, member in enumerate(matrix.members):
            if not np.isfinite(cost[j]) or (self.learns and not np.isfinite(matrix.scores[:, j]).any()):
                raise DataError(f"member {member!r} has no successful call in the training part; drop it or add data")
        self.members, self.unit_cost = matrix.members, cost
        self._fit(matrix)
        return self

    def scores(self, queries: Sequence[str]) -> np.ndarray:
        """Predicted quality ``[n, m]`` of each member on each query.

        Raises:
            ConfigError: not fitted.
        """
        if not self.members:
            raise ConfigError(f"router {self.name!r} is not fitted; call fit(matrix) first")
        if not len(queries):
            return np.zeros((0, len(self.members)))
        return np.asarray(self._predict(list(queries)), dtype=np.float64)

    def choose(self, queries: Sequence[str], *, alpha: float | None = None) -> np.ndarray:
        """Member indices ``[n]``; the first on ties."""
        return self.weigh(self.scores(queries), alpha).argmax(1)

    def decide(self, matrix: ScoreMatrix, *, alpha: float | None = None) -> np.ndarray:
        """Member indices ``[n]`` for the queries of a matrix, whose labels only a bound looks at."""
        return self.choose(matrix.queries, alpha=alpha)

    def weigh(self, predicted: np.ndarray, alpha: float | None = None) -> np.ndarray:
        """Utility ``[n, m]`` of predicted quality under the weight of money."""
        a = self.alpha if alpha is None else _alpha(alpha)
        return (1 - a) * predicted - a * self.normalised_cost

    @property
    def normalised_cost(self) -> np.ndarray:
        """``[m]`` in [0, 1]; all 0 where every member costs the same."""
        low, high = self.unit_cost.min(), self.unit_cost.max()
        return (self.unit_cost - low) / (high - low) if high > low else np.zeros_like(self.unit_cost)

    def route(self, question: str) -> tuple[str, str]:
        """The member for one question, and why."""
        predicted = self.scores([question])[0]
        utility = self.weigh(predicted[None])[0]
        best = int(utility.argmax())
        if len(self.members) == 1:
            return self.members[best], f"{self.name}: the only member"
        rest = np.delete(np.arange(len(self.members)), best)
        second = int(rest[utility[rest].argmax()])
        usd = 1000 * self.unit_cost
        return self.members[best], (
            f"{self.name}: predicted quality {predicted[best]:.3f} at {usd[best]:.4g} USD per 1,000; next "
            f"{self.members[second]} {predicted[second]:.3f} at {usd[second]:.4g}; alpha {self.alpha:g}"
        )

    def save(self, path: str | Path) -> Path:
        """Write the fitted router to one file: a JSON text and arrays, nothing that runs when read.

        Raises:
            ConfigError: not fitted, or of a kind that cannot be saved.
        """
        if not self.members:
            raise ConfigError(f"router {self.name!r} is not fitted; there is nothing to save")
        params, arrays = self._state()
        meta = {"kind": self.kind, "version": 1, "members": self.members, "alpha": self.alpha, "params": params}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            everything: dict[str, Any] = {"meta": np.array(json.dumps(meta)), "unit_cost": self.unit_cost, **arrays}
            np.savez_compressed(file, **everything)
        return path

    def _fit(self, matrix: ScoreMatrix) -> None:
        raise NotImplementedError

    def _predict(self, queries: Sequence[str]) -> np.ndarray:
        raise NotImplementedError

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        raise ConfigError(f"a router of kind {self.kind!r} cannot be saved")

    @classmethod
    def _restore(cls, params: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Router:
        raise ConfigError(f"a router of kind {cls.kind!r} cannot be loaded")


def load_router(path: str | Path) -> Router:
    """Read a router that :meth:`Router.save` wrote.

    Raises:
        DataError: the file is none.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files}
        meta = json.loads(str(arrays.pop("meta")))
        unit_cost = arrays.pop("unit_cost")
        router: Router = ROUTERS[meta["kind"]]._restore(meta["params"], arrays)
        members, alpha = tuple(meta["members"]), meta["alpha"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path.name} is no saved router ({type(error).__name__}: {error})") from error
    if unit_cost.shape != (len(members),):
        raise DataError(f"{path.name} is no saved router: {len(members)} members, {unit_cost.shape} costs")
    router.members, router.unit_cost, router.alpha = members, unit_cost, _alpha(alpha)
    return router


def _alpha(alpha: float) -> float:
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha must be in [0, 1] (0 ignores money, 1 ignores quality), got {alpha}")
    return float(alpha)
