"""Several score regressions averaged: their errors differ, their mean has less of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from guerdon.errors import ConfigError
from guerdon.routing.bench.matrix import ScoreMatrix
from guerdon.routing.routers.base import ROUTERS, CachedEncoder, Router, TextEncoder

__all__ = ["Blend"]


class Blend(Router):
    """Mean of the predicted scores of several routers.

    Args:
        parts: routers that predict scores on one scale (regressions, not classifiers); by default ridge and
            kernel ridge on embeddings and TF-IDF ridge.
        encoder: of the default parts.
    """

    kind = "blend"

    def __init__(
        self, parts: Sequence[Router] | None = None, *, encoder: TextEncoder | str = "minilm", alpha: float = 0.0
    ) -> None:
        super().__init__(alpha=alpha)
        if parts is None:
            shared = encoder if isinstance(encoder, CachedEncoder) else CachedEncoder(encoder)
            parts = [
                ROUTERS.create("ridge", encoder=shared),
                ROUTERS.create("kernel-ridge", encoder=shared),
                ROUTERS.create("tfidf-ridge"),
            ]
        if not parts or any(not p.learns for p in parts):
            raise ConfigError("a blend needs one or more learned routers as parts")
        self.parts = list(parts)

    @property
    def encoder(self) -> CachedEncoder | None:
        """The encoder of its parts, where one of them has it."""
        return next((e for p in self.parts if (e := getattr(p, "encoder", None)) is not None), None)

    def _fit(self, matrix: ScoreMatrix) -> None:
        for part in self.parts:
            part.fit(matrix)

    def _predict(self, queries: Sequence[str]) -> np.ndarray:
        return np.mean([part.scores(queries) for part in self.parts], axis=0)

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        states = [(p.kind, *p._state()) for p in self.parts]
        params = [{"kind": kind, "params": params} for kind, params, _ in states]
        arrays = {f"part{k}.{n}": a for k, (_, _, own) in enumerate(states) for n, a in own.items()}
        return {"parts": params, "members": list(self.members)}, {**arrays, "part.unit_cost": self.unit_cost}

    @classmethod
    def _restore(cls, params: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Router:
        parts: list[Router] = []
        shared: dict[str, CachedEncoder] = {}
        for k, record in enumerate(params["parts"]):
            own = {n.partition(".")[2]: a for n, a in arrays.items() if n.startswith(f"part{k}.")}
            part: Router = ROUTERS[record["kind"]]._restore(record["params"], own)
            part.members, part.unit_cost = tuple(params["members"]), arrays["part.unit_cost"]
            ref = record["params"].get("encoder")
            if ref is not None:
                # One question is embedded once, however many parts read it.
                part.encoder = shared.setdefault(ref, CachedEncoder(ref))  # type: ignore[attr-defined]
            parts.append(part)
        return cls(parts)
