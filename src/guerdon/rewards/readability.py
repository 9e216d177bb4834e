"""Plain language: reading grade, word frequency, what must survive a rewriting, and their combination with a style score.

Source: Rahman et al. 2024, "Health Text Simplification" (arXiv 2401.15043), and the readability rewards that it compares
with. Constants that the paper does not give (target grade 6, the product with relevance) are arguments.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from guerdon.errors import ConfigError, MissingDependency
from guerdon.rewards.base import OnError, Reward
from guerdon.rewards.plain import RewardBatch, TextReward
from guerdon.types import Score, StopReason, Task, Trajectory, Turn, policy_text

__all__ = [
    "FKGLReward",
    "GuardedProduct",
    "PreservationGate",
    "ZipfSimplicity",
    "clean_rewriting",
    "fkgl",
    "kept_facts",
    "syllables",
    "zipf_simplicity",
]

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE = re.compile(r"[.!?]+(?=\s|$|[\"')\]])")


@functools.lru_cache(maxsize=1)
def _hyphenation() -> Any:
    try:
        import pyphen
    except ImportError as error:
        raise MissingDependency("syllables are counted with pyphen: pip install 'guerdon[text]'") from error
    return pyphen.Pyphen(lang="en_US")


@functools.lru_cache(maxsize=50_000)
def syllables(word: str) -> int:
    """Syllables of an English word, at least 1: its hyphenation points plus 1, or its groups of vowels if these are more.

    Hyphenation dictionaries leave out points near a word's ends ("area"), which the vowels make good.
    """
    points = len(_hyphenation().positions(word.lower())) + 1
    lower = word.lower()
    silent = re.search(r"[^aeiouy]e$", lower) and not re.search(r"[^aeiouy]le$", lower)
    groups = len(re.findall(r"[aeiouy]+", lower)) - (1 if silent else 0)
    return max(1, points, groups)


def words_of(text: str) -> list[str]:
    """Alphabetic tokens."""
    return _WORD.findall(text)


def fkgl(text: str) -> float:
    """Flesch-Kincaid grade level: ``0.39 words / sentences + 11.8 syllables / words - 15.59``; NaN for a text without words.

    A text without a full stop is one sentence.
    """
    words = words_of(text)
    if not words:
        return math.nan
    sentences = max(1, len(_SENTENCE.findall(text)) + bool(words_of(_SENTENCE.split(text)[-1])))
    return 0.39 * len(words) / sentences + 11.8 * sum(map(syllables, words)) / len(words) - 15.59


class _Rewriting(Reward):
    """A reward of a rewriting beside its source: the task's question, or ``reward(sources, outputs)``."""

    range = (0.0, 1.0)
    gives = frozenset({"outcome"})

    def score_pair(self, source: str, output: str) -> Score | float:
        """Score one rewriting."""
        raise TypeError(f"{type(self).__name__} must override score_pair")

    def score_one(self, trajectory: Trajectory) -> Any:
        return self.score_pair(source_of(trajectory), policy_text(trajectory))

    def __call__(self, trajectories: Any, outputs: Any = None, *, progress: Any = None) -> Any:
        """Score trajectories, or sources with their rewritings (``[B]`` float64)."""
        if outputs is None:
            return super().__call__(trajectories, progress=progress)
        scores = super().__call__(pair_trajectories(trajectories, outputs))
        return np.array([s.value for s in scores], dtype=np.float64)


def source_of(trajectory: Trajectory) -> str:
    """The text that is rewritten: ``task.meta["source"]``, else the task's question."""
    return str(trajectory.task.meta.get("source") or trajectory.task.question)


def pair_trajectories(sources: Sequence[str], outputs: Sequence[str]) -> list[Trajectory]:
    """Rewritings as trajectories."""
    if isinstance(sources, str) or isinstance(outputs, str) or len(sources) != len(outputs):
        raise ConfigError("give two lists of one length: sources and outputs")
    return [
        Trajectory(Task(f"text-{k}", s), (Turn("policy", t),), StopReason.DONE)
        for k, (s, t) in enumerate(zip(sources, outputs, strict=True))
    ]


