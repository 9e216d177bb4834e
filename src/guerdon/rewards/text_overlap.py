"""Overlap with a reference text as a reward: ROUGE, BLEU and chrF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from guerdon.errors import ConfigError, DataError, MissingDependency
from guerdon.rewards.base import OnError
from guerdon.rewards.overlap import rouge
from guerdon.rewards.referenced import AnswerReward

__all__ = ["Bleu", "ChrF", "Rouge"]


def _texts(reference: Any) -> list[str]:
    texts = [reference] if isinstance(reference, str) else reference
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise DataError("a reference text is needed, or a list of texts, none of them blank")
    return list(texts)


class Rouge(AnswerReward):
    """Mean of ROUGE F-measures with the best of the reference texts, in [0, 1].

    Args:
        kinds: any of ``"1"``, ``"2"``, ... (n-grams of words) and ``"L"`` (longest common subsequence).
        stem: compare stems of words (Porter); needs the extra ``text``.
        tag: read only the last block of this tag; by default the whole response counts.

    A blank response gives 0. Values are those of the package rouge-score. Source: Lin 2004.
    """

    def __init__(
        self,
        kinds: Sequence[str] = ("1", "2", "L"),
        *,
        stem: bool = False,
        tag: str | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(tag=tag, name=name, on_error=on_error)
        self.kinds = tuple(str(k) for k in kinds)
        if not self.kinds or not all(k == "L" or (k.isdecimal() and int(k) > 0) for k in self.kinds):
            raise ConfigError(f"kinds are numbers of words from 1, or 'L', got {list(kinds)!r}")
        self.stem = stem

    def score_answer(self, answer: str, reference: Any, meta: Mapping[str, Any]) -> float:
        return max(rouge(answer, text, self.kinds, stem=self.stem) for text in _texts(reference))


class _Sacre(AnswerReward):
    """A sentence metric of sacrebleu, brought to [0, 1]."""

    def __init__(
        self, metric: Any, *, tag: str | None = None, name: str | None = None, on_error: OnError = "raise"
    ) -> None:
        super().__init__(tag=tag, name=name, on_error=on_error)
        self._metric = metric

    def score_answer(self, answer: str, reference: Any, meta: Mapping[str, Any]) -> float:
        texts = _texts(reference)
        if not answer.strip():
            return 0.0
        return min(1.0, max(0.0, self._metric.sentence_score(answer, texts).score / 100.0))


class Bleu(_Sacre):
    """Sentence BLEU with the reference texts, in [0, 1], as sacrebleu computes it (exponential smoothing).

    Args:
        tokenize: sacrebleu's: ``"13a"``, ``"zh"``, ``"char"``, ``"intl"`` or ``"none"``.
        lowercase: ignore case.
        tag: read only the last block of this tag; by default the whole response counts.

    A blank response gives 0.

    Raises:
        MissingDependency: sacrebleu is not installed.

    Source: Papineni et al. 2002; Post 2018.
    """

    def __init__(
        self,
        tokenize: str = "13a",
        *,
        lowercase: bool = False,
        tag: str | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        if tokenize not in ("13a", "zh", "char", "intl", "none"):
            raise ConfigError(f"tokenize must be 13a, zh, char, intl or none, got {tokenize!r}")
        metric = _metrics().BLEU(tokenize=tokenize, lowercase=lowercase, effective_order=True)
        super().__init__(metric, tag=tag, name=name, on_error=on_error)


class ChrF(_Sacre):
    """Sentence chrF with the reference texts, in [0, 1], as sacrebleu computes it: F-measure of character n-grams.

    Args:
        word_order: n-grams of words that count beside those of characters; 2 is chrF++.
        lowercase: ignore case.
        tag: read only the last block of this tag; by default the whole response counts.

    A blank response gives 0.

    Raises:
        MissingDependency: sacrebleu is not installed.

    Source: Popovic 2015.
    """

    def __init__(
        self,
        word_order: int = 0,
        *,
        lowercase: bool = False,
        tag: str | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        if isinstance(word_order, bool) or not isinstance(word_order, int) or not 0 <= word_order <= 4:
            raise ConfigError(f"word_order must be an integer from 0 to 4, got {word_order!r}")
        metric = _metrics().CHRF(word_order=word_order, lowercase=lowercase)
        super().__init__(metric, tag=tag, name=name, on_error=on_error)


def _metrics() -> Any:
    try:
        import sacrebleu.metrics as metrics
    except ImportError as error:
        raise MissingDependency("BLEU and chrF need sacrebleu: pip install 'guerdon[text]'") from error
    return metrics
