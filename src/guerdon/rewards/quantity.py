"""Numbers with their units: equal within a tolerance, after conversion."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from guerdon.errors import ConfigError, DataError, MissingDependency
from guerdon.rewards.base import OnError
from guerdon.rewards.referenced import AnswerReward
from guerdon.types import Score

__all__ = ["Amount", "Quantity", "read_amount"]

_GROUP = "[,  '’]"  # separators of thousands; a comma and an apostrophe are unambiguous only before three digits
_NUMBER = rf"""(?:\d{{1,3}}(?:{_GROUP}\d{{3}})+(?:\.\d+)?    # 1,234.5
    |\d{{1,3}}(?:\.\d{{3}})+,\d{{1,9}}                       # 1.234,5
    |\d+,\d{{1,2}}(?![\d,])                                  # 3,5
    |\d+\.?\d*|\.\d+)"""
_AMOUNT = re.compile(
    rf"""\s*(?:about|approximately|approx\.?|roughly|~|≈|≃|=)?\s*
    (?P<sign>[-+−]?)\s*(?P<money>[$€£¥]?)\s*(?P<inner>[-−]?)(?P<number>{_NUMBER})
    (?![eE][-+]?\d{{5}})(?:[eE](?P<exponent>[-+]?\d{{1,4}})(?![\d\w])|\s*(?:[x×*·]|\\times|\\cdot)\s*10\s*\^?\s*\{{?(?P<power>[-+−]?\d{{1,4}})\}}?)?
    (?:\s*/\s*(?P<under>\d{{1,15}})(?![\d/]))?
    \s*(?P<unit>(?![eE][-+]?\d)(?:/\s*[^\W\d_]|[^\W\d_]|[%‰°µΩ$€£¥"′″]).{{0,60}})?\s*\Z""",
    re.VERBOSE | re.DOTALL,
)
_SECOND = re.compile(
    r"(?<![\w^{*])(?<![\^{*][-−])\d"
)  # a digit in the words behind a number that is no power of a unit
_MONEY = {"$": "USD", "€": "EUR", "£": "GBP", "¥": "JPY"}
_WRITTEN = (
    ("°C", "degC"), ("° C", "degC"), ("°F", "degF"), ("° F", "degF"), ("°", "degree"), ("%", "percent"), ("‰", "permille"),
    ("²", "**2"), ("³", "**3"), ("·", "*"), ("⋅", "*"), ("^", "**"), ("{", ""), ("}", ""),
    ("$", "USD"), ("€", "EUR"), ("£", "GBP"), ("¥", "JPY"),
)  # fmt: skip
_UNIT = re.compile(r"[^\W\d_][\w ]{0,40}(?:\*\*-?\d)?(?:\s*[*/]\s*[^\W\d_][\w ]{0,40}(?:\*\*-?\d)?){0,4}")
_MATHS = re.compile(
    r"\\(?:text|mathrm|mathit|operatorname)\s*\{([^{}]*)\}|\\(?=[%$])|\\[,;!: ]|(?<!\\)\$(?=.*\$\s*\Z)|\$\s*\Z"
)


@dataclass(frozen=True, slots=True)
class Amount:
    """A number and what stands behind it, blanks collapsed."""

    value: float
    unit: str = ""


def read_amount(text: str) -> Amount | None:
    """The one number in a text, and its unit; None where there is none, several, or an infinite one.

    Thousands may be separated by commas, blanks or apostrophes, decimals by a point, or by a comma before one or two last
    digits or behind points. Powers of ten (``3 x 10^8``, ``3e8``) and simple fractions are read. A date is no number.
    """
    if len(text) > 200:
        return None
    found = _AMOUNT.match(_MATHS.sub(r"\1", text.strip().rstrip(".")))
    if found is None or _SECOND.search(found["unit"] or ""):
        return None
    digits = re.sub(_GROUP, "", found["number"]) if re.search(rf"{_GROUP}\d{{3}}", found["number"]) else found["number"]
    if "," in digits:
        digits = digits.replace(".", "").replace(",", ".")
    value = float(digits)
    power = found["exponent"] or found["power"]
    try:
        value *= 10.0 ** int(power.replace("−", "-")) if power else 1.0
        value /= int(found["under"]) if found["under"] else 1
    except (OverflowError, ZeroDivisionError):
        return None
    if not math.isfinite(value):
        return None
    if "-" in (found["sign"] + found["inner"]).replace("−", "-"):
        value = -value
    unit = " ".join((found["unit"] or "").split())
    return Amount(value, f"{_MONEY[found['money']]} {unit}".strip() if found["money"] else unit)


class Quantity(AnswerReward):
    """1 where the answer is the gold's amount within a tolerance, in any unit that converts into the gold's, else 0.

    ``"1.5 km"`` is ``"1500 m"``. A gold without a unit is met by the number, whatever words stand behind it ("7 apples"), and
    by the value of a percentage ("50%" is 50 and 0.5). Words that are no unit must be the gold's, up to a plural s.

    Args:
        rel_tol: relative to the gold.
        abs_tol: in the gold's unit; the larger of both tolerances counts.
        bare: a number without a unit is taken to be in the gold's.

    Several golds: any counts. A gold may be a number or a text like ``"12.5 m/s"``; one that holds no finite number is an
    error. An answer that cannot be read gives 0. Parts: ``read``, and ``error`` (relative to the gold) where both compare.

    Raises:
        MissingDependency: pint is not installed.
    """

    def __init__(
        self,
        rel_tol: float = 1e-6,
        abs_tol: float = 0.0,
        *,
        bare: bool = False,
        tag: str | None = "answer",
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(tag=tag, name=name, on_error=on_error)
        for what, value in (("rel_tol", rel_tol), ("abs_tol", abs_tol)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"{what} must be finite and >= 0, got {value!r}")
        self.rel_tol, self.abs_tol, self.bare = float(rel_tol), float(abs_tol), bare
        _registry()

    def score_answer(self, answer: str, reference: Any, meta: Mapping[str, Any]) -> Score:
        golds = [_gold(g) for g in _listed(reference)]
        found = read_amount(answer)
        if found is None:
            return Score(0.0, parts={"read": 0.0})
        off = [(abs(value - g.value), g.value) for g in golds for value in _converted(found, g.unit, self.bare)]
        # Rounding of a conversion is no mistake of the answer.
        right = any(e <= max(self.rel_tol * abs(g), self.abs_tol, 1e-12 * abs(g)) for e, g in off)
        parts = {"read": 1.0}
        if off:
            parts["error"] = min(e / abs(g) if g else e for e, g in off)
        return Score(float(right), parts={k: v for k, v in parts.items() if math.isfinite(v)})


def _listed(reference: Any) -> list[Any]:
    made = list(reference) if isinstance(reference, list | tuple) else [reference]
    if not made:
        raise DataError("the list of gold amounts is empty; give at least one")
    return made


def _gold(value: Any) -> Amount:
    made: Amount | None = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            made = Amount(float(value)) if math.isfinite(value) else None
        except OverflowError:
            made = None
    elif isinstance(value, str):
        made = read_amount(value)
    if made is None:
        raise DataError(f"the gold must be a finite number, with a unit or without, got {str(value)[:60]!r}")
    return made


def _converted(found: Amount, unit: str, bare: bool) -> list[float]:
    """Values of an amount in a unit, one of which may be the gold's; none where it is of another kind."""
    if not found.unit:
        return [found.value] if bare or not unit else []
    import pint

    mine, wanted = _unit(found.unit), _unit(unit)
    if not unit:
        wanted = _registry().dimensionless
    elif mine is None or wanted is None:
        return [found.value] if _same_words(found.unit, unit) else []
    values = [] if unit else [found.value]
    if mine is not None:
        # Of another dimension, or out of range: then it is not the gold's.
        with contextlib.suppress(pint.PintError, OverflowError, ValueError, ZeroDivisionError):
            values.append(float(_registry().Quantity(found.value, mine).to(wanted).magnitude))
    return [v for v in values if math.isfinite(v)]


def _same_words(a: str, b: str) -> bool:
    return a.lower().removesuffix("s") == b.lower().removesuffix("s")


@functools.lru_cache(maxsize=10_000)
def _unit(text: str) -> Any:
    """A unit of measurement, or None where the words are none."""
    if not text:
        return None
    for written, meant in _WRITTEN:
        text = text.replace(written, meant)
    text = re.sub(r"\bper\b", "/", text)
    text = f"dimensionless {text}" if text.startswith("/") else text
    if _UNIT.fullmatch(text) is None:
        return None
    import pint

    try:
        return _registry().parse_units(text)
    except (pint.PintError, ValueError, TypeError, AttributeError, KeyError, AssertionError):
        return None


@functools.lru_cache(maxsize=1)
def _registry() -> Any:
    try:
        import pint
    except ImportError as error:
        raise MissingDependency("units need pint: pip install 'guerdon[math]'") from error
    made: Any = pint.UnitRegistry(autoconvert_offset_to_baseunit=True)
    for code, words in (("USD", "dollar = dollars"), ("EUR", "euro = euros"), ("GBP", "_"), ("JPY", "yen")):
        made.define(f"{code} = [money_{code.lower()}] = {words}")
    return made
