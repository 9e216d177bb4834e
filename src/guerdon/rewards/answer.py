"""Is the answer right? Exact match and token F1 after normalisation."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from guerdon.errors import ConfigError, DataError
from guerdon.rewards.base import OnError, Reward
from guerdon.rewards.grammar import last_block
from guerdon.types import Trajectory, policy_text, response_text

__all__ = ["ExactMatch", "TokenF1", "exact_match", "gold_answers", "normalise_answer", "token_f1"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED = frozenset({"yes", "no", "noanswer"})


def normalise_answer(text: str) -> str:
    """Lower case, ASCII punctuation deleted, the words a, an and the dropped, blanks collapsed; in that order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def gold_answers(reference: Any, task_id: str = "") -> list[str]:
    """The accepted answers as a list of strings.

    Raises:
        DataError: there is none, one is blank, or the reference is of another kind.
    """
    where = f" of task {task_id!r}" if task_id else ""
    if isinstance(reference, str | int | float) and not isinstance(reference, bool):
        reference = (reference,)
    if not isinstance(reference, Iterable) or isinstance(reference, bytes | Mapping):
        raise DataError(f"the reference{where} must be an answer or a list of answers, got {type(reference).__name__}")
    golds = []
    for gold in reference:
        if isinstance(gold, bool) or not isinstance(gold, str | int | float):
            raise DataError(f"a gold answer{where} must be text or a number, got {type(gold).__name__}")
        if not str(gold).strip():
            raise DataError(f"a gold answer{where} is blank; every empty answer would be right")
        golds.append(str(gold))
    if not golds:
        raise DataError(f"the list of gold answers{where} is empty; give at least one")
    return golds


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1.0 where the normalised answer equals a normalised gold, else 0.0."""
    normal = normalise_answer(answer)
    return float(any(normal == normalise_answer(g) for g in golds))


def token_f1(answer: str, golds: Sequence[str]) -> float:
    """Best harmonic mean of token precision and recall over the golds, on normalised words.

    Where either side is yes, no or noanswer and they differ, 0.
    """
    return max(_f1(normalise_answer(answer), normalise_answer(g)) for g in golds)


def _f1(answer: str, gold: str) -> float:
    if answer != gold and (answer in _CLOSED or gold in _CLOSED):
        return 0.0
    a, g = answer.split(), gold.split()
    common = sum((Counter(a) & Counter(g)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(a), common / len(g)
    return 2 * precision * recall / (precision + recall)


class _Answer(Reward):
    """Reads the last ``<tag>`` block and compares it with the golds in ``task.reference``."""

    gives = frozenset({"outcome"})
    range = (0.0, 1.0)

    def __init__(
        self,
        *,
        tag: str | None = "answer",
        scope: Literal["policy", "response"] = "policy",
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if scope not in ("policy", "response"):
            raise ConfigError(f"scope must be 'policy' or 'response', got {scope!r}")
        self.tag, self.scope = tag, scope

    def answer(self, trajectory: Trajectory) -> str | None:
        """The answer of a trajectory, or None where there is none."""
        text = policy_text(trajectory) if self.scope == "policy" else response_text(trajectory)
        return text.strip() if self.tag is None else last_block(text, self.tag)

    def score_one(self, trajectory: Trajectory) -> float:
        golds = gold_answers(trajectory.task.reference, trajectory.task.id)
        answer = self.answer(trajectory)
        return 0.0 if answer is None else self.compare(answer, golds)

    def compare(self, answer: str, golds: Sequence[str]) -> float:
        raise TypeError(f"{type(self).__name__} must override compare")


class ExactMatch(_Answer):
    """1 where the normalised last answer equals a gold, else 0; no answer block scores 0.

    Args:
        tag: block to read; ``None`` compares the whole text.
        scope: ``"policy"`` reads what the policy wrote; an answer block in an environment turn never counts.
            ``"response"`` reads policy and environment alike, as released Router-R1 code does.

    Source: Router-R1 (arXiv 2506.09033); normalisation of SQuAD (Rajpurkar et al. 2016).
    """

    def compare(self, answer: str, golds: Sequence[str]) -> float:
        """See :func:`exact_match`."""
        return exact_match(answer, golds)


class TokenF1(_Answer):
    """Token F1 of the last answer against the best gold, in [0, 1]; no answer block scores 0.

    Arguments and source as for :class:`ExactMatch`.
    """

    def compare(self, answer: str, golds: Sequence[str]) -> float:
        """See :func:`token_f1`."""
        return token_f1(answer, golds)
