"""What every reward is: a callable on trajectories, usable on plain strings, composable with + and *."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

from guerdon.errors import BudgetExceeded, ConfigError, MissingDependency, RewardError
from guerdon.rewards.awaiting import Timeout, may_wait, wait, wait_each
from guerdon.types import Score, StopReason, Task, Trajectory, Turn, action_mask, validate_score

__all__ = [
    "FunctionReward",
    "Progress",
    "Reward",
    "Weighted",
    "as_reward",
    "reward_values",
    "step_fault",
    "takes_progress",
    "unique_names",
]

OnError = Literal["raise", "drop"] | float

_FATAL = (ConfigError, MissingDependency, BudgetExceeded)
"""Not failures of a score: the set-up is wrong, or the money is spent, and the next batch would end the same way."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training run is, for rewards and shapes that change with it.

    Args:
        step: steps that are done.
        total: steps of the whole run.
    """

    step: int
    total: int

    @property
    def fraction(self) -> float:
        """From 0 at the first step to 1 at the last."""
        return min(1.0, self.step / max(1, self.total - 1))


def takes_progress(function: Callable[..., Any]) -> bool:
    """Whether a callable has a parameter ``progress``."""
    try:
        return "progress" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


class Reward:
    """Base class. A subclass overrides :meth:`score` (a batch) or :meth:`score_one` (one trajectory).

    Either may be a coroutine function, and either may have a keyword ``progress`` (a :class:`Progress`): training
    passes it on, so that a reward can change during a run; outside training it is ``None``.

    Args:
        name: under which it appears in logs, parts and errors; the class's name by default.
        on_error: what an exception, a time-out, ``None``, NaN, an infinity, a wrong type, a wrong number of scores or
            a step outside the response means: ``"raise"`` a :class:`~guerdon.errors.RewardError` that names reward and
            task, ``"drop"`` an invalid score (a trainer leaves such a trajectory out of loss and statistics), or a
            number that is used instead. Every failure is counted in :attr:`failures`.
        timeout: seconds that one score may take (all scores together, where :meth:`score` is overridden).
        workers: how many trajectories are scored at once by ``score_one``: coroutines all together by default, plain
            functions one after the other; with a number, plain functions run in threads.

    Attributes:
        range: lowest and highest value that the reward can take.
        gives: what its scores carry: ``"outcome"``, and ``"steps"`` or ``"tokens"`` where it has them. A trainer
            refuses credit rules that read what is not there. ``None``: not known before the first score.
        failures: number of failures by reason since the reward was made: ``exception``, ``timeout``, ``none``,
            ``type``, ``non-finite``, ``length``, ``span`` and ``invalid`` (the reward itself gave an invalid score).
    """

    range: tuple[float, float] = (-math.inf, math.inf)
    gives: frozenset[str] | None = None
    _timeout: float | None = None
    _workers: int | None = None

    def __init__(
        self,
        *,
        name: str | None = None,
        on_error: OnError = "raise",
        timeout: float | None = None,
        workers: int | None = None,
    ) -> None:
        check_on_error(on_error)
        self.name = name or type(self).__name__
        self.on_error: OnError = on_error
        self.limit(timeout=timeout, workers=workers)
        self.failures: Counter[str] = Counter()
        self._error: BaseException | None = None

    def limit(self, *, timeout: float | None = None, workers: int | None = None) -> Self:
        """Set how long a score may take and how many are made at once; see the class.

        Raises:
            ConfigError: not positive.
        """
        for name, value in (("timeout", timeout), ("workers", workers)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and value > 0):
                raise ConfigError(f"{name} must be a positive number, got {value!r}")
        self._timeout, self._workers = timeout, None if workers is None else int(workers)
        return self

    def score_one(self, trajectory: Trajectory) -> Any:
        """Score one trajectory: a number or a :class:`~guerdon.types.Score`; may be a coroutine function."""
        raise TypeError(f"{type(self).__name__} must override score_one or score")

    def score(self, trajectories: Sequence[Trajectory]) -> Any:
        """Score a batch, in order; may be a coroutine function."""
        return [self.score_one(t) for t in trajectories]

    def __call__(self, trajectories: Sequence[Trajectory], *, progress: Progress | None = None) -> list[Score]:
        """Score trajectories; failures are handled as :attr:`on_error` says, never as a silent 0.

        Raises:
            RewardError: ``on_error="raise"`` and a score failed; the text names reward and task.
            ConfigError, MissingDependency: the reward is set up wrongly. No ``on_error`` covers that.
        """
        scores, fatal = self.assess(trajectories, progress=progress)
        for score, ends in zip(scores, fatal, strict=True):
            if ends:
                raise RewardError(score.reason) from self.cause()
        return scores

    def assess(
        self, trajectories: Sequence[Trajectory], *, progress: Progress | None = None
    ) -> tuple[list[Score], list[bool]]:
        """Scores, and for each whether it is a failure that calling the reward would raise.

        Combinations of rewards and trainers use this: they see every failure of a batch, and decide themselves.
        """
        scores: list[Score] = []
        fatal: list[bool] = []
        self._error = None
        for trajectory, value in zip(trajectories, self._run(trajectories, progress), strict=True):
            score, fault = self._checked(trajectory, value)
            if fault is not None:
                self.failures[fault] += 1
            if not score.valid and not isinstance(self.on_error, str):
                score = Score(float(self.on_error), parts={**_finite(score.parts), f"{self.name}/failed": 1.0})
            scores.append(score)
            fatal.append(not score.valid and self.on_error == "raise")
        return scores, fatal

    def cause(self) -> BaseException | None:
        """The first exception of the last batch, of this reward or of a part of it."""
        return self._error or next((e for e in (one.cause() for one in self.components()) if e is not None), None)

    def text(self, *, completion: str, reference: Any = None, prompt: str = "", **info: Any) -> Score:
        """Score a plain string as if a policy had written it in one turn."""
        task = Task("text", prompt, reference)
        return self([Trajectory(task, (Turn("policy", completion),), StopReason.DONE, info=info)])[0]

    def components(self) -> Iterator[Reward]:
        """Rewards that this one is made of: attributes that are rewards, or sequences of them."""
        for value in vars(self).values():
            for item in value if isinstance(value, list | tuple) else (value,):
                for one in item if isinstance(item, tuple) else (item,):
                    if isinstance(one, Reward):
                        yield one

    def failure_counts(self) -> Counter[tuple[str, str]]:
        """Failures of this reward and of all its parts, by ``(name of the reward, reason)``."""
        counts: Counter[tuple[str, str]] = Counter({(self.name, reason): n for reason, n in self.failures.items()})
        for one in self.components():
            counts += one.failure_counts()
        return counts

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run needs; empty for stateless rewards."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""

    def __add__(self, other: Any) -> Weighted:
        return Weighted([*_terms(self), *_terms(other)])

    def __mul__(self, weight: Any) -> Weighted:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"a reward is weighted by a finite number, got {weight!r}")
        return Weighted([(reward, w * float(weight)) for reward, w in _terms(self)])

    __rmul__ = __mul__

    def __radd__(self, other: Any) -> Any:
        return self if other == 0 else NotImplemented

    def _run(self, trajectories: Sequence[Trajectory], progress: Progress | None) -> Sequence[Any]:
        """What the subclass returns for each trajectory; an exception where it raised."""
        if type(self).score is Reward.score:
            more = {"progress": progress} if takes_progress(self.score_one) else {}
            if not more and self._timeout is None and self._workers in (None, 1):
                found = self._each(trajectories)
                waiting = [value for value in found if may_wait(value)]
                if not waiting:
                    return found
                done = iter(
                    wait_each([partial(_itself, value) for value in waiting], timeout=None, workers=self._workers)
                )
                return [_ours(next(done)) if may_wait(value) else value for value in found]
            calls = [partial(self.score_one, t, **more) for t in trajectories]
            return [_ours(value) for value in wait_each(calls, timeout=self._timeout, workers=self._workers)]
        more = {"progress": progress} if takes_progress(self.score) else {}
        try:
            raw = _listed(wait(partial(self.score, trajectories, **more), self._timeout))
            if isinstance(raw, list) and any(may_wait(r) for r in raw):
                raw = wait_each([partial(_itself, r) for r in raw], timeout=self._timeout, workers=None)
        except _FATAL:
            raise
        except Exception as error:  # noqa: BLE001  a user's reward may raise anything; it is named and counted
            # A batch is not scored again one by one: its reward may hold state that must advance once.
            raw = [error] * len(trajectories)
        if not isinstance(raw, list):
            return [_Fault("type", f"returned {type(raw).__name__}, a sequence of scores is expected")] * len(
                trajectories
            )
        if len(raw) != len(trajectories):
            return [_Fault("length", f"returned {len(raw)} scores for {len(trajectories)} trajectories")] * len(
                trajectories
            )
        return [_ours(value) for value in raw]

    def _each(self, trajectories: Sequence[Trajectory]) -> list[Any]:
        """What :meth:`score_one` returns for each, one after the other; the exception where it raised one."""
        out: list[Any] = []
        for trajectory in trajectories:
            try:
                out.append(self.score_one(trajectory))
            except _FATAL:
                raise
            except Exception as error:  # noqa: BLE001  a user's reward may raise anything; it is named and counted
                out.append(error)
        return out

    def _checked(self, trajectory: Trajectory, value: Any) -> tuple[Score, str | None]:
        """A valid score and None, or an invalid one and the reason under which it is counted."""
        if type(value) is float and math.isfinite(value):
            return Score(value), None
        if type(value) is Score and _is_plain(value):
            return value, None
        who, task = f"reward {self.name!r}", f"for task {trajectory.task.id!r}"
        if isinstance(value, _Fault):
            return Score.invalid(f"{who} {value.text} ({task})"), value.reason
        if isinstance(value, Timeout):
            return Score.invalid(f"{who} timed out {task}: {value}"), "timeout"
        if isinstance(value, BaseException):
            self._error = self._error or value
        if isinstance(value, RewardError):
            # It names its own reward and task; those of the whole would only be in front of it.
            return Score.invalid(str(value)), "exception"
        if isinstance(value, BaseException):
            return Score.invalid(f"{who} raised {type(value).__name__} {task}: {value}"), "exception"
        score = validate_score(_plain(value), reward=self.name, task_id=trajectory.task.id)
        if score.valid:
            wrong = step_fault(score, trajectory)
            return (score, None) if wrong is None else (Score.invalid(f"{who}: {wrong}", **score.parts), "span")
        if value is None:
            return score, "none"
        if not isinstance(value, Score):
            return score, "type" if not isinstance(_plain(value), int | float) else "non-finite"
        return score, "non-finite" if value.valid else "invalid"


def _is_plain(score: Score) -> bool:
    """Whether nothing about a score needs a further look: a finite outcome alone."""
    whole = score.valid and score.steps is None and score.tokens is None
    return whole and type(score.value) is float and math.isfinite(score.value)


def step_fault(score: Score, trajectory: Trajectory) -> str | None:
    """What is wrong with the places of a score's step and token values, in words; None where nothing is.

    Steps cover policy tokens of the response, at least one each, in order and without overlap; token values are as many
    as there are response tokens. A trajectory without recorded ids has no places, and passes.
    """
    length = len(trajectory)
    if length == 0:
        return None
    if score.tokens is not None and len(score.tokens) != length:
        return f"{len(score.tokens)} token values for the {length} response tokens of task {trajectory.task.id!r}"
    if not score.step_spans:
        return None
    mask = action_mask(trajectory)
    previous = 0
    for k, span in enumerate(score.step_spans):
        if span.start < previous or span.stop > length or not len(span) or not all(mask[span.start : span.stop]):
            return (
                f"step {k} of task {trajectory.task.id!r} is [{span.start}, {span.stop}) of a response of {length} tokens; "
                "steps cover policy tokens only, at least one each, in order and without overlap"
            )
        previous = span.stop
    return None


@dataclass(frozen=True, slots=True)
class _Fault:
    """A failure of the whole batch that is no exception."""

    reason: str
    text: str


def check_on_error(on_error: Any) -> None:
    """Refuse what is neither ``"raise"``, ``"drop"`` nor a finite number."""
    number = isinstance(on_error, int | float) and not isinstance(on_error, bool) and math.isfinite(on_error)
    if not number and on_error not in ("raise", "drop"):
        raise ConfigError(f"on_error must be 'raise', 'drop' or a finite number, got {on_error!r}")


def _listed(raw: Any) -> Any:
    """A list of what an iterable or an array holds; text, mappings and the rest as they are."""
    if hasattr(raw, "tolist"):
        raw = raw.tolist()
    if isinstance(raw, str | bytes | Mapping) or not hasattr(raw, "__iter__"):
        return raw
    return list(raw)


def _plain(value: Any) -> Any:
    """Python's number for a number of numpy or torch; anything else as it is."""
    if isinstance(value, bool | int | float | Score) or not hasattr(value, "item") or getattr(value, "size", 1) == 0:
        return value
    try:
        return value.item()
    except (TypeError, ValueError, RuntimeError):
        return value


