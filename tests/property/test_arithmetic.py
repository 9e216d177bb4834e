"""The arithmetic checker on any text, and against scripts in any style."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.environments.arithmetic import Chain, Style, check, make_tasks, write

pytestmark = pytest.mark.property
TASKS = make_tasks(50)
PIECES = st.sampled_from(
    [
        "12",
        "7",
        "+",
        "-",
        "*",
        "=",
        "19",
        "\n",
        " ",
        "answer ",
        "\\boxed{",
        "}",
        "check ok",
        "first, ",
        "0",
        "-3",
        "boxed",
        "é",
        "\r",
    ]
)


@given(st.lists(PIECES, max_size=40).map("".join) | st.text(max_size=60))
def test_no_text_breaks_the_checker(text: str) -> None:
    report = check(Chain(12, (("+", 7), ("-", 5))), text)
    assert "".join(line.text for line in report.lines) in ("", text)
    assert 0 <= report.share_right <= 1 and 0 <= report.coverage <= 1 and 0 <= report.share_filler <= 1
    if report.right:
        assert report.answer is not None and int(report.answer) == 14
    assert report.first_wrong is None or not report.labels[report.first_wrong]


@settings(deadline=None)
@given(
    st.integers(0, 2**32), st.integers(0, len(TASKS) - 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.6),
    st.floats(0, 1), st.sampled_from(["plain", "boxed", "none"]),
)  # fmt: skip
def test_scripts_and_checker_agree(seed, number, error, cancel, filler, markers, answer) -> None:
    style = Style(error=error, cancel=cancel, filler=filler, markers=markers, answer=answer)
    script = write(TASKS[number], np.random.default_rng(seed), style)
    report = check(TASKS[number], script.text)
    assert report.labels == script.labels
    if report.first_wrong is None and answer != "none":
        assert report.right and report.coverage == 1.0
