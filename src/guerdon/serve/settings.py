"""Limits and habits of a server."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from guerdon.errors import ConfigError

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server behaves.

    Args:
        max_body_bytes: larger request bodies get 413.
        max_head_bytes: larger request lines and headers together get 431.
        max_in_flight: chat requests answered at once by one process; more get 503.
        max_cost_usd: cap on every request's cost; a request can only lower it.
        max_calls: cap on every request's calls of members; likewise.
        deadline_s: time limit of every request; likewise.
        read_s: a request must have arrived completely after so many seconds.
        heartbeat_s: a stream that is silent for so long gets a comment, so that proxies keep it open.
        drain_s: how long a shutdown waits for running requests.
        access_log: write one JSON line per request to stderr: never texts, never keys.
    """

    max_body_bytes: int = 4 * 2**20
    max_head_bytes: int = 32 * 2**10
    max_in_flight: int = 2048
    max_cost_usd: float | None = None
    max_calls: int | None = None
    deadline_s: float | None = None
    read_s: float = 30.0
    heartbeat_s: float = 5.0
    drain_s: float = 30.0
    access_log: bool = False

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            least = 1 if f.name in ("max_body_bytes", "max_head_bytes", "max_in_flight") else 0
            if value is not None and f.name != "access_log" and not (math.isfinite(value) and value >= least):
                raise ConfigError(f"{f.name} must be a finite number of at least {least}, got {value}")
        if self.heartbeat_s == 0:
            raise ConfigError("heartbeat_s must be above 0, got 0")
