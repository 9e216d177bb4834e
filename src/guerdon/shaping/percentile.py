"""A running-percentile normaliser of costs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from guerdon.errors import ConfigError, RewardError

__all__ = ["RunningPercentileCost"]

_TRANSFORMS = {"sqrt": math.sqrt, "log": lambda u: math.log1p(0.01 * u), "none": float}


class RunningPercentileCost:
    """Maps raw costs to [0, 1], 1 being the cheapest, by percentiles of the recent costs.

    Each cost is transformed, appended to a window that runs across trajectories and batches, and then
    placed between the window's lower and upper percentile:
    ``1 - clip((z - lo) / (hi - lo), 0, 1)``, or 0.5 where ``hi - lo < 1e-8``.

    Args:
        window: how many transformed costs are remembered.
        q: lower and upper quantile in [0, 1], linearly interpolated.
        transform: ``"sqrt"``, ``"log"`` (``log(1 + 0.01 u)``) or ``"none"``.

    Source: Router-R1 (arXiv 2506.09033), released reward code. Order matters, so use one instance for
    training and another one for validation.
    """

    def __init__(self, window: int = 1000, q: tuple[float, float] = (0.05, 0.95), transform: str = "sqrt") -> None:
        if window < 1:
            raise ConfigError(f"window must be at least 1, got {window}")
        if not 0 <= q[0] < q[1] <= 1:
            raise ConfigError(f"q must be two increasing quantiles in [0, 1], got {q}")
        if transform not in _TRANSFORMS:
            raise ConfigError(f"transform must be sqrt, log or none, got {transform!r}")
        self.window, self.q, self.transform = window, (float(q[0]), float(q[1])), transform
        self._values: deque[float] = deque(maxlen=window)

    def __call__(self, costs: Iterable[float]) -> np.ndarray:
        """Normalise raw costs in their order; each is appended before its own percentiles are taken.

        Args:
            costs: ``[B]`` completion tokens times price per million.

        Returns:
            ``[B]`` float64 in [0, 1].

        Raises:
            RewardError: a cost is negative or not finite; nothing of this batch is appended then.
        """
        batch = [float(u) for u in costs]
        for k, u in enumerate(batch):
            if not (math.isfinite(u) and u >= 0):
                raise RewardError(f"cost {k} of the batch is {u}; a raw cost must be finite and >= 0")
        out = np.empty(len(batch))
        for k, u in enumerate(batch):
            z = _TRANSFORMS[self.transform](u)
            self._values.append(z)
            low, high = np.quantile(np.fromiter(self._values, dtype=np.float64), self.q)
            out[k] = 0.5 if high - low < 1e-8 else 1.0 - min(1.0, max(0.0, (z - low) / (high - low)))
        return out

    def reset(self) -> None:
        """Forget all costs."""
        self._values.clear()

    def state_dict(self) -> dict[str, Any]:
        """The window and the settings that it belongs to."""
        return {"window": self.window, "q": list(self.q), "transform": self.transform, "values": list(self._values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a window.

        Raises:
            ConfigError: it was collected with other settings.
        """
        mine = self.state_dict()
        for key in ("window", "q", "transform"):
            if state[key] != mine[key]:
                raise ConfigError(f"the saved cost window has {key}={state[key]!r}, this one {key}={mine[key]!r}")
        self._values = deque(state["values"], maxlen=self.window)