def _finite(parts: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in parts.items() if math.isfinite(value)}


def _ours(value: Any) -> Any:
    """Pass on a value; mistakes in the set-up are raised, whatever failures mean."""
    if isinstance(value, _FATAL):
        raise value
    return value


def _itself(value: Any) -> Any:
    return value


class FunctionReward(Reward):
    """A plain function of trajectories as a reward.

    Args:
        function: maps a sequence of trajectories to as many numbers or scores; may be a coroutine function and may
            have a keyword ``progress``.
        name: default: the function's ``name``, ``__name__`` or class.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        on_error: OnError | None = None,
        timeout: float | None = None,
    ) -> None:
        label = getattr(function, "name", None) or getattr(function, "__name__", type(function).__name__)
        given: OnError = getattr(function, "on_error", "raise") if on_error is None else on_error
        super().__init__(name=name or str(label), on_error=given, timeout=timeout)
        self.function = function
        self.gives = getattr(function, "gives", None)
        self._progress = takes_progress(function)

    def score(self, trajectories: Sequence[Trajectory], progress: Progress | None = None) -> Any:
        """Call the function."""
        return self.function(trajectories, progress=progress) if self._progress else self.function(trajectories)

    def state_dict(self) -> dict[str, Any]:
        """State of the function, if it has any."""
        return dict(self.function.state_dict()) if hasattr(self.function, "state_dict") else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        if hasattr(self.function, "load_state_dict"):
            self.function.load_state_dict(state)


def as_reward(value: Any, *, timeout: float | None = None) -> Reward:
    """A reward as it is; any other callable on trajectories as a :class:`FunctionReward`.

    Raises:
        ConfigError: it cannot be called.
    """
    if isinstance(value, Reward):
        return value
    if not callable(value):
        raise ConfigError(
            f"a reward is a guerdon reward or a callable on trajectories, got {type(value).__name__}; "
            "see guerdon.rewards.Reward"
        )
    return FunctionReward(value, timeout=timeout)


class Weighted(Reward):
    """A weighted sum of rewards; every term's value is a named part.

    A term without a valid score makes the sum invalid: leaving it out would let the trajectory compete with
    others that were scored in full.

    Args:
        terms: rewards with their weights.
        on_error: ``None`` follows the term that failed; anything else overrides the terms.
    """

    def __init__(
        self,
        terms: Sequence[tuple[Reward, float]],
        *,
        name: str | None = None,
        on_error: OnError | None = None,
    ) -> None:
        super().__init__(name=name or " + ".join(r.name for r, _ in terms), on_error=on_error or "raise")
        self.on_error: OnError | None = on_error  # type: ignore[assignment]
        self.terms = list(terms)
        self.range = (
            sum(min(w * b for b in r.range) for r, w in terms),
            sum(max(w * b for b in r.range) for r, w in terms),
        )
        known = [r.gives for r, _ in terms]
        self.gives = None if None in known else frozenset().union(*(k for k in known if k))

    def score(self, trajectories: Sequence[Trajectory], progress: Progress | None = None) -> list[Score]:
        """Sum the terms' outcomes; step and token values are summed where the terms agree on their spans."""
        return self.assess(trajectories, progress=progress)[0]

    def assess(
        self, trajectories: Sequence[Trajectory], *, progress: Progress | None = None
    ) -> tuple[list[Score], list[bool]]:
        """As :meth:`Reward.assess`; a term's failure is the sum's, and is counted with the term."""
        columns = [reward.assess(trajectories, progress=progress) for reward, _ in self.terms]
        names = unique_names([reward.name for reward, _ in self.terms])
        weights = [w for _, w in self.terms]
        scores: list[Score] = []
        fatal: list[bool] = []
        for k in range(len(trajectories)):
            row = [found[k] for found, _ in columns]
            score = _sum(row, weights, names)
            ends = any(flags[k] for _, flags in columns)
            if not score.valid and all(s.valid for s in row):
                self.failures["span"] += 1
                ends = True
            if not score.valid and self.on_error is not None:
                ends = self.on_error == "raise"
                if not isinstance(self.on_error, str):
                    score = Score(float(self.on_error), parts={**_finite(score.parts), f"{self.name}/failed": 1.0})
            scores.append(score)
            fatal.append(not score.valid and ends)
        return scores, fatal

    def state_dict(self) -> dict[str, Any]:
        """State of every term."""
        return {str(k): reward.state_dict() for k, (reward, _) in enumerate(self.terms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore every term."""
        for k, (reward, _) in enumerate(self.terms):
            reward.load_state_dict(state[str(k)])


def _sum(row: Sequence[Score], weights: Sequence[float], names: Sequence[str]) -> Score:
    parts: dict[str, float] = {}
    for name, score in zip(names, row, strict=True):
        parts[name] = score.value
        for key, part in score.parts.items():
            parts[f"{name}/{key}"] = part
    if all(_is_plain(score) for score in row):
        return Score(sum(w * s.value for w, s in zip(weights, row, strict=True)), parts=parts)
    bad = next((s for s in row if not s.valid), None)
    if bad is not None:
        return Score.invalid(bad.reason or "a term is invalid", **parts)
    value = sum(w * s.value for w, s in zip(weights, row, strict=True))
    spans = [s.step_spans for s in row if s.step_spans is not None]
    steps = tokens = None
    if spans and all(s == spans[0] for s in spans):
        stepped = [(w, s.steps) for w, s in zip(weights, row, strict=True) if s.steps is not None]
        steps = tuple(sum(w * x[k] for w, x in stepped) for k in range(len(spans[0])))
    elif spans:
        return Score.invalid("terms with step rewards disagree about the steps; give them one segmenter", **parts)
    tokened = [(w, s.tokens) for w, s in zip(weights, row, strict=True) if s.tokens is not None]
    if tokened:
        if len({len(t) for _, t in tokened}) > 1:
            return Score.invalid("terms with token rewards disagree about the number of tokens", **parts)
        tokens = tuple(sum(w * t[k] for w, t in tokened) for k in range(len(tokened[0][1])))
    return Score(value, steps, spans[0] if steps is not None else None, tokens, parts)


def _terms(reward: Any) -> list[tuple[Reward, float]]:
    if isinstance(reward, Weighted):
        return list(reward.terms)
    if isinstance(reward, Reward):
        return [(reward, 1.0)]
    raise ConfigError(f"a reward can only be added to a reward, got {type(reward).__name__}")


def unique_names(names: Sequence[str]) -> list[str]:
    """The names under which the terms of a sum are its parts: a second ``a`` is ``a#2``."""
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return out


def reward_values(scores: Sequence[Score]) -> list[float]:
    """Outcome values; NaN where a score is invalid."""
    return [s.value for s in scores]
