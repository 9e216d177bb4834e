"""The reasoning pattern reward: does a text use the phrases of somebody who reasons? The answer is never checked.

Source: Lv et al. 2025, "The Climb Carves Wisdom Deeper Than the Summit" (arXiv 2505.22653) and its released code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from guerdon.errors import ConfigError
from guerdon.rewards.base import OnError
from guerdon.rewards.grammar import boxed
from guerdon.rewards.plain import TextReward
from guerdon.rewards.repetition import repetition_ratio
from guerdon.types import Score

__all__ = ["MATH_PHRASES", "OPEN_PHRASES", "PhraseReward", "ThinkAnswer", "think_answer"]

# fmt: off
MATH_PHRASES: tuple[str, ...] = (
    "i need to", "we need to", "wait", "alternatively", "let me check", "let me see", "let's focus on",
    "we know that", "we can observe ", "we can see ", "let me try", "let's try", "let us try", "first, ", "firstly, ",
    "next, ", "finally, ", "let us first", "let's first", "let me first", "try again", "still not", "not working",
    "not correct", "does not work", "doesn't work", "makes sence", "since we ", "because we ", "consequently",
    "as a result", "thus", "therefore", "hence", "so that", "thereby", "if we", "given there ", "for instance ",
    "for example ",
)
"""The 40 phrases for mathematics; trailing spaces belong to the phrase, and "makes sence" is spelled as published."""

OPEN_PHRASES: tuple[str, ...] = (
    *MATH_PHRASES,
    "1. ", "2. ", "3. ", "4. ", "step 1 ", "step 2 ", "step 3. ", "step 4 ", "considering the", "i'll", "i will",
    "i would", "i should",
)
"""The 53 phrases for open-ended tasks."""
# fmt: on


_THINK = "<think>"


class PhraseReward(TextReward):
    """``max(0, min(1, k / divisor) - rho - u)`` with k the number of *distinct* phrases that occur in a response.

    ``rho`` is :func:`~guerdon.rewards.repetition.repetition_ratio` over ``ngram`` words and ``u`` the number of
    occurrences of ``stop_marker`` (the policy plays the user). All three read the lower-cased text behind the first
    ``think_tag``, or the whole response where the tag is absent (prompts often end with it).

    Args:
        phrases: compared lower-cased, as plain substrings: "enthusiasm" contains "thus".
        divisor: number of phrases that earns 1.
        ngram: words per n-gram of the repetition penalty.
        stop_marker: ``None`` or ``""`` leaves that penalty out, as on open-ended tasks.
        think_tag: ``None`` reads the whole text.
        word_boundary: a phrase must begin and end at word boundaries; not the published rule.
        answer: reads the answer out of a response; one of which it gives ``None`` or blanks earns 0. ``"boxed"`` is
            the last balanced box of the response alone (a box in the prompt never counts): set it where this is the
            only reward on mathematics, as in the paper. ``None`` does not ask for an answer.

    A score lies in [0, 1]; its parts are ``phrases`` (k), ``repetition``, ``stop_marker`` (occurrences) and
    ``extracted``.

    Raises:
        ConfigError: no phrases, a blank one, a divisor that is not positive and finite, or ``ngram`` below 1.

    Source: Lv et al. 2025 (arXiv 2505.22653), section 4 and released code.
    """

    range = (0.0, 1.0)

    def __init__(
        self,
        phrases: Sequence[str] = MATH_PHRASES,
        divisor: float = 20.0,
        ngram: int = 20,
        stop_marker: str | None = "user: ",
        *,
        think_tag: str | None = _THINK,
        word_boundary: bool = False,
        answer: Callable[[str], str | None] | Literal["boxed"] | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if isinstance(phrases, str):
            raise ConfigError(f"phrases must be a list of strings, got the single string {phrases!r}")
        self.phrases = tuple(dict.fromkeys(phrase.lower() for phrase in phrases))
        if not self.phrases or any(not phrase.strip() for phrase in self.phrases):
            raise ConfigError("phrases must hold at least one phrase and no blank one")
        if isinstance(divisor, bool) or not 0 < divisor < float("inf"):
            raise ConfigError(f"divisor must be positive and finite, got {divisor!r}")
        if isinstance(answer, str) and answer != "boxed":
            raise ConfigError(f"answer must be 'boxed', a function of the response, or None, got {answer!r}")
        repetition_ratio("", ngram)
        self.divisor, self.ngram = float(divisor), ngram
        self.stop_marker = (stop_marker or "").lower()
        self.think_tag = think_tag
        self._answer: Callable[[str], str | None] | None = boxed if isinstance(answer, str) else answer
        self._bounded = (
            [re.compile(rf"(?<!\w){re.escape(p.strip())}(?!\w)") for p in self.phrases] if word_boundary else None
        )

    def found(self, text: str) -> tuple[str, ...]:
        """The phrases that occur in a response, in the order of the list."""
        return self._found(self._read(text))

    def score_text(self, text: str) -> Score:
        read = self._read(text)
        count = len(self._found(read))
        repetition = repetition_ratio(read, self.ngram)
        marks = read.count(self.stop_marker) if self.stop_marker else 0
        answer = self._answer(text) if self._answer is not None else "not asked for"
        extracted = answer is not None and bool(answer.strip())
        value = max(0.0, min(1.0, count / self.divisor) - repetition - marks) if extracted else 0.0
        parts = {"phrases": count, "repetition": repetition, "stop_marker": marks, "extracted": extracted}
        return Score(value, parts={key: float(part) for key, part in parts.items()})

    def _found(self, read: str) -> tuple[str, ...]:
        if self._bounded is None:
            return tuple(phrase for phrase in self.phrases if phrase in read)
        return tuple(p for p, pattern in zip(self.phrases, self._bounded, strict=True) if pattern.search(read))

    def _read(self, text: str) -> str:
        if not self.think_tag:
            return text.lower()
        _, tag, behind = text.partition(self.think_tag)
        return (behind if tag else text).lower()


@dataclass(frozen=True, slots=True)
class ThinkAnswer:
    """The two parts of a well-formed response, stripped."""

    think: str
    answer: str


def think_answer(text: str, *, opened: bool = False) -> ThinkAnswer | None:
    """Thought and answer of an open-ended response, or None where it is malformed.

    The last ``<think>``, ``</think>``, ``<answer>`` and ``</answer>`` must all be there, in this order, and
    neither part may be blank.

    Args:
        text: the response, without its prompt.
        opened: the prompt ended with ``<think>``, so the response need not hold it.

    Source: Lv et al. 2025 (arXiv 2505.22653), released code for open-ended tasks. A reward model should see the
    answer alone, and :class:`PhraseReward` (``OPEN_PHRASES``, no stop marker, ``think_tag=None``) both parts.
    """
    if opened:
        text = _THINK + text
    places = [(text.rfind(tag), len(tag)) for tag in (_THINK, "</think>", "<answer>", "</answer>")]
    if any(start < 0 for start, _ in places):
        return None
    (a, len_a), (b, len_b), (c, len_c), (d, _) = places
    if not (a + len_a <= b and b + len_b <= c and c + len_c <= d):
        return None
    think, answer = text[a + len_a : b].strip(), text[c + len_c : d].strip()
    return ThinkAnswer(think, answer) if think and answer else None
