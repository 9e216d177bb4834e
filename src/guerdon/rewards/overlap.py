"""How much a text has in common with a reference: word error rate and ROUGE, exact and without a model."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable

import numpy as np

from guerdon.errors import DataError, MissingDependency

__all__ = ["rouge", "word_error_rate"]

_NOT_WORD = re.compile(r"[^a-z0-9]+")


def word_error_rate(text: str, reference: str) -> float:
    """Fewest words to insert, delete or replace that make ``text`` of ``reference``, over the reference's words.

    Words are separated by blanks and compared as they stand. The rate is 0 for equal texts and unbounded above.

    Raises:
        DataError: the reference has no words.
    """
    said, gold = text.split(), reference.split()
    if not gold:
        raise DataError("a word error rate needs a reference with words; this one is blank")
    vocabulary = {word: k for k, word in enumerate({*said, *gold})}
    ids = np.array([vocabulary[w] for w in said], dtype=np.int64)
    # One row per reference word; a run of insertions is a running minimum, so that a row is computed at once.
    steps = np.arange(len(said) + 1)
    row = steps.copy()
    for k, word in enumerate(gold, start=1):
        least = np.empty_like(row)
        least[0] = k
        least[1:] = np.minimum(row[1:] + 1, row[:-1] + (ids != vocabulary[word]))
        row = np.minimum.accumulate(least - steps) + steps
    return float(row[-1]) / len(gold)


def rouge(text: str, reference: str, kinds: tuple[str, ...] = ("1", "2", "L"), *, stem: bool = True) -> float:
    """Mean of ROUGE F-measures in [0, 1]: overlap of words (``"1"``), of pairs (``"2"``), of a subsequence (``"L"``).

    Words are runs of ASCII letters and digits in lower case. Without words on either side the measure is 0.

    Args:
        text: a response.
        reference: what it is compared with.
        kinds: ``"L"``, or the length of an n-gram as text.
        stem: reduce words of more than three letters to their stems (Porter); needs the extra ``text``.

    Raises:
        MissingDependency: ``stem`` without NLTK.

    Source: Lin 2004; words and stems as in the package rouge-score.
    """
    said, gold = _words(text, stem), _words(reference, stem)
    return sum(_common(said, gold, kind) for kind in kinds) / len(kinds)


def _words(text: str, stem: bool) -> list[str]:
    words = _NOT_WORD.sub(" ", text.lower()).split()
    if not stem:
        return words
    to_stem = _stemmer()
    return [to_stem(w) if len(w) > 3 else w for w in words]


@functools.cache
def _stemmer() -> Callable[[str], str]:
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError as error:
        raise MissingDependency("stems need NLTK: pip install 'guerdon[text]', or stem=False") from error
    return functools.lru_cache(maxsize=100_000)(PorterStemmer().stem)


def _common(said: list[str], gold: list[str], kind: str) -> float:
    if kind == "L":
        common, a, b = _subsequence(said, gold), len(said), len(gold)
    else:
        n = int(kind)
        grams = [Counter(zip(*(words[k:] for k in range(n)), strict=False)) for words in (said, gold)]
        common, a, b = (grams[0] & grams[1]).total(), grams[0].total(), grams[1].total()
    return 2 * common / (a + b) if common else 0.0


def _subsequence(said: list[str], gold: list[str]) -> int:
    """Length of the longest common subsequence, a machine word of the table at a time (Hyyro 2004)."""
    places: dict[str, int] = {}
    for k, word in enumerate(gold):
        places[word] = places.get(word, 0) | 1 << k
    full = (1 << len(gold)) - 1
    row = full
    for word in said:
        match = row & places.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return len(gold) - row.bit_count()
