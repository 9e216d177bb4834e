"""How a response sounds: sentiment and toxicity by small lexicons, or by a classifier of yours."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from guerdon.errors import ConfigError, DataError, MissingDependency
from guerdon.rewards.base import OnError, Reward
from guerdon.rewards.plain import TextReward
from guerdon.types import Score, Trajectory, policy_text

__all__ = ["Sentiment", "Toxicity", "bad_words"]

_SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")
_LONGEST = 100


class Sentiment(TextReward):
    """Mean over sentences of VADER's compound sentiment, from -1 (negative) to 1 (positive), of an English response.

    Sentences of more than 100 words are cut. A blank response gives 0, which is neutral. Weight it with -1 to ask for the
    opposite.

    Raises:
        MissingDependency: vaderSentiment is not installed.

    Source: Hutto and Gilbert 2014, VADER.
    """

    range = (-1.0, 1.0)
    gives = frozenset({"outcome"})

    def __init__(self, *, name: str | None = None, on_error: OnError = "raise") -> None:
        super().__init__(name=name, on_error=on_error)
        _vader()

    def score_text(self, text: str) -> Score:
        analyse = _vader().polarity_scores
        values = [float(analyse(piece)["compound"]) for piece in _pieces(text)]
        mean = math.fsum(values) / len(values) if values else 0.0
        return Score(min(1.0, max(-1.0, mean)), parts={"sentences": float(len(values))})


def _pieces(text: str) -> list[str]:
    """Sentences of at most 100 words: VADER's time is quadratic in the words that it is given at once."""
    out: list[str] = []
    for found in _SENTENCE.finditer(text):
        words = found.group().split()
        out += [" ".join(words[k : k + _LONGEST])[:2000] for k in range(0, len(words), _LONGEST)]
    return out


@functools.lru_cache(maxsize=1)
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise MissingDependency("sentiment needs vaderSentiment: pip install 'guerdon[text]'") from error
    return SentimentIntensityAnalyzer()


class Toxicity(Reward):
    """A penalty from 0 (nothing toxic) to -1.

    By default 1 word of better-profanity's English list costs the whole penalty; digits and signs that stand for letters
    ("a$$") are read as these. A list of words knows no context: names and quotations count.

    Args:
        most: words of the list at which the whole penalty is paid; fewer pay their share.
        words: another list.
        classify: maps texts to as many probabilities of being toxic, for example those of a classifier; then no list is
            used, and the penalty is the probability.

    Part ``words``: how many were found.

    Raises:
        MissingDependency: better-profanity is not installed, and neither ``words`` nor ``classify`` is given.
    """

    range = (-1.0, 0.0)
    gives = frozenset({"outcome"})

    def __init__(
        self,
        most: int = 1,
        *,
        words: Sequence[str] | None = None,
        classify: Callable[[list[str]], Sequence[float]] | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ConfigError(f"most must be an integer of at least 1, got {most!r}")
        if isinstance(words, str) or (words is not None and not all(isinstance(w, str) and w.strip() for w in words)):
            raise ConfigError("words must be a list of words, none of them blank")
        if classify is not None and not callable(classify):
            raise ConfigError(f"classify must be a function from texts to probabilities, got {type(classify).__name__}")
        self.most, self._classify = most, classify
        self._list = None if classify is not None else _lexicon(None if words is None else tuple(words))

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Score a batch; a classifier is called once."""
        texts = [policy_text(t) for t in trajectories]
        if self._list is not None:
            counts = [len(bad_words(text, self._list)) for text in texts]
            return [Score(0.0 - min(1.0, n / self.most), parts={"words": float(n)}) for n in counts]
        assert self._classify is not None
        values = [float(p) for p in self._classify(texts)] if texts else []
        if len(values) != len(texts) or not all(0.0 <= p <= 1.0 for p in values):
            raise DataError(f"classify must return {len(texts)} probabilities in [0, 1]")
        return [Score(0.0 - p) for p in values]


_WORD = re.compile(r"[\w@$*]+(?:-[\w@$*]+)*")
_SIGNS = {"@": "a", "4": "a", "1": "il", "0": "o", "3": "e", "$": "s", "5": "s", "7": "t", "*": "aiou"}
_MOST_SIGNS = 4


class _Lexicon:
    """Words in lower case, and the phrases by their number of words."""

    def __init__(self, entries: Sequence[str]) -> None:
        split = [tuple(_WORD.findall(entry.lower())) for entry in entries]
        self.words = frozenset(words[0] for words in split if len(words) == 1)
        self.phrases = frozenset(words for words in split if len(words) > 1)
        self.lengths = sorted({len(words) for words in self.phrases})


@functools.lru_cache(maxsize=8)
def _lexicon(words: tuple[str, ...] | None) -> _Lexicon:
    if words is not None:
        return _Lexicon(words)
    try:
        from better_profanity.utils import get_complete_path_of_file, read_wordlist
    except ImportError as error:
        raise MissingDependency("the list of words is better-profanity's: pip install 'guerdon[text]'") from error
    return _Lexicon(list(read_wordlist(get_complete_path_of_file("profanity_wordlist.txt"))))


def bad_words(text: str, lexicon: Any = None) -> list[str]:
    """Words and phrases of the list that a text holds, in order, as they are written there."""
    known = lexicon or _lexicon(None)
    spoken = _WORD.findall(text)
    lower = [word.lower() for word in spoken]
    out = []
    for k, word in enumerate(lower):
        if word in known.words or any(w in known.words for w in _readings(word)):
            out.append(spoken[k])
        elif any(tuple(lower[k : k + n]) in known.phrases for n in known.lengths):
            out.append(
                " ".join(spoken[k : k + next(n for n in known.lengths if tuple(lower[k : k + n]) in known.phrases)])
            )
    return out


def _readings(word: str) -> list[str]:
    """What a word with signs for letters can mean; none for a word of letters, a number, or one with too many signs."""
    signs = sum(c in _SIGNS for c in word)
    if not 0 < signs <= _MOST_SIGNS or signs == len(word) or len(word) > 40:
        return []
    out = [""]
    for c in word:
        out = [made + letter for made in out for letter in _SIGNS.get(c, c)]
    return out
