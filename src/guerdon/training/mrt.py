"""Meta reinforcement fine-tuning: groups that go on from one prefix of thought, half of them made to answer at once.

    world = Continued(environment, force=FORCE_SUFFIX)
    prover = MetaProver(AnswerSampler(engine), verify, policy=policy)
    MrtTrainer(policy, engine, world, tasks, reward, config, prover=prover, cuts=text_cuts).fit()

One step: a trace per task from the present policy, cut behind one of its episodes; from there, trajectories that think on
and trajectories that answer at once; the reward is the outcome plus the progress that the new episodes made. The prefix
is in the prompt, so nothing in it is trained, and the groups compare only trajectories of one prefix.

:class:`EpisodeProgress` rewards every episode of whole traces; :func:`star_examples` is the supervised form: the trace with the most progress, cut where progress ends.

Source: Qu et al. 2025, "Optimizing Test-Time Compute via Meta Reinforcement Fine-Tuning" (arXiv 2503.07572).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from guerdon.credit import best_trace, progress_bonus
from guerdon.environments.continued import Continued, Cut, render_continued
from guerdon.errors import ConfigError
from guerdon.rewards.base import OnError, Reward
from guerdon.rollout.loop import derive_seed
from guerdon.shaping.progress_bonus import ProgressShape
from guerdon.training.config import OnlineConfig
from guerdon.training.online import OnlineTrainer
from guerdon.training.sft import Example
from guerdon.types import Group, Score, Span, StopReason, Task, Trajectory

if TYPE_CHECKING:
    from guerdon.policies import Policy
    from guerdon.rollout import Engine

__all__ = ["EpisodeProgress", "MrtTrainer", "star_examples"]

Cuts = Callable[[Trajectory], Sequence[Cut]]


class Prover(Protocol):
    """What is asked of :class:`guerdon.search.MetaProver`."""

    verify: Callable[..., Any]

    def reset(self) -> None:
        """Forget all estimates."""
        ...

    def values(self, pairs: Sequence[tuple[Any, Any]], /) -> Tensor:
        """``[P]`` success probabilities of forced answers, of (task, cut) pairs."""
        ...

    def estimate(self, pairs: Sequence[tuple[Any, Any]], /) -> Sequence[Any]:
        """The same, with the answers (``samples``)."""
        ...


class MrtTrainer(OnlineTrainer):
    """The online trainer over prefixes of thought.

    Args:
        policy, engine, tasks, reward, config: see :class:`~guerdon.training.OnlineTrainer`; ``group_size`` counts the
            trajectories from one prefix, those that answer at once included.
        environment: a :class:`~guerdon.environments.continued.Continued`.
        prover: success of forced answers; the policy's own, so its estimates are dropped before every scoring.
        cuts: the places behind the episodes of a trajectory, for example
            :func:`~guerdon.environments.continued.text_cuts`.
        alpha: weight of the progress.
        bonus_episodes: progress is measured behind so many new episodes (or the last there is); 1 is the objective as
            it is written, None measures behind all of them, as the algorithm's text can be read.
        terminate: share of a group that is made to answer at once; the paper has one half.
        shape: further shapes, applied before the bonus.
        options: as for :class:`~guerdon.training.OnlineTrainer`; ``credit="termination_relative"`` compares with the
            trajectories that answered at once instead of with the whole group.

    The place is drawn evenly among those before which the thought was not over (the paper leaves this open).

    Attributes:
        traces: of the last step, one per task.

    Raises:
        ConfigError: a share or number out of range, or a group too small for both kinds.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        environment: Continued,
        tasks: Sequence[Task],
        reward: Any,
        config: OnlineConfig,
        *,
        prover: Prover,
        cuts: Cuts,
        alpha: float = 1.0,
        bonus_episodes: int | None = 1,
        terminate: float = 0.5,
        shape: Any = None,
        rollout_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(environment, Continued):
            raise ConfigError(f"environment must be a Continued, got {type(environment).__name__}; wrap it in one")
        if bonus_episodes is not None and bonus_episodes < 1:
            raise ConfigError(f"bonus_episodes must be at least 1 or None, got {bonus_episodes}")
        if not 0 < terminate < 1:
            raise ConfigError(f"terminate must be between 0 and 1, both excluded, got {terminate}")
        if config.group_size < 2:
            raise ConfigError("group_size=1 leaves no room for both thinking on and answering at once; use at least 2")
        self._prover, self._cuts, self._bonus_episodes = prover, cuts, bonus_episodes
        self._stopping = min(max(1, round(terminate * config.group_size)), config.group_size - 1)
        self._in_step = False
        self.traces: list[Trajectory] = []
        more = [] if shape is None else list(shape) if isinstance(shape, list | tuple) else [shape]
        super().__init__(
            policy,
            engine,
            environment,
            tasks,
            reward,
            config,
            shape=[*more, ProgressShape(self._progress, alpha)],
            rollout_options={"render": render_continued(policy), **(rollout_options or {})},
            **options,
        )

    def train_step(self) -> Any:
        """One step; see the module."""
        self._in_step = True
        try:
            return super().train_step()
        finally:
            self._in_step = False

    def sample(self, tasks: Sequence[Task], *, seed: int, **options: Any) -> list[Group]:
        """Within a training step: groups from prefixes. Elsewhere (evaluation) the tasks from their beginning."""
        if not self._in_step or options:
            return super().sample(tasks, seed=seed, **options)
        began = super().sample(tasks, seed=derive_seed(seed, "trace"), group_size=1)
        self.traces = [group.trajectories[0] for group in began]
        rng = np.random.default_rng(seed)
        chosen = [self._choose(trace, rng) for trace in self.traces]
        parts = []
        for terminated, size in ((False, self._settings.group_size - self._stopping), (True, self._stopping)):
            here = [
                replace(task, meta={**task.meta, "cut": cut, "terminate": terminated})
                for task, cut in zip(tasks, chosen, strict=True)
            ]
            # One turn, which the rollout then samples as the final one that it is.
            turns = {"max_turns": 1} if terminated else {}
            made = super().sample(here, seed=derive_seed(seed, "rollout", terminated), group_size=size, **turns)
            parts.append(made)
        return [Group(a.task, a.trajectories + b.trajectories) for a, b in zip(*parts, strict=True)]

    def _choose(self, trace: Trajectory, rng: np.random.Generator) -> Cut:
        draw = rng.random()  # one number a trace, so that a failed one does not move the others'
        if trace.stop in (StopReason.ERROR, StopReason.ABORTED):
            return Cut()
        going_on = [cut for cut in self._cuts(trace) if not cut.complete] or [Cut()]
        return going_on[int(draw * len(going_on))]

    def _progress(self, trajectories: Sequence[Trajectory]) -> list[tuple[float, float] | None]:
        """Success of a forced answer before and behind the new episodes of each trajectory."""
        self._prover.reset()
        pairs: list[tuple[Task, Cut]] = []
        for trajectory in trajectories:
            before: Cut = trajectory.task.meta["cut"]
            pairs += [(trajectory.task, before), (trajectory.task, self._behind(trajectory, before))]
        values = self._prover.values(pairs).tolist() if pairs else []
        return [
            None if t.stop in (StopReason.ERROR, StopReason.ABORTED) else (values[2 * i], values[2 * i + 1])
            for i, t in enumerate(trajectories)
        ]

    def _behind(self, trajectory: Trajectory, before: Cut) -> Cut:
        """The place behind the new episodes of this very trajectory; the old one where there are none."""
        if trajectory.task.meta["terminate"] or trajectory.stop in (StopReason.ERROR, StopReason.ABORTED):
            return before
        new = self._cuts(trajectory)
        at = len(new) - 1 if self._bonus_episodes is None else min(self._bonus_episodes, len(new) - 1)
        return before.joined(new[at])


