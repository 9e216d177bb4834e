"""A hard cap on money, calls and time: worst cases are reserved before anything is paid."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from guerdon.errors import BudgetExceeded, ConfigError

__all__ = ["Budget"]


class Budget:
    """What one trajectory (or request) may still spend.

    A call first reserves its worst case; concurrent reservations together never exceed the cap. When the
    call is over, :meth:`settle` replaces the reservation by what it really cost.

    Args:
        max_usd: cap in USD; ``None`` for none.
        max_calls: cap on calls; ``None`` for none.
        deadline_s: seconds from now after which nothing more is reserved; ``None`` for no limit.
        clock: monotonic seconds.
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
        self.max_usd, self.max_calls = max_usd, max_calls
        self._clock = clock
        self.deadline = None if deadline_s is None else clock() + deadline_s
        self.spent_usd = 0.0
        self.calls = 0
        self._reserved: dict[int, float] = {}
        self._next = 0

    @property
    def remaining_usd(self) -> float:
        """Cap minus spent minus reserved; infinite without a cap."""
        return math.inf if self.max_usd is None else self.max_usd - self.spent_usd - sum(self._reserved.values())

    def can_reserve(self, usd: float) -> bool:
        """Whether one more call that costs at most ``usd`` fits."""
        if self.max_calls is not None and self.calls + len(self._reserved) >= self.max_calls:
            return False
        if self.deadline is not None and self._clock() >= self.deadline:
            return False
        # A cap that is met exactly is met: sums of floats may exceed it by rounding alone.
        return usd <= self.remaining_usd + 1e-12

    def reserve(self, usd: float) -> int:
        """Set aside ``usd`` for one call.

        Returns:
            A token for :meth:`settle`.

        Raises:
            BudgetExceeded: it does not fit.
        """
        if not self.can_reserve(usd):
            raise BudgetExceeded(
                f"the next call may cost up to ${usd:.6f}, ${max(self.remaining_usd, 0):.6f} is left"
                + (f" and {self.calls} of {self.max_calls} calls are made" if self.max_calls is not None else "")
            )
        self._next += 1
        self._reserved[self._next] = usd
        return self._next

    def settle(self, token: int, usd: float) -> None:
        """Replace a reservation by the real cost."""
        if token not in self._reserved:
            raise ValueError(f"reservation {token} is unknown or settled already")
        del self._reserved[token]
        self.spent_usd += usd
        self.calls += 1
