"""Is a short text a mathematical expression? A parser that only accepts or refuses: nothing is ever evaluated.

It reads the language that SymPy's parsers read (plain notation, and the LaTeX of final answers: fractions, roots,
functions, sets, intervals, relations, matrices). SymPy's own ``parse_expr`` runs Python's ``eval`` on the text and
computes ``2**(10**9)``; here time is linear in the text, whatever the numbers in it.
"""

from __future__ import annotations

import re
from fractions import Fraction

__all__ = ["MAX_CHARACTERS", "is_expression", "normalise_expression", "same_answer"]

MAX_CHARACTERS = 2000
"""Longer texts are no final answers: they are refused, and left as they are, unread."""

_MAX_DEPTH = 40


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_UNITS = """degrees? [cdmk]?m met(?:er|re)s? centimet(?:er|re)s? inch(?:es)? in feet foot ft miles? yards? seconds? secs?
minutes? mins? hours? hrs? days? weeks? months? years? k?g grams? kilograms? pounds? lbs? ounces? oz lit(?:er|re)s? ml
mph kph dollars? cents? percent units? square cubic sq per points? people ways times"""
_UNIT_TAIL = re.compile(
    rf"(?<=[\d)}}\]])\s*(?:(?:{'|'.join(_UNITS.split())})\b(?:\^\{{?[23]\}}?)?[\s./]*)+$", re.IGNORECASE
)
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox|operatorname)\s*\{([^{}]*)\}")
_LAYOUT = re.compile(r"(?<!\\)\\(?:(?:left|right|displaystyle|limits|quad|qquad|[bB]igg?[lr]?)(?![A-Za-z])|[,!;:> ])|~")
_BARS = re.compile(r"\\(?:[lr]?vert|\|)(?![A-Za-z])")
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])|°")
_FRACTIONS = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_SINGLE_EQUALS = re.compile(r"(?<![=<>!:])=(?!=)")
_SYMBOLS = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "π": " pi ", "∞": " oo ", "√": " sqrt ", "≤": "<=", "≥": ">="}
    | {"≠": "!=", "∪": "|", "∩": "&", "，": ",", "（": "(", "）": ")"}
)


def normalise_expression(text: str) -> str:
    """Clean a final answer up: dollars, layout commands, units, thousands commas; a single ``=`` becomes ``==``.

    Texts of more than :data:`MAX_CHARACTERS` are only stripped.
    """
    text = text.strip()
    if len(text) > MAX_CHARACTERS:
        return text
    for dropped, by in (("\\$", ""), ("$", ""), ("\\%", ""), ("%", ""), ("{,}", ",")):
        text = text.replace(dropped, by)
    text = text.strip()
    if text[:2] in ("\\(", "\\[") and text[-2:] in ("\\)", "\\]"):
        text = text[2:-2]
    text = _FRACTIONS.sub(r"\\frac", _DEGREES.sub("", text))
    text = _TEXT.sub(r" \1 ", _BARS.sub("|", _LAYOUT.sub(" ", text)))
    text = text.translate(_SYMBOLS).rstrip(". \t\n")
    text = _THOUSANDS.sub(lambda m: m.group().replace(",", ""), text)
    return _SINGLE_EQUALS.sub("==", _UNIT_TAIL.sub("", text)).strip()


def same_answer(answer: str, gold: str) -> bool:
    """Whether two answers are equal once normalised, blanks aside, or are equal numbers (``0.5``, ``\\frac{1}{2}``)."""
    a, b = ("".join(normalise_expression(t).split()) for t in (answer, gold))
    if a == b:
        return bool(a)
    x, y = _number(a), _number(b)
    return x is not None and x == y


def _number(text: str) -> Fraction | None:
    match = re.fullmatch(
        r"(-?)(?:\\frac\{(\d{1,50})\}\{(\d{1,50})\}|(\d{0,50}\.?\d{0,50})(?:/(\d{1,50}))?)", text, re.ASCII
    )
    if match is None:
        return None
    sign, top, bottom, plain, under = match.groups()
    try:
        return (-1 if sign else 1) * Fraction(top or plain) / Fraction(bottom or under or "1")
    except (ValueError, ZeroDivisionError):
        return None


