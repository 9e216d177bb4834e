"""Chains of operations: what a task asks, its splits, and the words that a tiny tokenizer should hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from guerdon.errors import ConfigError, DataError
from guerdon.rollout.loop import derive_seed
from guerdon.types import Task

__all__ = ["FILLERS", "MARKERS", "Chain", "Spec", "Split", "apply", "make_task", "make_tasks", "split_of", "words"]

Split = Literal["train", "validation", "test"]

MARKERS = ("first, ", "next, ", "carry ", "therefore ")
"""Words of somebody who reasons; a line may begin with one, and is worth the same with and without it."""
FILLERS = ("check ok", "0+0=0")
"""Lines that are true and bring a solution no further."""
HEDGES = ("wait", "so")
"""Lines that say nothing at all; a rambling solution is full of them."""
LETTERS = "ABCDEFGH"
_SPLITS = ("train", "validation", "test")
_LARGEST_WORD = 199
_TERM = re.compile(r"([+\-*])(\d+)")


def apply(value: int, sign: str, operand: int) -> int:
    """``value sign operand`` for one of the signs ``+ - *``."""
    return value + operand if sign == "+" else value - operand if sign == "-" else value * operand


@dataclass(frozen=True, slots=True)
class Chain:
    """A start and operations on it, carried out from left to right (``*`` binds no tighter).

    Args:
        start: first number.
        operations: ``(sign, operand)`` each, sign one of ``+ - *``.
    """

    start: int
    operations: tuple[tuple[str, int], ...]

    @classmethod
    def parse(cls, text: str) -> Chain:
        """Read ``"12+7-5"``.

        Raises:
            DataError: the text is no chain.
        """
        clean = text.replace(" ", "")
        match = re.fullmatch(r"(\d+)((?:[+\-*]\d+)+)", clean)
        if match is None:
            raise DataError(f"a chain looks like 12+7-5, got {text!r}")
        return cls(int(match[1]), tuple((s, int(n)) for s, n in _TERM.findall(match[2])))

    def __len__(self) -> int:
        return len(self.operations)

    def __str__(self) -> str:
        return str(self.start) + "".join(f"{s}{n}" for s, n in self.operations)

    @property
    def values(self) -> tuple[int, ...]:
        """The start and the value after each operation."""
        out = [self.start]
        for sign, operand in self.operations:
            out.append(apply(out[-1], sign, operand))
        return tuple(out)

    @property
    def answer(self) -> int:
        """The value after the last operation."""
        return self.values[-1]


@dataclass(frozen=True, slots=True)
class Spec:
    """Which chains are asked.

    Args:
        operations: fewest and most operations of a chain; each number is equally likely.
        high: every value on the way lies in 0 .. ``high``. A tiny policy learns ``2 * high * operand`` facts.
        operand: largest operand of ``+`` and ``-``; the smallest is 1.
        factor: largest factor of ``*``, the smallest is 2; 0 leaves multiplication out.
        choices: options of a multiple-choice question, answered by a letter; 0 asks openly.
    """

    operations: tuple[int, int] = (2, 5)
    high: int = 20
    operand: int = 9
    factor: int = 0
    choices: int = 0

    def __post_init__(self) -> None:
        low, high = self.operations
        if not 1 <= low <= high:
            raise ConfigError(f"operations must be (fewest, most) with 1 <= fewest <= most, got {self.operations}")
        if self.high < 1 or self.operand < 1:
            raise ConfigError(f"high and operand must be at least 1, got {self.high} and {self.operand}")
        if self.factor < 0 or self.factor == 1:
            raise ConfigError(f"factor must be 0 (no multiplication) or at least 2, got {self.factor}")
        if self.choices and not 2 <= self.choices <= min(len(LETTERS), self.high + 1):
            raise ConfigError(
                f"choices must be 0, or 2 .. {min(len(LETTERS), self.high + 1)} for high={self.high}, got {self.choices}"
            )

    def draw(self, rng: np.random.Generator) -> Chain:
        """One chain."""
        count = int(rng.integers(self.operations[0], self.operations[1] + 1))
        value = start = int(rng.integers(0, self.high + 1))
        operations = []
        for _ in range(count):
            options = [("+", n) for n in range(1, min(self.operand, self.high - value) + 1)]
            options += [("-", n) for n in range(1, min(self.operand, value) + 1)]
            options += [("*", n) for n in range(2, self.factor + 1) if value > 0 and value * n <= self.high]
            sign, operand = options[int(rng.integers(len(options)))]
            value = apply(value, sign, operand)
            operations.append((sign, operand))
        return Chain(start, tuple(operations))


def split_of(chain: Chain) -> Split:
    """The split of a chain, a function of its text alone: seven in ten train, one validation, two test."""
    slot = derive_seed("arithmetic", str(chain)) % 10
    return "test" if slot < 2 else "validation" if slot == 2 else "train"


def make_tasks(n: int, split: Split = "train", *, spec: Spec | None = None, seed: int = 0) -> list[Task]:
    """``n`` tasks with different chains.

    Args:
        n: how many.
        split: chains of one split occur in no other, whatever the seed.
        spec: which chains; the default :class:`Spec`.
        seed: of the draw.

    Returns:
        Tasks whose prompt is the chain (and the options), whose reference is the answer as text (the letter of a
        multiple-choice question), and whose ``meta`` holds ``chain``, ``split``, ``operations`` and ``choices``
        (letter to value; empty for an open question).

    Raises:
        ConfigError: an unknown split, or the spec has fewer such chains.
    """
    spec = spec or Spec()
    if split not in _SPLITS:
        raise ConfigError(f"split must be one of {', '.join(_SPLITS)}, got {split!r}")
    if n < 0:
        raise ConfigError(f"n must not be negative, got {n}")
    rng = np.random.default_rng([seed & 0xFFFFFFFF, _SPLITS.index(split), 11])
    seen: set[Chain] = set()
    out: list[Task] = []
    missed = 0
    while len(out) < n:
        chain = spec.draw(rng)
        if chain in seen or split_of(chain) != split:
            missed += 1
            if missed > 1000 + 20 * n:
                raise ConfigError(f"{spec} has not {n} chains in split {split!r}; found {len(out)}, ask for fewer")
            continue
        seen.add(chain)
        out.append(make_task(chain, spec, rng))
    return out


def make_task(chain: Chain, spec: Spec, rng: np.random.Generator) -> Task:
    """The task that asks for a chain; ``rng`` draws the options of a multiple-choice question."""
    meta: dict[str, Any] = {"chain": chain, "split": split_of(chain), "operations": len(chain), "choices": {}}
    if not spec.choices:
        return Task(f"chain/{chain}", str(chain), str(chain.answer), meta)
    # Options near the answer, so that they cannot be told apart by their size.
    near = sorted((v for v in range(spec.high + 1) if v != chain.answer), key=lambda v: abs(v - chain.answer))
    near = near[: 2 * spec.choices]
    wrong = [near[i] for i in rng.permutation(len(near))[: spec.choices - 1]]
    values = [chain.answer, *wrong]
    options = {LETTERS[k]: values[i] for k, i in enumerate(rng.permutation(spec.choices).tolist())}
    letter = next(x for x, v in options.items() if v == chain.answer)
    text = str(chain) + "".join(f" {x}:{v}" for x, v in options.items())
    return Task(f"choice/{chain}", text, letter, {**meta, "choices": options})


def words(spec: Spec | None = None, *, more: Sequence[str] = ()) -> tuple[str, ...]:
    """Strings that a tiny tokenizer should hold as single tokens: numbers, markers, fillers, answers, options.

    Numbers above 199 are left to be spelled digit by digit.
    """
    spec = spec or Spec()
    numbers = [str(v) for v in range(min(max(spec.high, spec.operand, spec.factor), _LARGEST_WORD) + 1)]
    options = [f" {x}:" for x in LETTERS[: spec.choices]]
    return (*numbers, *MARKERS, FILLERS[0], *HEDGES, "answer ", "\\boxed{", "boxed ", *options, *more)
