"""Step scorers: one protocol whatever the head, and the reward that makes Scores of any of them.

A step scorer reads trajectories, cut into steps by a :class:`~guerdon.types.Segmenter`, and says a number about every
step. What the number means is the scorer's business: the probability that the step is right (:class:`StepClassifier`),
the value of the prefix that ends there (:class:`StepValue`), a log-ratio (:class:`ImplicitPRM`), a share of the outcome.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from guerdon.errors import ConfigError, DataError
from guerdon.rewards.base import OnError, Reward
from guerdon.types import Score, Segmenter, Task, Trajectory, step_spans

__all__ = ["REDUCTIONS", "StepReward", "StepScorer", "at_step_ends", "reduce_scores"]

Reduce = Literal["min", "last", "mean", "sum", "product"]
REDUCTIONS = ("min", "last", "mean", "sum", "product")


@runtime_checkable
class StepScorer(Protocol):
    """What every step scorer offers.

    Attributes:
        segmenter: how steps are cut where a caller does not say: the cut that the scorer was trained with.

    ``fit`` is each scorer's own (labels per step, values of prefixes, outcomes); it returns the scorer.
    """

    segmenter: Segmenter

    def step_scores(self, trajectories: Sequence[Trajectory], segmenter: Segmenter | None = None) -> list[Tensor]:
        """One ``[S]`` tensor per trajectory, its steps in the order of their spans."""
        ...

    def token_rewards(self, trajectories: Sequence[Trajectory]) -> list[Tensor]:
        """One ``[T]`` tensor per trajectory, one value per response token, 0 on environment tokens."""
        ...


def at_step_ends(scores: Sequence[Tensor], trajectories: Sequence[Trajectory], segmenter: Segmenter) -> list[Tensor]:
    """Put each step's value on its last token, one ``[T]`` tensor per trajectory, 0 elsewhere.

    Raises:
        DataError: another number of values than of steps.
    """
    out = []
    for values, trajectory in zip(scores, trajectories, strict=True):
        spans = step_spans(trajectory, segmenter)
        if len(spans) != len(values):
            raise DataError(
                f"{len(values)} step values for the {len(spans)} steps of task {trajectory.task.id!r}; "
                "score and place with one segmenter"
            )
        row = values.new_zeros(len(trajectory))
        if spans:
            row[[span.stop - 1 for span in spans]] = values
        out.append(row)
    return out


def reduce_scores(scores: Tensor, how: Reduce) -> float:
    """One number for a response from its step scores ``[S]``; NaN where it has no step.

    ``"product"`` is computed in float64 logarithms where all scores are positive, so that long responses keep order.
    """
    if how not in REDUCTIONS:
        raise ConfigError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {how!r}")
    values = scores.detach().double()
    if not len(values):
        return math.nan
    if how == "product":
        return math.exp(float(values.log().sum())) if bool((values > 0).all()) else float(values.prod())
    if how == "last":
        return float(values[-1])
    return float(values.min() if how == "min" else values.mean() if how == "mean" else values.sum())


class StepReward(Reward):
    """Scores with steps from a step scorer.

    Args:
        scorer: anything with ``step_scores(trajectories, segmenter)``.
        segmenter: default the scorer's own.
        reduce: how the outcome value is made of the step scores: ``"min"`` (default), ``"last"``, ``"mean"``,
            ``"sum"`` or ``"product"``. Credit rules for steps do not read it.
        tokens: also give token values, each step's on its last token.
        verifier: a reward whose outcome becomes the part ``"verified"``, for credit rules that read it beside the steps.
        answered: which tasks the verifier may judge; default all. Scores of other tasks have no such part.
        name, on_error: see :class:`guerdon.rewards.Reward`.

    A trajectory without a policy token has no step, and an invalid score that says so.

    Raises:
        ConfigError: the scorer has no ``step_scores``, no segmenter is known, or ``reduce`` is none of these.
    """

    def __init__(
        self,
        scorer: Any,
        *,
        segmenter: Segmenter | None = None,
        reduce: Reduce = "min",
        tokens: bool = False,
        verifier: Callable[[Sequence[Trajectory]], Sequence[Score]] | None = None,
        answered: Callable[[Task], bool] | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name or "step_reward", on_error=on_error)
        if not callable(getattr(scorer, "step_scores", None)):
            raise ConfigError(f"a step scorer with step_scores(trajectories, segmenter) is needed, got {scorer!r}")
        cut = segmenter or getattr(scorer, "segmenter", None)
        if cut is None:
            raise ConfigError("a step reward needs a segmenter: give segmenter=, for example Segmenter('lines')")
        if reduce not in REDUCTIONS:
            raise ConfigError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
        if answered is not None and verifier is None:
            raise ConfigError("answered says which tasks a verifier may judge; give verifier= as well")
        self.scorer, self.segmenter, self.reduce, self.tokens = scorer, cut, reduce, tokens
        self.verifier, self.answered = verifier, answered

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """One score per trajectory; step values as :meth:`values` gives them."""
        spans = [step_spans(t, self.segmenter) for t in trajectories]
        busy = [k for k, s in enumerate(spans) if s]
        scored = self.scorer.step_scores([trajectories[k] for k in busy], self.segmenter)
        if len(scored) != len(busy):
            raise DataError(f"{self.name!r}: the scorer returned {len(scored)} rows for {len(busy)} trajectories")
        out = [
            Score.invalid(f"reward {self.name!r}: task {t.task.id!r} has no step, since the policy said nothing")
            for t in trajectories
        ]
        for k, raw in zip(busy, scored, strict=True):
            if len(raw) != len(spans[k]):
                raise DataError(
                    f"{self.name!r}: {len(raw)} step scores for the {len(spans[k])} steps of task "
                    f"{trajectories[k].task.id!r}; the scorer must cut steps with the segmenter that it is given"
                )
            out[k] = self.make(trajectories[k], torch.as_tensor(raw), spans[k])
        return self._verified(trajectories, out)

    def _verified(self, trajectories: Sequence[Trajectory], scores: list[Score]) -> list[Score]:
        if self.verifier is None:
            return scores
        judged = [k for k, t in enumerate(trajectories) if self.answered is None or self.answered(t.task)]
        for k, outcome in zip(judged, self.verifier([trajectories[k] for k in judged]), strict=True):
            if not outcome.valid:
                scores[k] = Score.invalid(outcome.reason or "the verifier failed")
            elif scores[k].valid:
                scores[k] = scores[k].with_value(scores[k].value, verified=outcome.value)
        return scores

    def make(self, trajectory: Trajectory, scores: Tensor, spans: tuple[Any, ...]) -> Score:
        """The score of one trajectory from its step scores ``[S]``; subclasses transform them here."""
        values = tuple(scores.detach().double().tolist())
        tokens = None
        if self.tokens:
            row = [0.0] * len(trajectory)
            for value, span in zip(values, spans, strict=True):
                row[span.stop - 1] = value
            tokens = tuple(row)
        parts = {"steps": float(len(values)), "worst": min(values), "mean": sum(values) / len(values)}
        return Score(reduce_scores(scores, self.reduce), values, spans, tokens, parts)
