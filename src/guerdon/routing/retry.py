"""When to ask an endpoint again, and how long to wait before it."""

from __future__ import annotations

import email.utils
import random
import time
from dataclasses import dataclass

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
        total_s: no retry begins later than this after the first attempt.

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
        if min(self.base_s, self.max_s, self.max_retry_after_s, self.total_s) < 0:
            raise ConfigError("waits must not be negative")

    def wait(self, attempt: int, retry_after: float | None, generator: random.Random) -> float | None:
        """Seconds before attempt ``attempt + 1`` (attempts count from 1), or None for no further attempt."""
        if attempt >= self.attempts:
            return None
        if retry_after is not None:
            return None if retry_after > self.max_retry_after_s else retry_after
        return generator.uniform(0.0, min(self.max_s, self.base_s * 2 ** (attempt - 1)))


def parse_retry_after(value: str | None, now: float | None = None) -> float | None:
    """Seconds of a ``Retry-After`` header, which holds seconds or an HTTP date; None where it is neither."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        try:
            when = email.utils.parsedate_to_datetime(value)
        except (TypeError, ValueError):
            return None
        return max(0.0, when.timestamp() - (time.time() if now is None else now))
