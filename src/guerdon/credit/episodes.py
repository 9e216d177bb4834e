"""Episodes of a long thought: attempts, checks and restarts, told apart by how a paragraph begins.

Source: Qu et al. 2025, "Optimizing Test-Time Compute via Meta Reinforcement Fine-Tuning" (arXiv 2503.07572).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["MARKERS", "episode_offsets", "merge_episodes", "split_episodes"]

MARKERS = (
    "Wait",
    "But wait",
    "Alternatively",
    "Is there another way to think about this?",
    "But let me double-check",
    "But hold on",
)
"""How a paragraph begins that opens a new episode."""

_BLANK = re.compile(r"\n[ \t\r]*\n\s*")


def split_episodes(
    text: str, markers: Sequence[str] = MARKERS, min_paragraphs: int = 3, max_episodes: int | None = None
) -> list[str]:
    """Cut a thought into episodes.

    Paragraphs are separated by a blank line. One that starts with a marker (case matters, nothing else need follow)
    opens a new episode, unless the current episode has fewer than ``min_paragraphs`` paragraphs. What is left is the
    last episode. A marker in the middle of a paragraph opens nothing.

    Args:
        text: the thought, without tags.
        markers: beginnings of paragraphs.
        min_paragraphs: fewest paragraphs of an episode that another follows.
        max_episodes: most episodes; the last one then takes all that follows.

    Returns:
        the episodes' texts without the blank lines between them; ``[]`` for a text without content, one episode where
        no marker applies.

    Raises:
        ValueError: ``min_paragraphs`` or ``max_episodes`` below 1, or an empty marker.
    """
    starts = _starts(text, markers, min_paragraphs, max_episodes)
    return [text[a:b].rstrip() for a, b in pairwise([*starts, len(text)])]


def episode_offsets(
    text: str, markers: Sequence[str] = MARKERS, min_paragraphs: int = 3, max_episodes: int | None = None
) -> list[int]:
    """Offsets in ``text`` at which the episodes of :func:`split_episodes` end, blank lines behind them included.

    The last one is ``len(text)``; what :class:`~guerdon.types.Segmenter` wants of a callable ``cut``.
    """
    starts = _starts(text, markers, min_paragraphs, max_episodes)
    return [*starts[1:], len(text)] if starts else []


def merge_episodes(episodes: Sequence[str], size: int) -> list[str]:
    """Join groups of ``size`` consecutive episodes (the last group may be smaller), a blank line between them.

    Raises:
        ValueError: size below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 episode, got {size}")
    return ["\n\n".join(episodes[k : k + size]) for k in range(0, len(episodes), size)]


def _starts(text: str, markers: Sequence[str], min_paragraphs: int, max_episodes: int | None) -> list[int]:
    if min_paragraphs < 1:
        raise ValueError(f"min_paragraphs must be at least 1, got {min_paragraphs}")
    if max_episodes is not None and max_episodes < 1:
        raise ValueError(f"max_episodes must be at least 1 or None, got {max_episodes}")
    begins = (markers,) if isinstance(markers, str) else tuple(markers)
    if not all(begins):
        raise ValueError("an empty marker would start every paragraph; remove it")
    if not text.strip():
        return []
    first = len(text) - len(text.lstrip())
    paragraphs = [first, *(m.end() for m in _BLANK.finditer(text, first) if m.end() < len(text))]
    out, held = [first], 1
    for start in paragraphs[1:]:
        full = max_episodes is not None and len(out) >= max_episodes
        if held >= min_paragraphs and not full and text.startswith(begins, start):
            out.append(start)
            held = 0
        held += 1
    return out
