"""The exact checker: what every line of a solution is worth, where the first error is, and whether the answer is right."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from guerdon.environments.arithmetic.chains import FILLERS, HEDGES, MARKERS, Chain, apply
from guerdon.errors import DataError
from guerdon.rewards.grammar import boxed
from guerdon.types import Segmenter, Task

__all__ = ["LINES", "Line", "Report", "check", "final_answer"]

LINES = Segmenter("lines")
"""How solutions are cut into steps: a step is a line, its newline included."""

Kind = Literal["step", "filler", "answer", "noise"]

_EQUATION = re.compile(r"(-?\d{1,12})((?:[+\-*]\d{1,12})+)=(-?\d{1,12})")
_TERM = re.compile(r"([+\-*])(\d+)")
_ANSWER = re.compile(r"(?:the )?answer(?: is)?[ :=]*(\S*)", re.IGNORECASE)
_MARKER = re.compile("|".join(rf"\b{re.escape(m.strip())}" for m in MARKERS), re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a solution.

    Args:
        text: with its newline.
        start, stop: its place in the solution, in characters.
        kind: ``"step"`` (an equation that is no filler), ``"filler"`` (true or harmless, and useless), ``"answer"``
            (states a final answer, in whatever form), ``"noise"`` (none of these).
        correct: the gold label. Of a step: its equation holds, and it carries out the next operations of the chain
            on the value where the solution stands (as the solution itself says) or ought to stand; operations may be
            skipped on the way. Of an answer: it is the task's. Of filler: True, unless it repeats a wrong line. Of
            noise: False. So an error is the fault of one line, and lines that build on it may be correct.
        operations: operations of the chain that a correct step carries out, else 0.
        skipped: operations that were skipped before a correct step.
    """

    text: str
    start: int
    stop: int
    kind: Kind
    correct: bool
    operations: int = 0
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """What a solution is worth.

    Args:
        lines: as :data:`LINES` cuts them.
        answer: the last answer given, or None.
        right: whether it is the task's.
        total: operations of the task's chain.
        markers: number of marker words.
        boxed: whether a well-formed box holds something.
    """

    lines: tuple[Line, ...]
    answer: str | None
    right: bool
    total: int
    markers: int
    boxed: bool

    @property
    def labels(self) -> tuple[bool, ...]:
        """The gold label of each line."""
        return tuple(line.correct for line in self.lines)

    @property
    def first_wrong(self) -> int | None:
        """Number of the first line that is not correct; None where all are."""
        return next((k for k, line in enumerate(self.lines) if not line.correct), None)

    @property
    def steps(self) -> int:
        """Number of lines that are steps, right or wrong."""
        return sum(line.kind == "step" for line in self.lines)

    @property
    def share_right(self) -> float:
        """Share of the steps that are right; 0 without any step."""
        steps = [line.correct for line in self.lines if line.kind == "step"]
        return sum(steps) / len(steps) if steps else 0.0

    @property
    def coverage(self) -> float:
        """Share of the chain's operations that correct steps carry out one after the other."""
        return min(1.0, sum(line.operations for line in self.lines) / self.total)

    @property
    def share_filler(self) -> float:
        """Share of the lines that are filler or noise; 0 without lines."""
        return sum(line.kind in ("filler", "noise") for line in self.lines) / len(self.lines) if self.lines else 0.0


def check(task: Task | Chain | str, solution: str) -> Report:
    """Check a solution line by line; any text is allowed.

    Args:
        task: from :func:`~guerdon.environments.arithmetic.make_tasks`, or an open question's chain (or its text).
        solution: what the policy wrote.

    Raises:
        DataError: the task is no arithmetic task.
    """
    chain, gold = _question(task)
    walk = _Walk(chain, gold)
    ends = LINES.offsets(solution)
    lines = tuple(walk.line(solution[a:b], a, b) for a, b in pairwise([0, *ends]))
    answer = final_answer(solution)
    return Report(
        lines, answer, answer is not None and _same(answer, gold), len(chain), len(_MARKER.findall(solution)), bool(boxed(solution))
    )  # fmt: skip


