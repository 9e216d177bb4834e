"""Where a step's wall-clock time goes, by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

__all__ = ["Phases"]


class Phases:
    """Adds up seconds per named phase of one step.

    Args:
        device: where the model computes; on a GPU each phase ends with a synchronisation, so that its
            seconds are its own.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._begun = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._cuda:
                torch.cuda.synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def row(self, tokens: Mapping[str, int]) -> dict[str, float]:
        """Metrics ``time/<phase>`` (seconds), ``time/step``, ``time/other`` and ``tokens_per_s/<phase>``."""
        step = time.perf_counter() - self._begun
        row = {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        row["time/other"] = step - sum(self.seconds.values())
        row["time/step"] = step
        for name, count in tokens.items():
            if self.seconds.get(name):
                row[f"tokens_per_s/{name}"] = count / self.seconds[name]
        return row
