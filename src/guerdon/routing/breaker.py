"""A circuit breaker: an endpoint that keeps failing is left alone for a while."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from guerdon.errors import ConfigError

__all__ = ["Breaker"]


class Breaker:
    """Closed (calls pass), open (they do not), half open (one probe passes after the cooldown).

    It opens when, within the last ``window_s`` seconds, at least ``min_calls`` calls ended and more than
    ``failure_rate`` of them failed. A probe that succeeds closes it; one that fails opens it again for twice
    as long, up to ``max_cooldown_s``.

    Args:
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        window_s: float = 60.0,
        min_calls: int = 5,
        failure_rate: float = 0.5,
        cooldown_s: float = 5.0,
        max_cooldown_s: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if min_calls < 1 or not 0 < failure_rate <= 1 or cooldown_s <= 0:
            raise ConfigError("a breaker needs min_calls >= 1, failure_rate in (0, 1] and cooldown_s > 0")
        self._window, self._min, self._rate = window_s, min_calls, failure_rate
        self._base, self._max, self._clock = cooldown_s, max_cooldown_s, clock
        self._events: deque[tuple[float, bool]] = deque()
        self._failed = 0
        self._opened: float | None = None
        self._cooldown = cooldown_s
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

    def allow(self) -> bool:
        """Whether a call may be made now; a True in the half-open state is the probe."""
        state = self.state
        if state == "closed":
            return True
        if state == "half_open" and not self._probing:
            self._probing = True
            return True
        return False

    def record(self, ok: bool) -> None:
        """Report how an allowed call ended."""
        now = self._clock()
        if self._opened is not None:
            self._probing = False
            if ok:
                self._opened, self._cooldown = None, self._base
                self._events.clear()
                self._failed = 0
            else:
                self._opened, self._cooldown = now, min(self._cooldown * 2, self._max)
            return
        self._events.append((now, ok))
        self._failed += not ok
        while self._events and now - self._events[0][0] > self._window:
            self._failed -= not self._events.popleft()[1]
        if len(self._events) >= self._min and self._failed > self._rate * len(self._events):
            self._opened, self._probing = now, False

    def release(self) -> None:
        """Give back an allowed call that ended without telling anything (it was cancelled)."""
        self._probing = False