def final_answer(solution: str) -> str | None:
    """The answer that a solution gives last, as an answer line ("answer 17") or in a well-formed box; None without."""
    for line in reversed(solution.splitlines()):
        found = _stated(line)
        if found:
            return found
    return None


def _question(task: Task | Chain | str) -> tuple[Chain, str]:
    if isinstance(task, Task):
        chain = task.meta.get("chain")
        if not isinstance(chain, Chain):
            raise DataError(f"task {task.id!r} is no arithmetic task: its meta holds no chain; use make_tasks")
        return chain, str(task.reference)
    chain = Chain.parse(task) if isinstance(task, str) else task
    return chain, str(chain.answer)


def _stated(line: str) -> str | None:
    """The answer that a line states, the empty string where it states one badly, None where it states none."""
    if "boxed" in line:
        return boxed(line) or ""
    match = _ANSWER.match(_plain(line))
    return match[1].rstrip(".") if match else None


def _plain(line: str) -> str:
    """A line without blanks at its ends and marker words at its beginning."""
    text = line.strip()
    while match := _MARKER.match(text):
        text = text[match.end() :].lstrip()
    return text


def _same(answer: str, gold: str) -> bool:
    answer = answer.strip().rstrip(".")
    if re.fullmatch(r"-?\d{1,12}", answer) and re.fullmatch(r"-?\d+", gold):
        return int(answer) == int(gold)
    return answer.upper() == gold.upper()


class _Walk:
    """Where a solution stands in its chain: how many operations are done, and at which value."""

    def __init__(self, chain: Chain, gold: str) -> None:
        self.chain, self.gold = chain, gold
        self.done, self.value = 0, chain.start
        self.seen: dict[str, bool] = {}

    def line(self, text: str, start: int, stop: int) -> Line:
        plain = _plain(text)
        kind, correct, operations, skipped = self._judge(plain)
        self.seen.setdefault(plain, correct)
        return Line(text, start, stop, kind, correct, operations, skipped)

    def _judge(self, plain: str) -> tuple[Kind, bool, int, int]:
        stated = _stated(plain)
        if stated is not None:
            return "answer", bool(stated) and _same(stated, self.gold), 0, 0
        compact = plain.replace(" ", "")
        match = _EQUATION.fullmatch(compact)
        at, terms = (None, ()) if match is None else self._place(match)
        # A line said before may also be a later step that looks the same; then it must be the very next one.
        if plain in self.seen and at != self.done:
            return "filler", self.seen[plain], 0, 0
        if match is None:
            # A marker alone on its line, a check, a hedge, or the question said again.
            harmless = not plain or plain in FILLERS or plain in HEDGES or compact == str(self.chain)
            return ("filler", True, 0, 0) if harmless else ("noise", False, 0, 0)
        value, stands = int(match[1]), int(match[3])
        for sign, operand in terms:
            value = apply(value, sign, operand)
        right = value == stands
        if at is None:
            return ("filler", True, 0, 0) if right else ("step", False, 0, 0)
        # What follows is judged from what this line says, right or wrong.
        skipped, self.done, self.value = at - self.done, at + len(terms), stands
        return "step", right, len(terms) if right else 0, skipped if right else 0

    def _place(self, match: re.Match[str]) -> tuple[int | None, tuple[tuple[str, int], ...]]:
        """Number of the first operation that an equation carries out, None outside the chain; and its operations."""
        left, terms = int(match[1]), tuple((s, int(n)) for s, n in _TERM.findall(match[2]))
        value, truth = self.value, self.chain.values
        for at in range(self.done, len(self.chain) - len(terms) + 1):
            if left in (value, truth[at]) and self.chain.operations[at : at + len(terms)] == terms:
                return at, terms
            value = apply(value, *self.chain.operations[at])
        return None, terms
