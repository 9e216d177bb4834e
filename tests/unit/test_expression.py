"""The parser of final answers: what it accepts and refuses, that it evaluates nothing, and that it is fast."""

import time

import pytest

from guerdon.rewards.expression import MAX_CHARACTERS, is_expression, normalise_expression, same_answer
from guerdon.rewards.grammar import boxed

ACCEPTED = r"""42
-5
1/2
.5
5.
1e999
2^(10^9)
2^{10^9}
9999999999999999999999999999999^99999999999999999
x=3
f(x)=2x+1
x^2+3x-1
2x(x+1)
(x+1)(x-1)
2 1/2
3:4
5!
a_{n+1}
\frac{1}{2}
\frac12
\dfrac{a}{b}c
\sqrt{2}
\sqrt2
\sqrt[3]{5}
10\sqrt{3}
-\frac{\pi}{2}
(1,2)
[0,1)
(-\infty, 3]
\{1,2,3\}
\{x | x > 0\}
\{\}
\emptyset
x \in [1,2]
|x-1| < 3
\left|x\right| \geq 2
\pm 5
\binom{5}{2}
\log_2 8
\sin^2 x
\sum_{k=1}^n k
\lfloor x \rfloor
A \cup B
\overline{AB}
\text{(A)}
\textbf{(B)}
\text{east}
$5
\$5.50
12,345
12{,}345
12,\!345
5\text{ cm}
5 square meters
50\%
90^\circ
x = 1 or x = 2
1, 2, and 3
\(5\)
\[5\]
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
π
3 × 10^5
7 \mod 3""".splitlines()

REFUSED = [
    "", "   ", "\t\n", "$$", "1+", "*3", "^2", "1,", ",", "()", "(1", "1)", "{", "}", "{}", "1 2", "x ==", "= 3", "and",
    r"\frac{1}", r"\frac{}{2}", r"\sqrt", r"\foo", r"\text{the answer is five}", "hello world", "the answer is 5",
    "I don't know", "?", "x = 5 or", "\x00", "5\x00", "😀", "١٢", "import os", "__import__('os').system('true')",
    "open('x','w')", "(" * 3000, "9" * (MAX_CHARACTERS + 1), "(" * 50 + "1" + ")" * 50, r"\begin{pmatrix}\end{pmatrix}",
]  # fmt: skip


@pytest.mark.parametrize("text", ACCEPTED)
def test_accepted(text):
    assert is_expression(text)


@pytest.mark.parametrize("text", REFUSED)
def test_refused(text):
    assert not is_expression(text)


def test_sympy_reads_what_is_accepted_in_its_own_notation():
    """An independent parser on the part of the language that both write alike."""
    parse = pytest.importorskip("sympy.parsing.sympy_parser").parse_expr
    for text in ("42", "-5", "1/2", "x**2 + 3*x - 1", "(1, 2)", "sqrt(2)", "2*(x + 1)", "x < 3", "sin(x)/2"):
        parse(text, evaluate=False)
        assert is_expression(text)
    for text in ("1 +", "* 3", "(1", "1)", "x **", "1 2", "sqrt("):
        with pytest.raises(Exception):
            parse(text, evaluate=False)
        assert not is_expression(text)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (" $\\dfrac{1}{2}$. ", "\\frac{1}{2}"),
        ("12,345 people", "12345"),
        ("1{,}000", "1000"),
        ("(1,234)", "(1234)"),
        ("x = 3", "x == 3"),
        ("x <= 3", "x <= 3"),
        ("5 m^2", "5"),
        ("m", "m"),
        ("45^{\\circ}", "45"),
        ("x=" * MAX_CHARACTERS, "x=" * MAX_CHARACTERS),
    ],
)
def test_normalisation(text, clean):
    assert normalise_expression(text) == clean


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ("0.5", "\\frac{1}{2}", True),
        ("-1/2", "-\\dfrac{2}{4}", True),
        ("1,000", "1000", True),
        ("42", "42.0", True),
        ("x = 3", "x=3", True),
        ("5\\text{ cm}", "5", True),
        ("\\text{east}", "east", True),
        ("1e999", "1e999", True),
        ("1", "2", False),
        ("1/0", "2", False),
        ("", "", False),
        ("x", "y", False),
        ("9" * 100_000, "9", False),
    ],
)
def test_equality(a, b, equal):
    assert same_answer(a, b) is equal


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} and \boxed{x^{2}}", "x^{2}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed {4}", "4"),
        (r"} { \boxed{5} } {", "5"),
        (r"\boxed{", None),
        (r"boxed{1}", None),
    ],
)
def test_the_last_balanced_box(text, content):
    assert boxed(text) == content


def test_hostile_texts_take_no_time():
    start = time.perf_counter()
    for text in (r"\boxed{" * 150_000, r"\boxed{1}" * 50_000 + "{" * 500_000, r"\boxed " * 140_000, "{" * 1_000_000):
        boxed(text)
    for text in ("(" * 1999, "|" * 1999, "-" * 1999, "5 " + "m^2 " * 499, "\\text{" * 300, "a" * 1999, "1," * 999,
                 "\\frac" * 390, "{" * 1999, "1 " * 1000, "x!" * 999, "\\left" * 390, "9" * 1_000_000):  # fmt: skip
        is_expression(text)
    assert time.perf_counter() - start < 5
