"""Rule outcomes in [0, 1] by the type of a task, behind a format gate: numbers, choices, read text, free text.

Source: Fan et al. 2025, "SophiaVL-R1" (arXiv 2505.17018), outcome reward and its released code.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from guerdon.errors import DataError
from guerdon.rewards.answer import gold_answers
from guerdon.rewards.base import OnError, Reward
from guerdon.rewards.expression import same_answer
from guerdon.rewards.overlap import rouge, word_error_rate
from guerdon.types import Score, Trajectory, policy_text

__all__ = ["TypedOutcome", "think_then_answer"]


def think_then_answer(text: str) -> tuple[str, str] | None:
    """Thought and answer of ``<think>...</think>...<answer>...</answer>...``, or None where the text is not of that form.

    It must begin with the thought, which ends at its first closing tag; of several answers the last counts.
    """
    thought = text.find("</think>") if text.startswith("<think>") else -1
    opened = text.rfind("<answer>", thought, max(text.rfind("</answer>"), 0)) if thought >= 0 else -1
    if opened < 0:
        return None
    return text[len("<think>") : thought], text[opened + len("<answer>") : text.find("</answer>", opened)]


class TypedOutcome(Reward):
    """The outcome by ``task.meta["type"]``; 0 where the response is not a thought and then an answer.

    ``"numerical"``: 1 if the answer equals a gold. ``"multiple choice"``: 1 if the letters, separated by commas, are
    those of the gold, each once. ``"ocr"``: ``exp(-word error rate)``. ``"free-form"``: the mean of ROUGE-1, -2 and -L.
    Dollar signs are dropped on both sides first. With several golds the best counts. The part ``format`` says whether
    the gate was passed.

    Args:
        equal: whether an answer equals a gold, for numbers; by default after normalisation, or as exact fractions. Pass
            a symbolic verifier for more.
        stem: see :func:`~guerdon.rewards.overlap.rouge`; needs the extra ``text``, as published.
        key: name of the type in ``task.meta``.

    The paper writes minus the word error rate, its code the exponential, which keeps every outcome in [0, 1]. The code
    also takes a letter said twice for two letters.

    Raises:
        DataError (as ``on_error`` says): an unknown type, or no gold.
    """

    range = (0.0, 1.0)
    gives = frozenset({"outcome"})

    def __init__(
        self,
        *,
        equal: Callable[[str, str], bool] = same_answer,
        stem: bool = True,
        key: str = "type",
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name or "typed_outcome", on_error=on_error)
        self._equal, self._stem, self.key = equal, stem, key

    def score_one(self, trajectory: Trajectory) -> Score:
        kind = str(trajectory.task.meta.get(self.key, "")).lower()
        measure = {
            "numerical": lambda answer, gold: float(self._equal(answer, gold)),
            "multiple choice": _choices,
            "ocr": lambda answer, gold: math.exp(-word_error_rate(answer, gold)),
            "free-form": self._free,
        }.get(kind)
        if measure is None:
            raise DataError(
                f"task {trajectory.task.id!r} has meta[{self.key!r}] = {kind!r}; it must be numerical, multiple choice, "
                "ocr or free-form"
            )
        golds = gold_answers(trajectory.task.reference, trajectory.task.id)
        parts = think_then_answer(policy_text(trajectory).replace("$", ""))
        if parts is None:
            return Score(0.0, parts={"format": 0.0})
        answer = parts[1].strip()
        return Score(max(measure(answer, gold.replace("$", "").strip()) for gold in golds), parts={"format": 1.0})

    def _free(self, answer: str, gold: str) -> float:
        return rouge(answer, gold, stem=self._stem)


def _choices(answer: str, gold: str) -> float:
    said, wanted = ([part.strip() for part in text.split(",")] for text in (answer, gold))
    return float(sorted(said) == sorted(set(wanted)))