_TOKEN = re.compile(
    r"(?P<number>\d+\.?\d*(?:[eE][+-]?\d+(?![\w.]))?|\.\d+)"
    r"|(?P<command>\\[A-Za-z]+|\\[{}])"
    r"|(?P<name>[A-Za-z]+\d*)"
    r"|(?P<relation>==|<=|>=|!=|:=|<|>)"
    r"|(?P<operator>\*\*|//|[-+*/^_!'|&,;:])"
    r"|(?P<open>[({\[])|(?P<close>[)}\]])"
    r"|(?P<blank>\s+)",
    re.ASCII,
)
_RELATIONS = _names(
    "le leq leqslant ge geq geqslant ne neq lt gt approx equiv sim cong in notin subset subseteq to mapsto"
)
_ADDING = _names("pm mp cup cap setminus land lor wedge vee")
_MULTIPLYING = _names("cdot times div ast circ mod bmod")
_FUNCTIONS = _names("""sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt cbrt abs max min gcd lcm det floor
    ceil binom sum prod int lim mod""")
_TWO_ARGUMENTS = _names("frac binom dbinom tbinom")
_ONE_ARGUMENT = _names(
    "sqrt overline bar hat vec tilde underline overrightarrow widehat boxed mathbb mathcal pmod angle triangle"
)
_CONSTANTS = _names("""pi infty emptyset varnothing ldots cdots dots ell hbar Re Im prime alpha beta gamma delta epsilon varepsilon zeta
    eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda
    Xi Pi Sigma Upsilon Phi Psi Omega""")
