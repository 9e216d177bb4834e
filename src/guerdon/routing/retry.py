"""When to ask an endpoint again, and how long to wait before it."""

from __future__ import annotations

import email.utils
import math
import random
import time
from dataclasses import dataclass
from datetime import UTC

from guerdon.errors import ConfigError

__all__ = ["RetryPolicy", "parse_retry_after"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Full-jitter exponential backoff.

    Args:
        attempts: requests in all, the first included.
        base_s: upper bound of the first wait; it doubles with each further one.
        max_s: largest upper bound.
        max_retry_after_s: a ``Retry-After`` beyond this ends the retries instead of being waited for.
        total_s: no retry begins later than this after the call began.

    Source: Brooker, "Exponential Backoff And Jitter", 2015.
    """

    attempts: int = 3
    base_s: float = 0.5
    max_s: float = 8.0
    max_retry_after_s: float = 30.0
    total_s: float = 120.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ConfigError(f"attempts must be at least 1, got {self.attempts}")
        for name in ("base_s", "max_s", "max_retry_after_s", "total_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"{name} must be a finite number of seconds >= 0, got {getattr(self, name)}")

    def wait(self, attempt: int, retry_after: float | None, generator: random.Random) -> float | None:
        """Seconds before attempt ``attempt + 1`` (attempts count from 1), or None for no further attempt.

        What the endpoint asks for is waited in full, and up to ``base_s`` more, so that callers who were
        turned away together do not come back together.
        """
        if attempt >= self.attempts:
            return None
        if retry_after is not None:
            return None if retry_after > self.max_retry_after_s else retry_after + generator.uniform(0.0, self.base_s)
        return generator.uniform(0.0, min(self.max_s, self.base_s * 2.0 ** min(attempt - 1, 60)))


def parse_retry_after(value: str | None, now: float | None = None) -> float | None:
    """Seconds of a ``Retry-After`` header, which holds seconds or an HTTP date; None where it is neither.

    Args:
        value: the header.
        now: Unix time; the clock by default.
    """
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = email.utils.parsedate_to_datetime(value)
        except (TypeError, ValueError):
            return None
        # A date with the zone "-0000" is UTC by RFC 5322, but is parsed as a local one.
        when = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
        return max(0.0, when.timestamp() - (time.time() if now is None else now))
    return None if math.isnan(seconds) else max(0.0, seconds)
