"""The environment, and rewards that know the truth: the answer, and the gold label of every line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from guerdon.environments.arithmetic.checker import LINES, Report, check
from guerdon.errors import DataError
from guerdon.rewards.base import OnError, Reward
from guerdon.rollout.protocol import Episode, Observation
from guerdon.types import Message, Score, Task, Trajectory, Usage, policy_text

__all__ = ["ChainCorrect", "Solve", "StepOracle", "step_labels"]


class Solve:
    """One policy turn that should solve the task; then the episode is over.

    A completion that ran into its token limit ends the trajectory with ``StopReason.LENGTH``.
    """

    def start(self, task: Task, *, seed: int, group: int, member: int) -> Episode:
        """Begin ``task``."""
        return _Episode(task)


class _Episode:
    def __init__(self, task: Task) -> None:
        self._task = task

    @property
    def prompt(self) -> Sequence[Message]:
        return self._task.prompt

    async def step(self, action: str) -> Observation:
        return Observation(done=True)

    def result(self) -> tuple[Usage, Mapping[str, Any]]:
        return Usage(), {}


def step_labels(trajectory: Trajectory) -> tuple[bool, ...]:
    """The gold label of each step that :data:`LINES` cuts a trajectory into; a bare end token is a wrong step.

    Raises:
        DataError: a token reaches over a whole line, so that there are fewer steps than lines.
    """
    labels = check(trajectory.task, policy_text(trajectory)).labels
    spans = LINES.spans(trajectory)
    if not labels and len(spans) == 1:
        return (False,)
    if len(spans) != len(labels):
        raise DataError(
            f"task {trajectory.task.id!r} has {len(labels)} lines but {len(spans)} spans of tokens; a token must not "
            "reach over a whole line"
        )
    return labels


class ChainCorrect(Reward):
    """1 where the final answer is right, else 0.

    Args:
        boxed: count an answer only where the last one stands in a well-formed box.

    Parts: ``answered``, ``boxed``, ``steps``, ``share_right``, ``share_filler``, ``coverage``, ``markers``,
    ``all_right`` (every line is), as :class:`~guerdon.environments.arithmetic.Report` has them.
    """

    range = (0.0, 1.0)

    def __init__(self, *, boxed: bool = False, name: str | None = None, on_error: OnError = "raise") -> None:
        super().__init__(name=name or "chain_correct", on_error=on_error)
        self.boxed = boxed

    def score_one(self, trajectory: Trajectory) -> Score:
        report = check(trajectory.task, policy_text(trajectory))
        right = report.right and (report.boxed or not self.boxed)
        return Score(float(right), parts=_parts(report))


class StepOracle(Reward):
    """Gold step labels as a step reward: one value per line; the outcome is whether the answer is right.

    Args:
        right, wrong: value of a correct and of an incorrect line.
        filler: value of a filler line; default ``right``, which is what makes a sum of step rewards hackable.

    Parts are those of :class:`ChainCorrect`. On plain text (:meth:`text`), which has no tokens, there are no steps.
    """

    def __init__(
        self,
        *,
        right: float = 1.0,
        wrong: float = 0.0,
        filler: float | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name or "step_oracle", on_error=on_error)
        self.right, self.wrong = right, wrong
        self.filler = right if filler is None else filler
        self.range = (0.0, 1.0)

    def score_one(self, trajectory: Trajectory) -> Score:
        report = check(trajectory.task, policy_text(trajectory))
        value = float(report.right)
        if not len(trajectory):
            return Score(value, parts=_parts(report))
        spans = tuple(LINES.spans(trajectory))
        if len(spans) != len(report.lines):
            # A response of nothing but an end token is one step without a line.
            if not report.lines and len(spans) == 1:
                return Score(value, (self.wrong,), spans, parts=_parts(report))
            return Score.invalid(
                f"task {trajectory.task.id!r} has {len(report.lines)} lines but {len(spans)} spans of tokens; "
                "a token must not reach over a whole line"
            )
        kinds = {"filler": self.filler}
        steps = tuple(kinds.get(x.kind, self.right) if x.correct else self.wrong for x in report.lines)
        return Score(value, steps, spans, parts=_parts(report))


def _parts(report: Report) -> dict[str, float]:
    return {
        "answered": float(report.answer is not None),
        "boxed": float(report.boxed),
        "steps": float(report.steps),
        "share_right": report.share_right,
        "share_filler": report.share_filler,
        "coverage": report.coverage,
        "markers": float(report.markers),
        "all_right": float(bool(report.lines) and report.first_wrong is None),
    }