_STARTING = _TWO_ARGUMENTS | _ONE_ARGUMENT | _FUNCTIONS | _CONSTANTS
_PAIRS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"} | {
    "\\langle": "\\rangle"
}
_MATRIX = re.compile(r"\\begin\{([a-z]*matrix|cases|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)


def is_expression(text: str) -> bool:
    """True where the text, after :func:`normalise_expression`, parses as a mathematical expression in full.

    Accepted: numbers, names, arithmetic, powers, indices, factorials, implicit products, functions, fractions and
    roots, tuples, sets, intervals (half-open ones too), relations, and one level of matrix. Refused: an empty text,
    an operator without operands, unbalanced brackets, unknown commands, two numbers or two words side by side (a
    sentence is no expression), nesting deeper than 40, and texts longer than :data:`MAX_CHARACTERS`.
    """
    clean = normalise_expression(text)
    if len(clean) > MAX_CHARACTERS:
        return False
    matrix = _MATRIX.fullmatch(clean)
    if matrix is None:
        return _parses(clean)
    cells = [cell.strip() for cell in re.split(r"&|\\\\", matrix.group(2))]
    return any(cells) and all(_parses(cell) for cell in cells if cell)


def _parses(text: str) -> bool:
    tokens: list[tuple[str, str]] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return False
        if match.lastgroup != "blank":
            tokens.append((match.lastgroup or "", match.group()))
        position = match.end()
    parser = _Parser(tokens)
    try:
        parser.listing()
    except _Refused:
        return False
    return parser.position == len(parser.tokens)


class _Refused(Exception):
    """The text is no expression; never leaves this module."""


class _Parser:
    """Recursive descent over tokens: listing > relation > sum > product > power > atom."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0
        self.bars = 0  # open |, whose next | closes and is no relation

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.position] if self.position < len(self.tokens) else ("end", "")

    def take(self) -> tuple[str, str]:
        token = self.peek()
        self.position += 1
        return token

    def at(self, *texts: str) -> bool:
        return self.peek()[1] in texts

    def at_command(self, names: frozenset[str]) -> bool:
        kind, text = self.peek()
        return kind == "command" and text[1:] in names

    def expect(self, *texts: str) -> None:
        if self.take()[1] not in texts:
            raise _Refused

    def listing(self) -> None:
        self.relation()
        while self.at(",", ";", "and", "or"):
            if self.take()[1] == "," and self.at("and", "or"):
                self.take()
            self.relation()

    def relation(self) -> None:
        self.sum()
        while self.peek()[0] == "relation" or self.at(":") or self.at_command(_RELATIONS | {"mid"}) or self.divides():
            self.take()
            self.sum()

    def divides(self) -> bool:
        return self.at("|") and not self.bars

    def sum(self) -> None:
        self.product()
        while self.at("+", "-", "&") or self.at_command(_ADDING):
            self.take()
            self.product()

    def product(self) -> None:
        word = self.signed()
        while True:
            kind, text = self.peek()
            if self.at("*", "/", "//") or self.at_command(_MULTIPLYING):
                self.take()
                word = self.signed()
                continue
            if kind == "number" and self.tokens[self.position - 1][0] == "number" and not self.mixed():
                raise _Refused
            if not self.starts_factor():
                return
            if word and kind == "name" and len(text) > 1 and text not in _FUNCTIONS:
                raise _Refused
            word = self.power() or word

    def mixed(self) -> bool:
        """``2 1/2`` is a number, ``1 2`` is nothing."""
        return self.tokens[self.position + 1 : self.position + 2] == [("operator", "/")]

    def starts_factor(self) -> bool:
        kind, text = self.peek()
        if kind == "name":
            return text not in ("and", "or")
        return kind in ("number", "open") or (kind == "command" and (text in _PAIRS or text[1:] in _STARTING))

    def signed(self) -> bool:
        while self.at("+", "-") or self.at_command(_ADDING & {"pm", "mp"}):
            self.take()
        return self.power()

    def power(self) -> bool:
        word = self.atom()
        while self.at("^", "**", "_", "!", "'"):
            if self.take()[1] not in "!'":
                self.script()
        return word

    def script(self) -> None:
        while self.at("+", "-"):
            self.take()
        if self.at("*"):
            self.take()
        else:
            self.atom()

    def atom(self) -> bool:
        """Read one atom; True where it is a word of several letters."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _Refused
        kind, text = self.take()
        if kind == "name" and text in _FUNCTIONS:
            self.argument(text)
        elif text in _PAIRS:
            self.bracket(text)
        elif text == "|":
            self.bars += 1
            self.sum()
            self.bars -= 1
            self.expect("|")
        elif kind == "command":
            self.latex(text[1:])
        elif kind not in ("number", "name") or text in ("and", "or"):
            raise _Refused
        self.depth -= 1
        return kind == "name" and len(text) > 1 and text not in _FUNCTIONS

    def bracket(self, opened: str) -> None:
        if opened == "\\{" and self.at("\\}"):  # the empty set
            self.take()
            return
        bars, self.bars = self.bars, 0
        self.listing()
        self.bars = bars
        self.expect(*(")]" if opened in "([" else (_PAIRS[opened],)))

    def latex(self, name: str) -> None:
        if name in _TWO_ARGUMENTS:
            self.group()
            self.group()
        elif name in _ONE_ARGUMENT:
            if name == "sqrt" and self.at("["):
                self.take()
                self.listing()
                self.expect("]")
            self.group()
        elif name in _FUNCTIONS:
            self.argument(name)
        elif name not in _CONSTANTS:
            raise _Refused

    def group(self) -> None:
        """One LaTeX argument: a braced expression or a single token (``\\frac12`` is read digit by digit)."""
        kind, text = self.peek()
        if kind == "number" and len(text) > 1:
            self.tokens[self.position : self.position + 1] = [("number", text[0]), ("number", text[1:])]
        self.atom()

    def argument(self, name: str) -> None:
        while self.at("^", "_"):
            self.take()
            self.script()
        if name in ("sum", "prod", "int", "lim"):
            self.product()
        else:
            self.signed()
