"""Equality of final answers as mathematics, by math-verify, with a time-out that kills."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec

from guerdon.errors import ConfigError, DataError, MissingDependency
from guerdon.rewards.answer import gold_answers
from guerdon.rewards.base import OnError, Reward
from guerdon.rewards.expression import MAX_CHARACTERS, same_answer
from guerdon.rewards.grammar import extract_answer
from guerdon.rewards.killable import Failed, KillablePool, Killed, shared_pool
from guerdon.types import Score, Trajectory, policy_text

__all__ = ["MathEquality"]

_TARGET = "guerdon.rewards.math_check:check"
_INTEGER = re.compile(r"-?[1-9]\d{0,14}|0", re.ASCII)


class MathEquality(Reward):
    """1 where the extracted answer equals a gold answer as mathematics (math-verify's judgement), else 0.

    math-verify runs in processes of its own, so that it works from any thread and an answer that would take forever
    (``9^{9^{9^9}}``) is killed with its process. Answers that are equal once normalised, and plain integers, are settled
    without asking it.

    Args:
        seconds: that one comparison may take; then 0, counted in :attr:`failures` and in the part ``timed_out``.
        strict: math-verify's: variables keep their names, sets and tuples differ.
        pool: workers; by default one pool for the whole process, a worker per core.

    The answer is read by :func:`~guerdon.rewards.grammar.extract_answer`. No answer, or one of more than 2,000 characters,
    gives 0. A gold in which math-verify finds nothing to compare is a failure. Parts: ``extracted``, ``read`` (the answer is mathematics; 1
    where it was settled without asking), ``timed_out``.

    Raises:
        MissingDependency: math-verify is not installed.

    Source: Kydlicek et al., math-verify.
    """

    range = (0.0, 1.0)
    gives = frozenset({"outcome"})

    def __init__(
        self,
        seconds: float = 5.0,
        *,
        strict: bool = True,
        pool: KillablePool | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if isinstance(seconds, bool) or not 0 < seconds < float("inf"):
            raise ConfigError(f"seconds must be positive and finite, got {seconds!r}")
        if find_spec("math_verify") is None:
            raise MissingDependency("mathematical equality needs math-verify: pip install 'guerdon[math]'")
        self._seconds, self.strict, self._pool = float(seconds), strict, pool

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score | Exception]:
        """Score a batch; comparisons run on all workers at once, equal ones once."""
        out: list[Score | Exception | None] = []
        asked: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        for k, t in enumerate(trajectories):
            try:
                golds = [g.strip() for g in gold_answers(t.task.reference, t.task.id)]
            except DataError as error:
                out.append(error)
                continue
            answer = extract_answer(policy_text(t)).strip()
            settled = _settled(answer, golds)
            out.append(settled)
            if settled is None:
                asked.setdefault((answer, tuple(golds)), []).append(k)
        pool = self._pool or shared_pool(_TARGET)
        answers = pool.map([(a, list(g), self.strict) for a, g in asked], self._seconds) if asked else []
        for (key, places), said in zip(asked.items(), answers, strict=True):
            for k in places:
                out[k] = self._read(said, key, trajectories[k].task.id)
        return [s for s in out if s is not None]

    def _read(self, said: object, key: tuple[str, tuple[str, ...]], task_id: str) -> Score | Exception:
        if isinstance(said, Killed):
            self.failures["comparison timed out"] += 1
            return Score(0.0, parts={"extracted": 1.0, "read": 0.0, "timed_out": 1.0})
        if isinstance(said, Failed):
            return DataError(f"math-verify failed on the answer {key[0][:80]!r} of task {task_id!r}: {said}")
        assert isinstance(said, dict)
        if said["unread"] is not None and not said["equal"]:
            return DataError(f"the gold of task {task_id!r} cannot be read as mathematics: {said['unread'][:80]!r}")
        parts = {"extracted": 1.0, "read": float(said["read"]), "timed_out": 0.0}
        return Score(float(said["equal"]), parts=parts)


def _settled(answer: str, golds: Sequence[str]) -> Score | None:
    """The verdict where it needs no algebra."""
    if not answer or len(answer) > MAX_CHARACTERS:
        return Score(0.0, parts={"extracted": float(bool(answer)), "read": 0.0, "timed_out": 0.0})
    equal = any(answer == gold or same_answer(answer, gold) for gold in golds)
    whole = _INTEGER.fullmatch(answer) is not None and all(_INTEGER.fullmatch(gold) for gold in golds)
    if equal or whole:
        return Score(float(equal), parts={"extracted": 1.0, "read": 1.0, "timed_out": 0.0})
    return None