class FKGLReward(_Rewriting):
    """How much of the way from the source's grade to the target a rewriting goes, in [0, 1].

    ``clip((FKGL(x) - FKGL(y)) / max(FKGL(x) - target, 1), 0, 1)``; a text without words, on either side, gives 0.

    Args:
        target: grade.
    """

    def __init__(self, target: float = 6.0, *, name: str | None = None, on_error: OnError = "raise") -> None:
        super().__init__(name=name, on_error=on_error)
        if not math.isfinite(target):
            raise ConfigError(f"target must be a finite grade, got {target!r}")
        self.target = float(target)

    def score_pair(self, source: str, output: str) -> Score:
        before, after = fkgl(source), fkgl(output)
        if math.isnan(before) or math.isnan(after):
            return Score(0.0)
        value = (before - after) / max(before - self.target, 1.0)
        return Score(min(1.0, max(0.0, value)), parts={"grade": after})


def zipf_simplicity(text: str, language: str = "en", *, content: Callable[[str], bool] | None = None) -> float:
    """Mean Zipf frequency (0 to 8) of a text's content words over 8; 0 without any.

    Args:
        text: a text.
        language: of wordfreq.
        content: which words count; by default those of more than three letters.
    """
    try:
        from wordfreq import zipf_frequency
    except ImportError as error:
        raise MissingDependency("word frequencies come from wordfreq: pip install 'guerdon[text]'") from error
    keep = content or (lambda w: len(w) > 3)
    found = [zipf_frequency(w.lower(), language) for w in words_of(text) if keep(w)]
    return min(1.0, max(0.0, sum(found) / len(found) / 8.0)) if found else 0.0


