"""Does a response say where its statements come from, and do the sources say so?

Source: the two measures of ALCE (Gao et al. 2023, arXiv 2305.14627), with word overlap where it asks an entailment model;
pass that model as ``supports`` for the published ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from guerdon.errors import ConfigError, DataError
from guerdon.rewards.base import OnError, Reward
from guerdon.rewards.grammar import last_block
from guerdon.types import Score, Trajectory, policy_text

__all__ = ["Citations", "read_statements"]

_MARK = re.compile(r"\[(\d{1,4}(?:\s*[,;]\s*\d{1,4}){0,20})\]")
_END = re.compile(r"(?<=[.!?])(?=\s)|\n+")
_LED = re.compile(r"(?:\s*\[\d{1,4}(?:\s*[,;]\s*\d{1,4}){0,20}\])+")
_WORD = re.compile(r"[^\W_]+")
_LONG = 3

Supports = Callable[[str, str], bool]


def read_statements(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """Sentences of a text with the marks that they cite: ``"It rains [1, 2]."`` gives ``("It rains .", ("1", "2"))``.

    Marks that follow a sentence's full stop belong to it. Pieces without a letter or digit are no statements.
    """
    pieces: list[str] = []
    for piece in _END.split(text):
        led = _LED.match(piece) if pieces else None
        if led is not None:
            pieces[-1] += led.group()
            piece = piece[led.end() :]
        pieces.append(piece)
    out = []
    for piece in pieces:
        marks = [m for group in _MARK.findall(piece) for m in re.split(r"\s*[,;]\s*", group)]
        said = " ".join(_MARK.sub("", piece).split())
        if _WORD.search(said):
            out.append((said, tuple(dict.fromkeys(str(int(m)) for m in marks))))
    return out


class Citations(Reward):
    """Harmonic mean of citation recall and precision, in [0, 1].

    Recall is the share of statements that their cited sources support together; precision the share of citations whose
    source alone supports the statement. A citation of a source that does not exist supports nothing.

    Args:
        supports: whether a passage supports a statement; by default at least ``threshold`` of the statement's words of more
            than three letters, and of its numbers, occur in the passage.
        threshold: of the default.
        key: ``task.meta[key]`` holds the sources: a list of texts, cited as ``[1]``, ``[2]``, ..., or a mapping from the
            number to the text. Without the key they are the task's reference.
        tag: read only the last block of this tag.

    A response without statements gives 0. Parts: ``recall``, ``precision``, ``statements``, ``citations``, ``unknown`` (citations of
    no source). No source, or one that is no text, is an error.
    """

    range = (0.0, 1.0)
    gives = frozenset({"outcome"})

    def __init__(
        self,
        supports: Supports | None = None,
        *,
        threshold: float = 0.6,
        key: str = "sources",
        tag: str | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if supports is not None and not callable(supports):
            raise ConfigError(
                f"supports must be a function of a statement and a passage, got {type(supports).__name__}"
            )
        if isinstance(threshold, bool) or not 0 < threshold <= 1:
            raise ConfigError(f"threshold must be in (0, 1], got {threshold!r}")
        self._supports, self.threshold, self.key, self.tag = supports, float(threshold), key, tag

    def score_one(self, trajectory: Trajectory) -> Score:
        sources = self._sources(trajectory)
        words = {mark: _words(text) for mark, text in sources.items()}
        whole = policy_text(trajectory)
        text = whole if self.tag is None else last_block(whole, self.tag) or ""
        statements = read_statements(text)
        supported = right = cited = unknown = 0
        for said, marks in statements:
            known = [m for m in marks if m in sources]
            cited += len(marks)
            unknown += len(marks) - len(known)
            alone = [self._holds(said, [m], sources, words) for m in known]
            right += sum(alone)
            supported += any(alone) or (len(known) > 1 and self._holds(said, known, sources, words))
        recall = supported / len(statements) if statements else 0.0
        precision = right / cited if cited else 0.0
        value = 2 * recall * precision / (recall + precision) if recall + precision else 0.0
        counts = {"statements": len(statements), "citations": cited, "unknown": unknown}
        return Score(
            value, parts={"recall": recall, "precision": precision, **{k: float(n) for k, n in counts.items()}}
        )

    def _holds(
        self, said: str, marks: Sequence[str], sources: Mapping[str, str], words: Mapping[str, frozenset[str]]
    ) -> bool:
        if self._supports is not None:
            return bool(self._supports(said, "\n".join(sources[m] for m in marks)))
        mine = _words(said)
        there = frozenset().union(*(words[m] for m in marks))
        return bool(mine) and len(mine & there) >= self.threshold * len(mine)

    def _sources(self, trajectory: Trajectory) -> dict[str, str]:
        given: Any = trajectory.task.meta.get(self.key, trajectory.task.reference)
        if isinstance(given, Mapping):
            made = {str(mark): text for mark, text in given.items()}
        elif isinstance(given, Sequence) and not isinstance(given, str | bytes):
            made = {str(k): text for k, text in enumerate(given, 1)}
        else:
            made = {}
        if not made or not all(isinstance(text, str) and text.strip() for text in made.values()):
            raise DataError(
                f"task {trajectory.task.id!r} needs sources: texts under meta[{self.key!r}], or as its reference, none blank"
            )
        return made


def _words(text: str) -> frozenset[str]:
    return frozenset(w for w in _WORD.findall(text.lower()) if len(w) > _LONG or w.isdecimal())
