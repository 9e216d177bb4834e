"""Reports on a calculation: what scripts write, what is right, and splits."""

from __future__ import annotations

import re

import numpy as np
import pytest

from guerdon.environments.reports import (
    END,
    REGISTERS,
    START,
    ReportStyle,
    outcome_of,
    report_tasks,
    report_words,
    right,
    write_report,
)
from guerdon.errors import ConfigError
from guerdon.policies import train_bpe

PERFECT = ReportStyle(error=0.0)


def test_references_are_right_and_scripts_without_errors_too() -> None:
    for kind in ("learnable", "easy"):
        for task in report_tasks(20, kind=kind, seed=3):
            assert right(task, f"{START}whatever{END}{task.reference}")
            assert right(task, write_report(task, np.random.default_rng(0), PERFECT))
    task = report_tasks(1)[0]
    values = task.meta["chain"].values
    assert re.findall(r"\d+", task.reference) == [str(values[3]), str(values[2])]
    assert not right(task, task.reference)  # no end of reasoning
    assert not right(task, f"{END} {values[2]} {values[3]} 77") and outcome_of("no end") is None


def test_a_third_of_the_scripts_is_right_and_easy_ones_always_are() -> None:
    rng = np.random.default_rng(1)
    tasks = report_tasks(100)
    share = np.mean([right(t, write_report(t, rng)) for t in tasks for _ in range(5)])
    assert 0.3 < share < 0.5
    for task in report_tasks(20, kind="easy"):
        assert right(task, write_report(task, rng, ReportStyle(error=1.0)))


def test_the_report_states_what_the_reasoning_found() -> None:
    rng = np.random.default_rng(2)
    for task in report_tasks(30) * 10:
        text = write_report(task, rng, ReportStyle(error=0.9))
        reasoning, outcome = text.removeprefix(START).split(END)
        register, *lines = reasoning.split("\n")
        assert register in REGISTERS and len(lines) == 3
        found = [line.split("=")[1] for line in lines]
        assert re.findall(r"\d+", outcome) == [found[2], found[1]]
        assert all(0 <= int(v) <= 10 for v in found)


def test_synonyms_follow_the_register() -> None:
    rng = np.random.default_rng(3)
    task = report_tasks(1)[0]
    strict = {write_report(task, rng, ReportStyle(0.0, 1.0, 0)) for _ in range(20)}
    assert len(strict) == 2  # one for each register
    loose = {write_report(task, rng, ReportStyle(0.0, 0.5, 0)) for _ in range(20)}
    assert len(loose) > 15


def test_words_are_single_tokens_and_splits_are_apart() -> None:
    words = report_words()
    tokenizer = train_bpe(("0",), 512 + len(words), atoms=(), words=words)
    task = report_tasks(1)[0]
    ids = tokenizer.encode(task.reference, add_special_tokens=False)
    assert len(ids) == len(task.reference.split()) and 30 <= len(ids) <= 60
    trains, tests = report_tasks(100, seed=1), report_tasks(100, "test", seed=1)
    assert not {t.id for t in trains} & {t.id for t in tests}
    assert report_tasks(5) == report_tasks(5)
    assert all(int(n) >= 60 for t in report_tasks(5, kind="hard") for n in re.findall(r"\d+", t.reference))


def test_what_is_refused() -> None:
    for bad in ({"error": 2}, {"follow": 0.2}, {"appendices": -1}):
        with pytest.raises(ConfigError):
            ReportStyle(**bad)
    for make in (
        lambda: report_tasks(1, kind="odd"),
        lambda: report_tasks(1, "dev"),
        lambda: report_tasks(500, kind="easy"),
    ):  # type: ignore[arg-type]
        with pytest.raises(ConfigError):
            make()
