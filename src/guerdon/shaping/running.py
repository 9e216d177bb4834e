"""Normalisers with statistics over all rewards seen so far: standardise, clip to one deviation, min-max."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from guerdon.errors import ConfigError
from guerdon.shaping.relative import References, _out, _rewards
from guerdon.shaping.shapers import RewardShaper

__all__ = ["RunningShaper"]


class RunningShaper(RewardShaper):
    """Shapes a batch by the running statistics of every reward so far, this batch included.

    ``"meanstd"``: ``(r - mean) / sd`` with the population deviation, divided by 1 where it is 0. ``"clip"``:
    ``clip(r, mean - sd, mean + sd)``. ``"minmax"``: ``(r - min) / (max - min)``, which is 0 (never NaN) as long as one
    distinct value has been seen.

    Args:
        mode: one of the three.

    Attributes:
        count, mean, m2, low, high: rewards seen, their mean, the sum of squared deviations, and the extremes.

    Batches depend on what came before, so use one instance for training and another one for anything else. Source:
    the compared shapers of Fu et al. 2025 (arXiv 2502.18770).
    """

    def __init__(self, mode: Literal["meanstd", "clip", "minmax"] = "meanstd") -> None:
        if mode not in ("meanstd", "clip", "minmax"):
            raise ConfigError(f"mode must be 'meanstd', 'clip' or 'minmax', got {mode!r}")
        self.mode = mode
        self.name = mode
        self.count, self.mean, self.m2 = 0, 0.0, 0.0
        self.low, self.high = math.inf, -math.inf

    @property
    def std(self) -> float:
        """Population standard deviation; exactly 0 while all rewards are equal."""
        # Rounding leaves a tiny m2 behind equal rewards, and dividing by it would be noise of size one.
        return 0.0 if self.count == 0 or self.low == self.high else math.sqrt(self.m2 / self.count)

    def __call__(self, rewards: Tensor, ref_rewards: References | None = None) -> Tensor:
        """Update by ``[B]`` rewards, then shape them; references are not used.

        Raises:
            ValueError: a reward is NaN or infinite; the statistics are then as before.
        """
        r = _rewards(rewards).detach().double()
        if not r.numel():
            return r.to(_out(rewards))
        self._update(r)
        if self.mode == "minmax":
            span = self.high - self.low
            shaped = (r - self.low) / span if span > 0 else torch.zeros_like(r)
        elif self.mode == "meanstd":
            shaped = (r - self.mean) / (self.std or 1.0)
        else:
            shaped = r.clamp(self.mean - self.std, self.mean + self.std)
        return shaped.to(_out(rewards))

    def _update(self, r: Tensor) -> None:
        n = r.numel()
        mean = float(r.mean())
        total = self.count + n
        shift = mean - self.mean
        self.m2 += float(((r - mean) ** 2).sum()) + shift**2 * self.count * n / total
        self.mean += shift * n / total
        self.count = total
        self.low, self.high = min(self.low, float(r.min())), max(self.high, float(r.max()))

    def state_dict(self) -> dict[str, Any]:
        """The statistics and the mode they belong to."""
        keys = ("mode", "count", "mean", "m2", "low", "high")
        return {key: getattr(self, key) for key in keys}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ConfigError: it belongs to another mode.
        """
        if state["mode"] != self.mode:
            raise ConfigError(f"the saved statistics have mode={state['mode']!r}, these have mode={self.mode!r}")
        self.count = int(state["count"])
        self.mean, self.m2 = float(state["mean"]), float(state["m2"])
        self.low, self.high = float(state["low"]), float(state["high"])
