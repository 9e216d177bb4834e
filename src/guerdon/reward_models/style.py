"""A light discriminator of rewritten from original text: a reward for rewriting that needs no reference.

Source: Rahman et al. 2024, "Health Text Simplification" (arXiv 2401.15043). The pairwise loss as the default, the clip of
scores and the removal of length are reconstructions, and arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from guerdon.errors import ConfigError, DataError, MissingDependency

__all__ = ["StyleDiscriminator", "auc"]


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that a positive score exceeds a negative one, ties counting half; NaN where one side is empty."""
    p, n = np.asarray(positive, dtype=np.float64), np.asarray(negative, dtype=np.float64)
    if not len(p) or not len(n):
        return float("nan")
    order = np.sort(n)
    below = np.searchsorted(order, p, side="left")
    equal = np.searchsorted(order, p, side="right") - below
    return float((below + equal / 2).mean() / len(n))


class StyleDiscriminator:
    """``f(t)``: larger for text that reads like a simplification.

    Args:
        encoder: ``"tfidf"`` (words and pairs of words), or a function of ``B`` texts giving ``[B, D]`` features (sentence
            embeddings, say).
        loss: ``"pairwise"``: ``-log sigmoid(f(simplified) - f(original))`` on each pair; ``"bce"``: cross-entropy of
            originals (0) and simplifications (1). Pairs say nothing about the level of f, so it is set afterwards: its mean
            over all training texts is 0, as for balanced labels, which is where a sigmoid tells most.
        l2: strength of the penalty on the weights.
        length_debias: score the residual of f on the logarithm of the number of words.
        clip: scores are held within plus and minus this.
    """

    def __init__(
        self,
        encoder: Callable[[Sequence[str]], Any] | Literal["tfidf"] = "tfidf",
        loss: Literal["pairwise", "bce"] = "pairwise",
        *,
        l2: float = 1.0,
        length_debias: bool = False,
        clip: float = 5.0,
    ) -> None:
        if encoder != "tfidf" and not callable(encoder):
            raise ConfigError(f"encoder must be 'tfidf' or a function from texts to features, got {encoder!r}")
        if loss not in ("pairwise", "bce"):
            raise ConfigError(f"loss must be 'pairwise' or 'bce', got {loss!r}")
        if not l2 > 0 or not clip > 0:
            raise ConfigError(f"l2 and clip must be positive, got {l2!r} and {clip!r}")
        self.encoder, self.loss, self.l2, self.length_debias, self.clip = encoder, loss, l2, length_debias, clip
        self._vectoriser: Any = None
        self._model: Any = None
        self._line: tuple[float, float] = (0.0, 0.0)

    def fit(
        self, originals: Sequence[str], simplified: Sequence[str], groups: Sequence[Any] | None = None
    ) -> StyleDiscriminator:
        """Learn from pairs.

        Args:
            originals, simplified: ``n`` pairs.
            groups: the page of each pair; given only to be checked by :meth:`evaluate` for leaks.

        Raises:
            DataError: no pairs, or lists of different lengths.
            MissingDependency: scikit-learn is not installed.
        """
        if len(originals) != len(simplified) or len(originals) < 2:
            raise DataError(
                f"fitting needs at least two pairs, got {len(originals)} originals and {len(simplified)} rewritings"
            )
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise MissingDependency("the discriminator needs scikit-learn: pip install 'guerdon[routers]'") from error
        if self.encoder == "tfidf":
            self._vectoriser = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit([*originals, *simplified])
        self._groups = None if groups is None else frozenset(groups)
        a, b = self._features(originals), self._features(simplified)
        if self.loss == "pairwise":
            # A difference and its negative: logistic regression without an intercept is the Bradley-Terry model.
            x = _stack([b - a, a - b])
            y = np.r_[np.ones(len(originals)), np.zeros(len(originals))]
            model = LogisticRegression(C=1.0 / self.l2, fit_intercept=False, max_iter=1000)
        else:
            x, y = _stack([a, b]), np.r_[np.zeros(len(originals)), np.ones(len(originals))]
            model = LogisticRegression(C=1.0 / self.l2, max_iter=1000)
        self._model = model.fit(x, y)
        texts = [*originals, *simplified]
        if self.length_debias:
            slope, shift = np.polyfit(_log_length(texts), self._raw(texts), 1)
            self._line = (float(slope), float(shift))
        else:
            self._line = (0.0, float(self._raw(texts).mean()) if self.loss == "pairwise" else 0.0)
        return self

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """``[B]`` float64, within plus and minus ``clip``.

        Raises:
            ConfigError: not fitted.
        """
        if self._model is None:
            raise ConfigError("the discriminator is not fitted; call fit first")
        if not len(texts):
            return np.zeros(0)
        slope, shift = self._line
        return np.clip(self._raw(texts) - slope * _log_length(texts) - shift, -self.clip, self.clip)

    def evaluate(
        self,
        originals: Sequence[str],
        simplified: Sequence[str],
        groups: Sequence[Any] | None = None,
        *,
        tolerance: float = 0.1,
    ) -> dict[str, float]:
        """Area under the curve on held-out pairs, plainly and between texts of like length.

        Args:
            originals, simplified: texts.
            groups: pages; one that was in :meth:`fit` is a leak and is refused.
            tolerance: texts are alike in length within this share.

        Returns:
            ``auc``, ``auc_length_matched`` (NaN without such pairs), ``pairs`` (share of pairs in the right order).

        Raises:
            DataError: a leak.
        """
        if groups is not None and self._groups is not None and self._groups & set(groups):
            raise DataError(f"page {sorted(map(str, self._groups & set(groups)))[0]!r} was in training; split by page")
        a, b = self.score(originals), self.score(simplified)
        la, lb = (np.array([max(1, len(t.split())) for t in texts]) for texts in (originals, simplified))
        near = np.abs(lb[:, None] - la[None]) <= tolerance * np.maximum(lb[:, None], la[None])
        wins = (b[:, None] > a[None]) + 0.5 * (b[:, None] == a[None])
        paired = float((b > a).mean()) if len(a) == len(b) else float("nan")
        return {
            "auc": auc(b.tolist(), a.tolist()),
            "auc_length_matched": float(wins[near].mean()) if near.any() else float("nan"),
            "pairs": paired,
        }

    def _features(self, texts: Sequence[str]) -> Any:
        if self._vectoriser is not None:
            return self._vectoriser.transform(texts)
        rows = self.encoder(texts)  # type: ignore[operator]
        return np.asarray(rows.detach().cpu() if hasattr(rows, "detach") else rows, dtype=np.float64)

    def _raw(self, texts: Sequence[str]) -> np.ndarray:
        return np.asarray(self._model.decision_function(self._features(texts)), dtype=np.float64)


def _stack(parts: Sequence[Any]) -> Any:
    if hasattr(parts[0], "tocsr"):
        from scipy.sparse import vstack

        return vstack(parts).tocsr()
    return np.concatenate(parts)


def _log_length(texts: Sequence[str]) -> np.ndarray:
    return np.log([max(1, len(t.split())) for t in texts])
