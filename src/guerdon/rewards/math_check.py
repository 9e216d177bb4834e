"""Are two mathematical texts equal? What a worker of :class:`~guerdon.rewards.MathEquality` runs: math-verify, alone.

This module is imported in processes of its own, so it imports nothing of Guerdon.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

__all__ = ["check"]

_MARKS = ("$", "\\(", "\\[", "\\boxed")


def check(answer: str, golds: list[str], strict: bool = True) -> dict[str, Any]:
    """Compare an answer with golds; no time-out, which is the caller's business.

    Returns:
        ``equal``; ``read``: the answer is mathematics; ``unread``: a gold in which nothing can be compared, or None.
    """
    from math_verify import verify

    parsed = [_parsed(gold) for gold in golds]
    unread = next((gold for gold, found in zip(golds, parsed, strict=True) if not found), None)
    found = _parse(answer)
    equal = bool(found) and any(
        bool(gold) and bool(verify(gold, found, strict=strict, timeout_seconds=None)) for gold in parsed
    )
    return {"equal": equal, "read": any(not isinstance(x, str) for x in found), "unread": unread}


def _prepare() -> None:
    logging.disable(logging.WARNING)  # one warning per process about the time-outs that are switched off
    check(r"\frac{x^2}{2} + \sqrt{3}", [r"\{1, 2\}", "x + 1", "1/2"])  # parsers are built before workers are forked


check.prepare = _prepare  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=10_000)
def _parsed(gold: str) -> list[Any]:
    return _parse(gold)


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    marked = text if any(mark in text for mark in _MARKS) else f"${text}$"
    return list(parse(marked, parsing_timeout=None))
