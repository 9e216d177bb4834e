"""Does the response match a regular expression? With a time-out, since a pattern can take exponential time."""

from __future__ import annotations

import functools
from typing import Any, Literal

import regex

from guerdon.errors import ConfigError
from guerdon.rewards.base import OnError, Reward
from guerdon.rewards.grammar import last_block
from guerdon.types import Score, Trajectory, policy_text

__all__ = ["RegexMatch", "compile_pattern", "found_in"]

Mode = Literal["search", "match", "fullmatch"]


@functools.lru_cache(maxsize=1000)
def compile_pattern(pattern: str, flags: int = 0) -> Any:
    """A compiled pattern in the syntax of the package ``regex``, which reads that of :mod:`re`.

    Raises:
        ConfigError: it is none.
    """
    try:
        return regex.compile(pattern, flags)
    except (regex.error, TypeError) as error:
        raise ConfigError(f"this is no regular expression: {pattern!r}: {error}") from error


def found_in(pattern: Any, text: str, mode: Mode, seconds: float) -> bool:
    """Whether a compiled pattern matches.

    Raises:
        TimeoutError: it did not end in time; the search itself stops then, in any thread.
    """
    return getattr(pattern, mode)(text, timeout=seconds, concurrent=True) is not None


class RegexMatch(Reward):
    """1 where a pattern matches what the policy wrote, else 0.

    Args:
        pattern: a regular expression, in the syntax of :mod:`re` (and the additions of the package ``regex``).
        mode: ``"search"`` anywhere, ``"match"`` at the beginning, ``"fullmatch"`` all of it.
        tag: read only the last block of this tag; a response without one gives 0.
        ignore_case: case does not count.
        dot_all: a dot matches line ends too.
        seconds: that a search may take; then the score is 0, counted in :attr:`failures` and in the part ``timed_out``.

    Raises:
        ConfigError: the pattern is none, or a setting is unknown.
    """

    range = (0.0, 1.0)
    gives = frozenset({"outcome"})

    def __init__(
        self,
        pattern: str,
        *,
        mode: Mode = "search",
        tag: str | None = None,
        ignore_case: bool = False,
        dot_all: bool = True,
        seconds: float = 1.0,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if mode not in ("search", "match", "fullmatch"):
            raise ConfigError(f"mode must be search, match or fullmatch, got {mode!r}")
        if isinstance(seconds, bool) or not 0 < seconds < float("inf"):
            raise ConfigError(f"seconds must be positive and finite, got {seconds!r}")
        flags = (regex.IGNORECASE if ignore_case else 0) | (regex.DOTALL if dot_all else 0)
        self._pattern = compile_pattern(pattern, int(flags))
        self.mode, self.tag, self._seconds = mode, tag, float(seconds)

    def score_one(self, trajectory: Trajectory) -> Score:
        text: str | None = policy_text(trajectory)
        if self.tag is not None and text is not None:
            text = last_block(text, self.tag)
        if text is None:
            return Score(0.0, parts={"timed_out": 0.0})
        try:
            return Score(float(found_in(self._pattern, text, self.mode, self._seconds)), parts={"timed_out": 0.0})
        except TimeoutError:
            self.failures["pattern timed out"] += 1
            return Score(0.0, parts={"timed_out": 1.0})