class EpisodeProgress(Reward):
    """Every episode's own progress as a step reward of whole traces: the on-policy form, dearer than one prefix.

    The outcome is the score's value, the progress of each episode its steps. Pay them with the rule
    ``"pav"``, which weighs each step by its own value: summed from a step on they would telescope, and
    every episode would be paid for the others.

    Args:
        outcome: the final reward, trajectories to scores.
        prover: success of forced answers; its estimates are dropped before every batch.
        cuts: the places behind a trajectory's episodes. The public variant has at most 6 episodes
            (``partial(text_cuts, max_episodes=6)``) and 4 answers at each.
        name, on_error: see :class:`~guerdon.rewards.Reward`.
    """

    gives = frozenset({"outcome", "steps"})

    def __init__(
        self, outcome: Any, prover: Prover, cuts: Cuts, *, name: str | None = None, on_error: OnError = "raise"
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        self.outcome, self._prover, self._cuts = outcome, prover, cuts

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Score trajectories; one whose prefixes' values are not all known is invalid."""
        self._prover.reset()
        scores = list(self.outcome(trajectories))
        places = [list(self._cuts(t)) for t in trajectories]
        flat = self._prover.values([(t.task, c) for t, row in zip(trajectories, places, strict=True) for c in row])
        out, at = [], 0
        for trajectory, score, row in zip(trajectories, scores, places, strict=True):
            j = flat[at : at + len(row)]
            at += len(row)
            if not score.valid:
                out.append(score)
            elif bool(j.isnan().any()):
                out.append(Score.invalid(f"task {trajectory.task.id!r}: a prefix has no known value", **score.parts))
            else:
                spans = tuple(_episode_span(a, b) for a, b in pairwise(row))
                parts = {**score.parts, "j_first": float(j[0]), "j_last": float(j[-1])}
                out.append(Score(score.value, tuple(progress_bonus(j).tolist()), spans, parts=parts))
        return out


def _episode_span(before: Cut, behind: Cut) -> Span:
    """The policy's tokens between two cuts of one trajectory."""
    start = len(before.ids)
    said = [turn.speaker == "policy" for turn in behind.turns for _ in turn.token_ids][start:]
    length = said.index(False) if False in said else len(said)
    return Span(start, start + length)


def star_examples(
    groups: Sequence[Group],
    scores: Sequence[Score],
    prover: Prover,
    cuts: Cuts,
    *,
    closing: Callable[[Cut], tuple[Sequence[int], Sequence[int]]],
    least: float = 0.0,
) -> list[Example]:
    """What the supervised form of MRT learns from: per problem its best trace, cut where progress ends, and an answer.

    Of the traces that ended correctly the one with the largest total progress is taken
    (:func:`~guerdon.credit.best_trace`); behind the cut stands the first right answer among the forced ones.

    Args:
        groups: traces per problem.
        scores: their outcomes, flat; above 0.5 is correct, and invalid ones count as wrong.
        prover: gives J at every prefix, and the forced answers.
        cuts: the places behind a trace's episodes.
        closing: token ids between cut and answer, and which of them are learned (1): usually the closed tag, so that the
            policy learns to end its thought there.
        least: smallest total progress that is worth learning from.

    Returns:
        at most one example per problem; none where no trace is correct or no forced answer at the cut is.
    """
    out: list[Example] = []
    verdicts = iter(scores)
    for group in groups:
        mine = [next(verdicts) for _ in group.trajectories]
        places = [list(cuts(t)) for t in group.trajectories]
        flat = prover.estimate([(t.task, c) for t, row in zip(group.trajectories, places, strict=True) for c in row])
        rows, at = [], 0
        for row in places:
            rows.append(list(flat[at : at + len(row)]))
            at += len(row)
        right = [
            s.valid and s.value > 0.5 and not any(math.isnan(e.value) for e in row)
            for s, row in zip(mine, rows, strict=True)
        ]
        known = [[e.value if ok else 0.0 for e in row] for ok, row in zip(right, rows, strict=True)]
        chosen = best_trace(known, right)
        if chosen is None or known[chosen[0]][-1] - known[chosen[0]][0] < least:
            continue
        trace, cut = group.trajectories[chosen[0]], places[chosen[0]][chosen[1]]
        answer = next((a for a in rows[chosen[0]][chosen[1]].samples if _is_right(prover, trace.task, a)), None)
        if answer is None:
            continue
        ids, learned = closing(cut)
        said = [int(turn.speaker == "policy") for turn in cut.turns for _ in turn.token_ids]
        out.append(
            Example(
                trace.prompt_ids,
                (*cut.ids, *ids, *answer.token_ids),
                (*said, *learned, *([1] * len(answer.token_ids))),
            )
        )
    return out


def _is_right(prover: Prover, task: Task, answer: Any) -> bool:
    import inspect

    wants = len(inspect.signature(prover.verify).parameters)
    verdict = prover.verify(task, answer) if wants >= 2 else prover.verify(answer)
    return verdict is not None and float(getattr(verdict, "value", verdict)) > 0.5
