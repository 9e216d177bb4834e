"""How much a text repeats itself, and how much of it is copied from another text: word n-grams only."""

from __future__ import annotations

from collections import Counter

from guerdon.errors import ConfigError
from guerdon.rewards.base import OnError
from guerdon.rewards.plain import TextReward

__all__ = ["RepetitionRatio", "copied_share", "repeated_share", "repetition_ratio", "word_ngrams"]


def word_ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """All runs of ``n`` whitespace-separated words, in order and with repeats; none where there are fewer words.

    Raises:
        ConfigError: ``n`` below 1.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ConfigError(f"n must be an integer of at least 1, got {n!r}")
    words = text.split()
    return list(zip(*(words[k:] for k in range(n)), strict=False))


def repetition_ratio(text: str, n: int = 20) -> float:
    """Distinct n-grams that occur more than once, over all n-grams with their repeats; 0 for fewer than ``n`` words.

    The numerator counts each repeated n-gram once, so the value never exceeds 1/2 and a text that says the same
    thing very often scores *low*; :func:`repeated_share` has no such dip. Source: Lv et al. 2025
    (arXiv 2505.22653), released pattern reward, n = 20.
    """
    counts = Counter(word_ngrams(text, n))
    return sum(c > 1 for c in counts.values()) / counts.total() if counts else 0.0


def repeated_share(text: str, n: int = 4) -> float:
    """Share of n-grams that repeat an earlier one, ``1 - distinct / all`` in [0, 1); 0 for fewer than ``n`` words."""
    grams = word_ngrams(text, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def copied_share(text: str, source: str, n: int = 4) -> float:
    """Share of the n-grams of ``text`` that occur in ``source``, in [0, 1]; 0 for fewer than ``n`` words."""
    grams = word_ngrams(text, n)
    if not grams:
        return 0.0
    known = set(word_ngrams(source, n))
    return sum(gram in known for gram in grams) / len(grams)


class RepetitionRatio(TextReward):
    """:func:`repetition_ratio` of what the policy wrote, in [0, 1/2]; subtract it to discourage repetition.

    Called on a list of plain responses it returns ``[B]`` float64.

    Args:
        n: words per n-gram.
    """

    range = (0.0, 0.5)

    def __init__(self, n: int = 20, *, name: str | None = None, on_error: OnError = "raise") -> None:
        super().__init__(name=name, on_error=on_error)
        word_ngrams("", n)
        self.n = n

    def score_text(self, text: str) -> float:
        return repetition_ratio(text, self.n)
