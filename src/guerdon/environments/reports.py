"""Reports on a calculation: open-ended text in which few words depend on the reasoning, and the rest on taste.

A task asks for a chain of three operations on four numbers and a report of it. A response works the chain out line by line
between ``<think>`` and ``</think>``, in one of two registers, and then reports two values in some thirty words. The words
around the values have synonyms that follow the register more often than not, as somebody who reasons in plain words
reports in plain words; and an appendix may follow, once or several times. So the likelihood of a reference report depends on
the reasoning in two tokens, and in many others on its register, which says nothing about its quality. What is right is known.

Source: the small-scale task suggested by Xu et al. 2025, "Direct Reasoning Optimization" (arXiv 2506.13351): templated
reports of which a few tokens are computed and the rest is boilerplate with noise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from guerdon.environments.arithmetic.chains import Chain, Spec, apply, split_of
from guerdon.errors import ConfigError
from guerdon.types import Task

__all__ = [
    "END",
    "REGISTERS",
    "START",
    "ReportStyle",
    "outcome_of",
    "report_tasks",
    "report_words",
    "right",
    "write_report",
]

START, END = "<think>", "</think>"
REGISTERS = ("formally", "simply")
SPEC = Spec((3, 3), high=10, operand=5)
HARD = range(60, 100)
"""Numbers of chains that no script ever works out."""
Kind = Literal["learnable", "easy", "hard"]

_LAST, _BEFORE = 3, 2
_MAIN: tuple[str | int | tuple[str, str], ...] = (
    ("this", "the"), ("report", "note"), ("states", "says"), "that", ("total", "sum"), ("equals", "is"), _LAST,
    ("units", "points"), ";", ("previously", "before"), "it", ("stood", "was"), "at", _BEFORE, ";", ("every", "each"),
    ("entry", "number"), "was", ("verified", "checked"), ("twice", "again"), "and", ("recorded", "written"),
    ("accordingly", "down"), "by", ("our", "a"), ("clerk", "helper"), ("today", "now"), ".",
)  # fmt: skip
_APPENDIX = ("we", ("remain", "stay"), ("available", "here"), "for", ("queries", "questions"), ".")
REFERENCE_APPENDICES = 1


@dataclass(frozen=True, slots=True)
class ReportStyle:
    """How reports are written.

    Args:
        error: chance that a line of the reasoning is wrong; the report states what the reasoning found.
        follow: chance that a word is the register's own synonym.
        appendices: most appendices; each number from 0 on is equally likely.
    """

    error: float = 0.25
    follow: float = 0.75
    appendices: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.error <= 1 or not 0.5 <= self.follow <= 1 or self.appendices < 0:
            raise ConfigError(
                f"error must be in [0, 1], follow in [0.5, 1] and appendices at least 0, got {self.error}, {self.follow}, "
                f"{self.appendices}"
            )


def report_words() -> tuple[str, ...]:
    """Strings that a tiny tokenizer should hold as single tokens."""
    said: list[str] = []
    for slot in (*_MAIN, *_APPENDIX):
        said += [f" {w}" for w in ((slot,) if isinstance(slot, str) else slot if isinstance(slot, tuple) else ())]
    numbers = [str(n) for n in (*range(SPEC.high + 1), *HARD)]
    return tuple(dict.fromkeys((START, END, *REGISTERS, *numbers, *(f" {n}" for n in numbers), *said)))


def report_tasks(
    n: int,
    split: Literal["train", "test"] = "train",
    *,
    kind: Kind = "learnable",
    style: ReportStyle | None = None,
    seed: int = 0,
) -> list[Task]:
    """``n`` tasks with different chains; the reference is a right report with one appendix, in a register of its own.

    Args:
        n: how many.
        split: chains of one split occur in no other, whatever the seed.
        kind: ``"learnable"``; ``"easy"`` (nothing but zeros is added: no script is ever wrong); or ``"hard"`` (numbers that no
            script ever writes).
        style: ``follow`` of the references.
        seed: of the draw.

    Returns:
        Tasks whose prompt is the chain, with ``chain`` and ``kind`` in ``meta``.

    Raises:
        ConfigError: there are not so many such chains.
    """
    style = style or ReportStyle()
    kinds, splits = ("learnable", "easy", "hard"), ("train", "test")
    if kind not in kinds or split not in splits:
        raise ConfigError(f"kind must be one of {', '.join(kinds)} and split train or test, got {kind!r} and {split!r}")
    rng = np.random.default_rng([seed & 0xFFFFFFFF, 51, kinds.index(kind), splits.index(split)])
    seen: set[str] = set()
    out: list[Task] = []
    missed = 0
    while len(out) < n:
        chain = _chain(kind, rng)
        text = str(chain)
        if text in seen or (kind != "easy" and split_of(chain) != split):
            missed += 1
            if missed > 1000 + 50 * n:
                raise ConfigError(
                    f"there are not {n} {kind} chains in split {split!r}; found {len(out)}, ask for fewer"
                )
            continue
        seen.add(text)
        register = int(rng.integers(2))
        reference = _report(chain.values, register, style.follow, REFERENCE_APPENDICES, rng)
        out.append(Task(f"report/{text}", text, reference, {"chain": chain, "kind": kind, "split": split}))
    return out


def _chain(kind: Kind, rng: np.random.Generator) -> Chain:
    if kind == "learnable":
        return SPEC.draw(rng)
    if kind == "easy":
        return Chain(int(rng.integers(SPEC.high + 1)), tuple(("+-"[int(s)], 0) for s in rng.integers(0, 2, 3)))
    values = rng.integers(HARD.start, HARD.stop, 4)
    pairs = zip(values[:-1].tolist(), values[1:].tolist(), strict=True)
    return Chain(int(values[0]), tuple(("+", b - a) if b >= a else ("-", a - b) for a, b in pairs))


def write_report(task: Task, rng: np.random.Generator, style: ReportStyle | None = None) -> str:
    """A scripted response: reasoning, with errors as the style says, and the report of what it found."""
    style = style or ReportStyle()
    chain: Chain = task.meta["chain"]
    register = int(rng.integers(2))
    lines, values = [], [chain.start]
    for sign, operand in chain.operations:
        before = values[-1]
        # An error before may lead below 0 or above the highest number that a script can write.
        value = min(max(apply(before, sign, operand), 0), SPEC.high)
        if task.meta["kind"] != "easy" and rng.random() < style.error:
            near = [v for v in range(max(0, value - 3), min(SPEC.high, value + 3) + 1) if v != value]
            value = near[int(rng.integers(len(near)))]
        lines.append(f"{before}{sign}{operand}={value}")
        values.append(value)
    reasoning = "\n".join((REGISTERS[register], *lines))
    appendices = int(rng.integers(style.appendices + 1))
    return f"{START}{reasoning}{END}{_report(values, register, style.follow, appendices, rng)}"


def _report(values: Sequence[int], register: int, follow: float, appendices: int, rng: np.random.Generator) -> str:
    said = []
    for slot in (*_MAIN, *_APPENDIX * appendices):
        if isinstance(slot, tuple):
            said.append(slot[register if rng.random() < follow else 1 - register])
        else:
            said.append(slot if isinstance(slot, str) else str(values[slot]))
    return "".join(f" {word}" for word in said)


def outcome_of(text: str) -> str | None:
    """What stands behind the first end of reasoning; None where it does not end."""
    _, mark, behind = text.partition(END)
    return behind if mark else None


def right(task: Task, text: str) -> bool:
    """Whether a response's report states the two computed values, in their order, and no other number."""
    outcome = outcome_of(text)
    values = task.meta["chain"].values
    return outcome is not None and re.findall(r"\d+", outcome) == [str(values[_LAST]), str(values[_BEFORE])]
