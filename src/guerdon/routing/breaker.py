"""A circuit breaker: an endpoint that keeps failing is left alone for a while."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from guerdon.errors import ConfigError

__all__ = ["Breaker", "BreakerPolicy"]


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a breaker opens and how long it stays open.

    Args:
        window_s: seconds that a result is remembered, to one part in 64: results are counted, not kept.
        min_calls: fewest remembered results that can open it by their failure rate.
        failure_rate: it opens when more than this share of them failed.
        consecutive: it also opens after so many failures in a row, however long ago they began.
        cooldown_s: seconds until a probe passes; doubles each time the probe fails.
        max_cooldown_s: largest cooldown.
    """

    window_s: float = 60.0
    min_calls: int = 5
    failure_rate: float = 0.5
    consecutive: int = 10
    cooldown_s: float = 5.0
    max_cooldown_s: float = 120.0

    def __post_init__(self) -> None:
        for name, least in (("min_calls", 1), ("consecutive", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.failure_rate <= 1:
            raise ConfigError(f"failure_rate must be in (0, 1], got {self.failure_rate}")
        for name in ("window_s", "cooldown_s", "max_cooldown_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")


class Breaker:
    """Closed (calls pass), open (they do not), half open (one probe passes after the cooldown).

    Args:
        policy: when it opens.
        clock: monotonic seconds.
    """

    __slots__ = (
        "_clock", "_cooldown", "_counts", "_epoch", "_failed", "_opened", "_policy", "_probing", "_row", "_seen",
    )  # fmt: skip

    def __init__(self, policy: BreakerPolicy | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy, self._clock = policy or BreakerPolicy(), clock
        self._counts: deque[list[float]] = deque()  # [since, results, failures], oldest first
        self._seen = self._failed = self._row = self._epoch = 0
        self._opened: float | None = None
        self._cooldown = self._policy.cooldown_s
        self._probing = False

    @property
    def state(self) -> str:
        """``"closed"``, ``"open"`` or ``"half_open"``."""
        if self._opened is None:
            return "closed"
        return "half_open" if self._clock() - self._opened >= self._cooldown else "open"

    @property
    def retry_after(self) -> float:
        """Seconds until a probe may pass."""
        return 0.0 if self._opened is None else max(0.0, self._opened + self._cooldown - self._clock())

    def enter(self) -> int | None:
        """Ask to make a call.

        Returns:
            A ticket that must go back through :meth:`record` or :meth:`release`; ``None``: not now.
        """
        if self._opened is None:
            return self._epoch
        if self._probing or self.state == "open":
            return None
        self._probing = True
        return self._epoch

    def record(self, ticket: int, ok: bool) -> None:
        """Report how a call ended. One that began before the breaker last changed its state tells nothing new."""
        if ticket != self._epoch:
            return
        now = self._clock()
        if self._opened is not None:
            self._epoch += 1
            self._probing = False
            if ok:
                self._opened, self._cooldown = None, self._policy.cooldown_s
                self._counts.clear()
                self._seen = self._failed = self._row = 0
            else:
                self._opened, self._cooldown = now, min(self._cooldown * 2, self._policy.max_cooldown_s)
            return
        window = self._policy.window_s
        if not self._counts or now - self._counts[-1][0] > window / 64:
            self._counts.append([now, 0, 0])
        self._counts[-1][1] += 1
        self._counts[-1][2] += not ok
        self._seen += 1
        self._failed += not ok
        self._row = 0 if ok else self._row + 1
        while now - self._counts[0][0] > window:
            _, seen, failed = self._counts.popleft()
            self._seen -= int(seen)
            self._failed -= int(failed)
        many = self._seen >= self._policy.min_calls
        if self._row >= self._policy.consecutive or (many and self._failed > self._policy.failure_rate * self._seen):
            self._opened = now
            self._epoch += 1

    def release(self, ticket: int) -> None:
        """Give back the ticket of a call that told nothing about the endpoint (it was cancelled)."""
        if ticket == self._epoch:
            self._probing = False
