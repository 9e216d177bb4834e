"""Short answers: choices, yes or no, and numbers within a tolerance.

Source: Xu et al. 2025, "Mixed-R1" (arXiv 2505.24164); the constants of the chart reward are ChartQA's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from guerdon.errors import ConfigError, DataError
from guerdon.rewards.base import OnError
from guerdon.rewards.referenced import AnswerReward

__all__ = ["ChoiceMatch", "RelaxedNumber", "choice_letter", "read_number"]

_LETTER = re.compile(
    r"(?:option|choice)?\s*[(\[]?\s*([A-Za-z])\s*(?:[)\]](?:\s*[.:].*|\s.*)?|[.:].*)?\Z", re.DOTALL | re.IGNORECASE
)


def choice_letter(text: str) -> str | None:
    """The letter that an answer gives ("B", "(B)", "B.", "B: text", "option B"), upper case; None for anything else."""
    found = _LETTER.match(text.strip())
    return found.group(1).upper() if found else None


def _plain(text: str) -> str:
    return " ".join(text.strip().lower().rstrip(".,;:!?").split())


_GOLD = re.compile(
    r"(?:(?:option|choice)\s+)?[(\[]?\s*([A-Za-z])\s*[)\]]?\s*[.,;:!?]?\s*\Z|[(\[]?([A-Za-z])(?:[)\]][.:]?|[.:])\s+(\S.*)\Z",
    re.DOTALL | re.IGNORECASE,
)


def _gold_letter(gold: str) -> tuple[str | None, str]:
    """Letter and text of a gold such as "B", "(B)", "option B" or "B: a red square"; (None, "") for other golds."""
    found = _GOLD.match(gold.strip())
    if found is None:
        return None, ""
    return (found.group(1) or found.group(2)).upper(), found.group(3) or ""


class ChoiceMatch(AnswerReward):
    """1 where a choice, or a yes or no, equals the gold after normalisation, else 0.

    A gold that is one letter is met by that letter in any of its usual forms, or by the full text of the option. ``yes``
    and ``y``, ``no`` and ``n`` are the same; ``true`` and ``false`` stand for them only where the gold uses those words.

    Args:
        options: texts of the options, A first, where tasks do not carry them under ``meta["options"]``.

    ``match(texts, golds)`` on plain lists.
    """

    def __init__(
        self,
        options: Sequence[str] | None = None,
        *,
        tag: str | None = "answer",
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(tag=tag, name=name, on_error=on_error)
        self.options = None if options is None else list(options)

    def score_answer(self, answer: str, reference: Any, meta: Mapping[str, Any]) -> float:
        golds = [reference] if isinstance(reference, str) else reference
        if not isinstance(golds, Sequence) or not golds or not all(isinstance(g, str) and g.strip() for g in golds):
            raise DataError("a choice needs its gold answer as text, or a list of accepted ones")
        options = meta.get("options", self.options)
        if isinstance(options, Mapping):
            options = [options[k] for k in sorted(options)]
        return float(any(self._equal(answer, g, options) for g in golds))

    def _equal(self, answer: str, gold: str, options: Sequence[str] | None) -> bool:
        said, want = _plain(answer), _plain(gold)
        if said == want:
            return bool(said)
        letter, text = _gold_letter(gold)
        if want in ("y", "n") and not options and said in ("y", "yes", "n", "no"):
            letter = None
        if letter is not None:
            if options and said in [_plain(o) for o in options]:
                return [_plain(o) for o in options].index(said) == ord(letter) - 65
            return choice_letter(answer) == letter or (bool(text) and said == _plain(text))
        if want in ("true", "false"):
            words = {"yes": "true", "y": "true", "no": "false", "n": "false"}
        else:
            words = {"y": "yes", "n": "no"} if want in ("yes", "no", "y", "n") else {}
        if words.get(said, said) == words.get(want, want):
            return True
        mine = choice_letter(answer)
        if options and mine is not None and ord(mine) - 65 < len(options):
            return _plain(options[ord(mine) - 65]) == want
        return False


_NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+,\d{1,2}(?![\d,])|\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def read_number(text: str, *, percent: bool = False) -> float | None:
    """The one number in a text; None where there is none, several, or an infinite one.

    Currency and percent signs, thousands commas and unit words are ignored; a comma before one or two last digits is a
    decimal comma.

    Args:
        text: for example ``"$1,234.5"`` or ``"12 %"``.
        percent: divide a number with a percent sign by 100, so that ``"12%"`` equals ``"0.12"``.
    """
    found = _NUMBER.findall(text)
    if len(found) != 1:
        return None
    digits = found[0].replace("−", "-")
    plain = digits.replace(",", "") if re.search(r",\d{3}", digits) else digits.replace(",", ".")
    value = float(plain)
    if not math.isfinite(value):
        return None
    return value / 100 if percent and "%" in text else value


class RelaxedNumber(AnswerReward):
    """1 where a number is within ``rel_tol`` of the gold, relatively; text golds must be equal but for case.

    Args:
        rel_tol: 0.05 is ChartQA's; 0 is exact. A gold of 0 allows 1e-9.
        percent: see :func:`read_number`.

    A gold that is a list (or a string that holds a JSON list) is compared item by item, in order, with an answer that is
    a JSON list or an enumeration; the value is the mean over the gold's items. ``near(texts, golds)`` on plain lists.
    """

    def __init__(
        self,
        rel_tol: float = 0.05,
        *,
        percent: bool = False,
        tag: str | None = "answer",
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(tag=tag, name=name, on_error=on_error)
        if isinstance(rel_tol, bool) or not 0 <= rel_tol < math.inf:
            raise ConfigError(f"rel_tol must be finite and >= 0, got {rel_tol!r}")
        self.rel_tol, self.percent = float(rel_tol), percent

    def score_answer(self, answer: str, reference: Any, meta: Mapping[str, Any]) -> float:
        if reference is None or isinstance(reference, bool) or (isinstance(reference, str) and not reference.strip()):
            raise DataError(f"a number or a text is needed as gold, got {reference!r}")
        if isinstance(reference, str) and reference.lstrip().startswith("["):
            reference = _json_list(reference)
        if isinstance(reference, list | tuple):
            if not reference:
                raise DataError("the list of gold values is empty")
            said = _items(answer)
            return sum(self._one(s, g) for s, g in zip(said, reference, strict=False)) / len(reference)
        return self._one(answer, reference)

    def _one(self, answer: str, gold: Any) -> float:
        number = isinstance(gold, int | float) and not isinstance(gold, bool) and abs(gold) < 1e300
        if not number and not (isinstance(gold, str) and gold.strip()):
            raise DataError(f"a finite number or a text is needed as gold, got {str(gold)[:60]!r}")
        want = float(gold) if isinstance(gold, int | float) else read_number(str(gold), percent=self.percent)
        if want is None or (isinstance(gold, str) and not _is_number(gold)):
            return float(_plain(answer) == _plain(str(gold)))
        got = read_number(answer, percent=self.percent)
        if got is None:
            return 0.0
        return float(abs(got - want) <= (self.rel_tol * abs(want) if want else 1e-9) or got == want)


def _is_number(gold: str) -> bool:
    """Whether a gold is a number with at most a sign, a currency and a unit, and no sentence around it."""
    rest = _NUMBER.sub("", gold, count=1)
    return len(re.findall(r"[A-Za-z]+", rest)) <= 2


def _json_list(text: str) -> Any:
    """The list that a text holds as JSON; the text where it holds none."""
    try:
        made = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return made if isinstance(made, list) else text


def _items(answer: str) -> list[str]:
    try:
        made = json.loads(answer)
        if isinstance(made, list):
            return [str(x) for x in made]
    except (ValueError, RecursionError):
        made = None  # a plain enumeration then
    return [
        p.strip() for p in re.split(r";|\n|,\s|,(?!\d{3}(?:\D|$))|\band\b", answer.strip().strip("[]")) if p.strip()
    ]