class ZipfSimplicity(TextReward):
    """:func:`zipf_simplicity` of the response.

    Args:
        language, content: see there.
    """

    range = (0.0, 1.0)
    gives = frozenset({"outcome"})

    def __init__(
        self,
        language: str = "en",
        *,
        content: Callable[[str], bool] | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        self.language, self._content = language, content

    def score_text(self, text: str) -> float:
        return zipf_simplicity(text, self.language, content=self._content)


_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
# Only a comma before three digits separates thousands: "1,5" is no 15.
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NEGATION = re.compile(r"\b(?:not|no|never|none|without|cannot|nor|neither)\b|n['’]t\b", re.IGNORECASE)


def kept_facts(source: str, output: str, *, numbers: bool = True, negation: bool = True) -> bool:
    """Whether every number of the source is in the output, as often, and negations are there if and only if they were."""
    if numbers:
        want, got = (Counter(_THOUSANDS.sub("", n) for n in _NUMBER.findall(t)) for t in (source, output))
        if any(got[n] < c for n, c in want.items()):
            return False
    return not negation or bool(_NEGATION.search(source)) == bool(_NEGATION.search(output))


class PreservationGate(_Rewriting):
    """1 where numbers (doses, ages) and negations survive the rewriting, else 0; see :func:`kept_facts`.

    Args:
        numbers, negation: what is checked.
        further: another check of ``(source, output)``, of names for example.
    """

    def __init__(
        self,
        numbers: bool = True,
        negation: bool = True,
        *,
        further: Callable[[str, str], bool] | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        self.numbers, self.negation, self._further = numbers, negation, further

    def score_pair(self, source: str, output: str) -> float:
        kept = kept_facts(source, output, numbers=self.numbers, negation=self.negation)
        return float(kept and (self._further is None or bool(self._further(source, output))))


class GuardedProduct(Reward):
    """``sigmoid(style) * max(relevance, 0)^k``, 0 behind a closed gate or for a blank output: simple is not enough.

    A style score does not see the source, so that any simple text would win; relevance to the source is the guard.

    Args:
        style: a reward of the output, or a function of ``B`` texts giving ``[B]`` scores (a fitted discriminator's
            ``score``).
        relevance: a reward, or a function of ``(sources, outputs)``; for example
            :class:`~guerdon.rewards.EmbeddingRelevance` with ``normalise=True``.
        k: power of the relevance; 0 leaves the guard out.
        gate: a reward or function of ``(sources, outputs)`` that is 1 where facts survive; health text should use one.
        combine: ``"product"``, or ``"sum"`` for ``weights[0] * sigmoid(style) + weights[1] * relevance``.
        squash: pass style scores through a sigmoid; False for scores in [0, 1].
        clip: style scores are held within plus and minus this first.
        improvement: take the style of the output minus that of the source: how much was gained, not how easy it is.

    Parts: ``style``, ``relevance``, ``gate``. ``guarded(sources, outputs)`` gives a
    :class:`~guerdon.rewards.RewardBatch`.
    """

    gives = frozenset({"outcome"})

    def __init__(
        self,
        style: Any,
        relevance: Any,
        k: float = 1.0,
        gate: Any = None,
        *,
        combine: Literal["product", "sum"] = "product",
        weights: tuple[float, float] = (0.5, 0.5),
        squash: bool = True,
        clip: float = 5.0,
        improvement: bool = False,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if improvement and not squash:
            raise ConfigError("improvement needs squash=True: a difference of scores is not in [0, 1]")
        if not 0 <= k < math.inf or not clip > 0:
            raise ConfigError(f"k must be finite and >= 0 and clip positive, got {k!r} and {clip!r}")
        if combine not in ("product", "sum"):
            raise ConfigError(f"combine must be 'product' or 'sum', got {combine!r}")
        self.style, self.relevance, self.gate, self.k = style, relevance, gate, float(k)
        self.combine, self.weights, self.squash, self.clip = combine, weights, squash, float(clip)
        self.improvement = improvement

    def values(self, sources: Sequence[str], outputs: Sequence[str]) -> RewardBatch:
        """Score lists."""
        made = pair_trajectories(sources, outputs)
        style = _column(self.style, made, (outputs,))
        if self.improvement:
            style = style - _column(self.style, pair_trajectories(sources, sources), (sources,))
        relevance = np.maximum(_column(self.relevance, made, (sources, outputs)), 0.0)
        gate = np.ones(len(outputs)) if self.gate is None else _column(self.gate, made, (sources, outputs))
        said = np.clip(style, -self.clip, self.clip)
        said = 1 / (1 + np.exp(-said)) if self.squash else style
        if self.combine == "product":
            total = said * relevance**self.k
        else:
            total = self.weights[0] * said + self.weights[1] * relevance
        blank = np.array([not t.strip() for t in outputs], dtype=bool)
        total = np.where(blank | (gate == 0), 0.0, total)
        return RewardBatch(total, {"style": style, "relevance": relevance, "gate": gate})

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Score a batch."""
        batch = self.values([source_of(t) for t in trajectories], [policy_text(t) for t in trajectories])
        return [
            Score(float(v), parts={name: float(p[k]) for name, p in batch.parts.items()})
            for k, v in enumerate(batch.total)
        ]

    def __call__(self, trajectories: Any, outputs: Any = None, *, progress: Any = None) -> Any:
        """See the class."""
        if outputs is None:
            return super().__call__(trajectories, progress=progress)
        return self.values(trajectories, outputs)


_MARKERS = re.compile(
    r"<\|[^|<>\n]{1,40}\|>(?:\s*assistant\b)?|</?s>|\[/?INST\]|<</?SYS>>|<eos>|<pad>|^\s*(?:assistant|output|simplified(?: text)?)\s*:",
    re.IGNORECASE,
)


def clean_rewriting(output: str, instruction: str = "", *, first_paragraph: bool = True) -> str:
    """What a chat model wrote without what it wrote around it.

    Args:
        output: as generated.
        instruction: removed where the output begins with it (an echo).
        first_paragraph: drop what follows the first blank line: comments on the rewriting.

    Returns:
        The text without markers of chat templates and without blanks at its ends; may be empty.
    """
    text = output.strip()
    echo = instruction.strip()
    if echo and text.startswith(echo):
        text = text[len(echo) :]
    # A label such as "Output:" may stand behind a marker that hides the beginning.
    text = _MARKERS.sub("", _MARKERS.sub(" ", text).strip()).strip()
    return re.split(r"\n[ \t]*\n", text, maxsplit=1)[0].strip() if first_paragraph else text


def _column(part: Any, made: Sequence[Trajectory], plain: tuple[Sequence[str], ...]) -> np.ndarray:
    if isinstance(part, Reward):
        return np.array([s.value for s in part(made)], dtype=np.float64)
    return np.asarray(part(*plain), dtype=np.float64)
