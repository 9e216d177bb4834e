"""A hard cap on money, calls and time: worst cases are reserved before anything is paid."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from guerdon.errors import BudgetExceeded, ConfigError

__all__ = ["Budget"]

# Rounding of a float product may reach past a whole billionth; amounts are given to fewer digits than this.
_SLACK = 1e-6


class Budget:
    """What one trajectory (or request) may still spend.

    A call first reserves its worst case; concurrent reservations together never exceed the cap. When the
    call is over, :meth:`settle` replaces the reservation by what it really cost. Amounts are kept as whole
    billionths of a dollar, so that sums are exact; reservations are rounded up, the cap is rounded down.

    Args:
        max_usd: cap in USD; ``None`` for none.
        max_calls: cap on calls; ``None`` for none.
        deadline_s: seconds from now after which nothing more is reserved, and calls under way are cut off;
            ``None`` for no limit.
        clock: monotonic seconds.

    Raises:
        ConfigError: a cap is negative or not finite.
    """

    def __init__(
        self,
        max_usd: float | None = None,
        max_calls: int | None = None,
        deadline_s: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_usd is not None and not (math.isfinite(max_usd) and max_usd >= 0):
            raise ConfigError(f"max_usd must be a finite amount >= 0, got {max_usd}")
        if max_calls is not None and max_calls < 0:
            raise ConfigError(f"max_calls must be >= 0, got {max_calls}")
        if deadline_s is not None and not (math.isfinite(deadline_s) and deadline_s >= 0):
            raise ConfigError(f"deadline_s must be a finite number of seconds >= 0, got {deadline_s}")
        self.max_usd, self.max_calls = max_usd, max_calls
        self.deadline = None if deadline_s is None else clock() + deadline_s
        self.calls = 0
        self._clock = clock
        self._cap = None if max_usd is None else math.floor(max_usd * 1e9 + _SLACK)
        self._spent = self._held = self._next = 0
        self._reserved: dict[int, int] = {}
        self._lock = threading.Lock()

    @property
    def spent_usd(self) -> float:
        """Sum of what was settled."""
        return self._spent / 1e9

    @property
    def remaining_usd(self) -> float:
        """Cap minus spent minus reserved; infinite without a cap."""
        return math.inf if self._cap is None else (self._cap - self._spent - self._held) / 1e9

    def can_reserve(self, usd: float) -> bool:
        """Whether one more call that costs at most ``usd`` fits."""
        return self._refusal(_up(usd)) is None

    def reserve(self, usd: float) -> int:
        """Set aside ``usd`` for one call.

        Returns:
            A token for :meth:`settle`.

        Raises:
            BudgetExceeded: it does not fit; the message says which cap is in the way.
        """
        amount = _up(usd)
        with self._lock:
            refusal = self._refusal(amount)
            if refusal is not None:
                raise BudgetExceeded(refusal)
            self._next += 1
            self._held += amount
            self._reserved[self._next] = amount
            return self._next

    def settle(self, token: int, usd: float) -> None:
        """Replace a reservation by the real cost."""
        with self._lock:
            if token not in self._reserved:
                raise ValueError(f"reservation {token} is unknown or settled already")
            self._held -= self._reserved.pop(token)
            self._spent += round(usd * 1e9)
            self.calls += 1

    def _refusal(self, amount: int) -> str | None:
        if self.max_calls is not None and self.calls + len(self._reserved) >= self.max_calls:
            return f"all {self.max_calls} calls of this budget are used"
        if self.deadline is not None and self._clock() >= self.deadline:
            return "the time of this budget is over"
        if self._cap is not None and amount > self._cap - self._spent - self._held:
            return f"the next call may cost up to ${amount / 1e9:.6f}, ${max(self.remaining_usd, 0):.6f} is left"
        return None


def _up(usd: float) -> int:
    if not (math.isfinite(usd) and usd >= 0):
        raise ValueError(f"only a finite amount >= 0 can be reserved, got {usd}")
    return math.ceil(usd * 1e9 - _SLACK)
