"""A process reward beside a success reward: step scores, transformed so that they can't be hacked, plus correctness.

Source: Gao et al. 2024, "On Designing Effective RL Reward at Training Time for LLM Reasoning" (arXiv 2410.15115).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guerdon.errors import ConfigError, RewardError
from guerdon.rewards.base import OnError, Reward, as_reward
from guerdon.shaping.steps import Compose, StepClip, split_steps, splitter_segmenter
from guerdon.types import Score, Segmenter, Span, Trajectory, step_spans

__all__ = ["ProcessReward", "StepRewards"]

Transform = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class StepRewards:
    """Rewards of the steps of ``B`` responses.

    Args:
        values: ``[B, K]`` float64, 0 where there is no step.
        step_ends: ``[B, K]`` position of each step's last token (on plain texts: character), -1 where there is no step.
    """

    values: Tensor
    step_ends: Tensor

    @property
    def mask(self) -> Tensor:
        """``[B, K]`` bool, True on steps."""
        return self.step_ends >= 0


class ProcessReward(Reward):
    """``alpha * transform(step scores)`` on every step, and correctness on the last one.

    Args:
        prm: the process reward model: a step scorer (``step_scores(trajectories, segmenter)``), or a function of a
            question and the list of its steps so far that gives one score in [0, 1] per step.
        transform: from ``[B, K]`` scores and mask to ``[B, K]``: ``Compose(StepClip(eta), StepDelta())`` is the
            paper's. ``None`` pays the scores themselves, which a policy hacks by adding steps.
        alpha: weight of the process reward; ``alpha * eta < 1`` keeps a right answer above a wrong one under Clip with
            Delta. 0 is the success reward alone, and asks the model nothing.
        splitter: what separates steps; the model must have been trained with the same cut.
        correct: reward in [0, 1] of a trajectory's answer; only needed on trajectories.
        segmenter: cuts trajectories, in place of ``splitter``.
        neutral: stands for a score that is NaN (counted in :attr:`missing`); default: the ``eta`` of a StepClip in the
            transform, otherwise 0.5.

    On trajectories a score's steps are the rewards of the steps and its value is their sum; its parts are ``correct``,
    ``learned`` (what the transformed scores pay), ``proxy`` (``alpha`` times the untransformed sum), ``score_mean``
    and ``steps``. A truncated solution is not correct, and its unfinished step is its last. One without steps gets 0.

    ``reward(questions, solutions, correct)`` takes plain texts and gives :class:`StepRewards`.

    Raises:
        ConfigError: alpha negative or not finite, no usable ``prm``.
        RewardError (or what ``on_error`` says): a step score outside [0, 1], another number of scores than of steps.
    """

    gives = frozenset({"outcome", "steps"})

    def __init__(
        self,
        prm: Any,
        transform: Transform | None = None,
        alpha: float = 0.5,
        splitter: str = "\n",
        *,
        correct: Any = None,
        segmenter: Segmenter | None = None,
        neutral: float | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name or "process_reward", on_error=on_error)
        if isinstance(alpha, bool) or not 0 <= alpha < math.inf:
            raise ConfigError(f"alpha must be finite and at least 0, got {alpha!r}")
        if not callable(prm) and not hasattr(prm, "step_scores"):
            raise ConfigError(
                f"prm must be a step scorer or a function of a question and its steps, got {type(prm).__name__}"
            )
        self.prm, self.transform, self.alpha, self.splitter = prm, transform, float(alpha), splitter
        self.segmenter = segmenter or splitter_segmenter(splitter)
        self.correct = None if correct is None else as_reward(correct)
        self.neutral = _eta(transform) if neutral is None else neutral
        if not 0 <= self.neutral <= 1:
            raise ConfigError(f"neutral must lie in [0, 1], got {neutral}")
        self.missing = 0

    def __call__(self, trajectories: Sequence[Any], *texts: Any, **options: Any) -> Any:
        """Score trajectories; or, as ``reward(questions, solutions, correct)``, plain texts."""
        if not texts and "solutions" not in options:
            return super().__call__(trajectories, **options)
        return self.plain(trajectories, *texts, **options)

    def plain(self, questions: Sequence[str], solutions: Sequence[str], correct: Sequence[float]) -> StepRewards:
        """Rewards of plain solutions, whose step ends are character positions.

        Args:
            questions, solutions: ``B`` each.
            correct: ``[B]`` in [0, 1]; an empty solution is not correct whatever stands here.

        Raises:
            ConfigError: the model is a step scorer, which reads tokens.
            RewardError: see the class.
        """
        if not len(questions) == len(solutions) == len(correct):
            raise ValueError(f"{len(questions)} questions, {len(solutions)} solutions and {len(correct)} verdicts")
        if hasattr(self.prm, "step_scores") and self.alpha > 0:
            raise ConfigError(
                "a step scorer reads tokens; give trajectories, or a function of a question and its steps"
            )
        spans = [split_steps(text, self.splitter) for text in solutions]
        scored = [
            self._ask(question, [text[a:b] for a, b in steps], f"response {k}")
            for k, (question, text, steps) in enumerate(zip(questions, solutions, spans, strict=True))
        ]
        values, _, mask = self._rewards(scored, [float(c) for c in correct])
        ends = torch.full(mask.shape, -1, dtype=torch.long)
        ends[mask] = torch.tensor([b - 1 for steps in spans for _, b in steps], dtype=torch.long)
        return StepRewards(values, ends)

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Score a batch; a transform with statistics takes them over its valid members."""
        if self.correct is None:
            raise ConfigError("on trajectories ProcessReward needs correct=, the reward of the answer")
        verdicts, _ = self.correct.assess(trajectories)
        spans = [step_spans(t, self.segmenter) if _said(t) else () for t in trajectories]
        out: list[Score] = [Score.invalid(v.reason or "no verdict") for v in verdicts]
        index, scored, correct = [], [], []
        for k, (row, verdict) in enumerate(zip(self._scores(trajectories, spans), verdicts, strict=True)):
            if isinstance(row, RewardError):
                out[k] = Score.invalid(str(row))
            elif verdict.valid:
                index.append(k)
                scored.append(row)
                correct.append(0.0 if trajectories[k].stop.truncated else verdict.value)
        values, known, mask = self._rewards(scored, correct)
        for i, k in enumerate(index):
            steps, raw = values[i][mask[i]], known[i][mask[i]]
            paid = correct[i] if len(steps) else 0.0
            parts = {
                "correct": paid,
                "learned": float(steps.sum()) - paid,
                "proxy": self.alpha * float(raw.sum()),
                "score_mean": float(raw.mean()) if len(raw) else self.neutral,
                "steps": float(len(steps)),
            }
            out[k] = Score(float(steps.sum()), tuple(steps.tolist()), spans[k], parts=parts)
        return out

    def _rewards(self, scored: Sequence[Tensor], correct: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
        """Step rewards, the scores behind them, and the mask, each ``[B, K]``."""
        shape = (len(scored), max((len(row) for row in scored), default=0))
        scores = torch.zeros(shape, dtype=torch.float64)
        mask = torch.zeros(shape, dtype=torch.bool)
        for k, row in enumerate(scored):
            scores[k, : len(row)] = row
            mask[k, : len(row)] = True
        lost = mask & torch.isnan(scores)
        self.missing += int(lost.sum())
        scores[lost] = self.neutral
        paid = scores if self.transform is None else self.transform(scores, mask)
        values = torch.where(mask, self.alpha * torch.as_tensor(paid).double(), 0.0)
        rows = mask.any(1).nonzero()[:, 0]
        last = mask.sum(1)[rows] - 1
        values[rows, last] += torch.tensor(correct, dtype=torch.float64)[rows]
        return values, scores, mask

    def _scores(
        self, trajectories: Sequence[Trajectory], spans: Sequence[tuple[Span, ...]]
    ) -> list[Tensor | RewardError]:
        """The model's scores of each trajectory's steps; an error where they can't be used."""
        if self.alpha == 0:
            return [torch.full((len(s),), self.neutral, dtype=torch.float64) for s in spans]
        rows: list[Any] = [()] * len(spans)
        if hasattr(self.prm, "step_scores"):
            busy = [k for k, s in enumerate(spans) if s]
            for k, row in zip(busy, self.prm.step_scores([trajectories[k] for k in busy], self.segmenter), strict=True):
                rows[k] = row
        out: list[Tensor | RewardError] = []
        for row, trajectory, cut in zip(rows, trajectories, spans, strict=True):
            where = f"task {trajectory.task.id!r}"
            try:
                if hasattr(self.prm, "step_scores"):
                    out.append(_checked(row, len(cut), where))
                else:
                    steps = _texts(trajectory, self.segmenter) if cut else []
                    if len(steps) != len(cut):
                        raise RewardError(f"{where}: {len(steps)} steps of text lie in {len(cut)} spans of tokens")
                    out.append(self._ask(trajectory.task.question, steps, where))
            except RewardError as error:
                out.append(error)
        return out

    def _ask(self, question: str, steps: list[str], where: str) -> Tensor:
        if self.alpha == 0 or not steps:
            return torch.full((len(steps),), self.neutral, dtype=torch.float64)
        return _checked(self.prm(question, steps), len(steps), where)


def _checked(row: Any, steps: int, where: str) -> Tensor:
    scores = torch.as_tensor(row).detach().double().reshape(-1).cpu()
    if len(scores) != steps:
        raise RewardError(f"the process reward model gave {len(scores)} scores for the {steps} steps of {where}")
    if bool(((scores < 0) | (scores > 1)).any()):
        raise RewardError(
            f"the process reward model gave {float(scores.min())} to {float(scores.max())} for {where}; "
            "scores are probabilities in [0, 1]"
        )
    return scores


def _said(trajectory: Trajectory) -> bool:
    return any(turn.speaker == "policy" and turn.text.strip() for turn in trajectory.turns)


def _texts(trajectory: Trajectory, segmenter: Segmenter) -> list[str]:
    out = []
    for turn in trajectory.turns:
        if turn.speaker == "policy" and len(turn):
            ends = segmenter.offsets(turn.text)
            out += [turn.text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    return out


def _eta(transform: Any) -> float:
    """The neutral score of a transform."""
    parts = transform.transforms if isinstance(transform, Compose) else (transform,)
    return next((part.eta for part in parts if isinstance(part, StepClip)), 0.5)
