"""What every reward is: a callable on trajectories, usable on plain strings, composable with + and *."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from guerdon.errors import ConfigError, GuerdonError, RewardError
from guerdon.types import Score, StopReason, Task, Trajectory, Turn, validate_score

__all__ = ["Reward", "Weighted", "reward_values"]

OnError = Literal["raise", "drop"] | float


class Reward:
    """Base class. A subclass overrides :meth:`score` (a batch) or :meth:`score_one` (one trajectory).

    Args:
        name: under which it appears in logs, parts and errors; the class's name by default.
        on_error: what an exception, ``None``, NaN, a wrong type or a wrong number of scores means:
            ``"raise"`` a :class:`~guerdon.errors.RewardError` that names reward and task, ``"drop"`` an
            invalid score (a trainer leaves such a trajectory out), or a number that is used instead. Every
            failure is counted in :attr:`failures`.

    Attributes:
        range: lowest and highest value that the reward can take.
        failures: number of failures by kind since the reward was made.
    """

    range: tuple[float, float] = (-math.inf, math.inf)

    def __init__(self, *, name: str | None = None, on_error: OnError = "raise") -> None:
        if isinstance(on_error, str) and on_error not in ("raise", "drop"):
            raise ConfigError(f"on_error must be 'raise', 'drop' or a number, got {on_error!r}")
        self.name = name or type(self).__name__
        self.on_error: OnError = on_error
        self.failures: Counter[str] = Counter()

    def score_one(self, trajectory: Trajectory) -> Any:
        """Score one trajectory: a number or a :class:`~guerdon.types.Score`; may be a coroutine function."""
        raise TypeError(f"{type(self).__name__} must override score_one or score")

    def score(self, trajectories: Sequence[Trajectory]) -> Any:
        """Score a batch, in order; may be a coroutine function."""
        return [self.score_one(t) for t in trajectories]

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Score trajectories; failures are handled as :attr:`on_error` says, never as a silent 0."""
        return self._checked(trajectories, self._run(trajectories))

    def text(self, *, completion: str, reference: Any = None, prompt: str = "", **info: Any) -> Score:
        """Score a plain string as if a policy had written it in one turn."""
        task = Task("text", prompt, reference)
        return self([Trajectory(task, (Turn("policy", completion),), StopReason.DONE, info=info)])[0]

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

    def _run(self, trajectories: Sequence[Trajectory]) -> list[Any]:
        try:
            raw = self.score(trajectories)
            if inspect.isawaitable(raw):
                raw = _wait(raw)
            raw = list(raw)
            if any(inspect.isawaitable(r) for r in raw):
                raw = _wait(_settle(raw))
        except GuerdonError as error:
            raw = self._each(trajectories, error)
        except Exception as error:  # noqa: BLE001  a user's reward may raise anything; it is named and counted
            raw = self._each(trajectories, error)
        if len(raw) != len(trajectories):
            return [
                Score.invalid(f"reward {self.name!r} returned {len(raw)} scores for {len(trajectories)} trajectories")
            ] * len(trajectories)
        return raw

    def _each(self, trajectories: Sequence[Trajectory], error: Exception) -> list[Any]:
        """The batch failed as a whole: find out which trajectories it was."""
        if type(self).score is not Reward.score or len(trajectories) == 1:
            return [self._invalid(error, t) for t in trajectories]
        out: list[Any] = []
        for trajectory in trajectories:
            try:
                value = self.score_one(trajectory)
                out.append(_wait(value) if inspect.isawaitable(value) else value)
            except Exception as single:  # noqa: BLE001  as above
                out.append(self._invalid(single, trajectory))
        return out

    def _invalid(self, error: Exception, trajectory: Trajectory) -> Score:
        return Score.invalid(
            f"reward {self.name!r} raised {type(error).__name__} for task {trajectory.task.id!r}: {error}"
        )

    def _checked(self, trajectories: Sequence[Trajectory], raw: Sequence[Any]) -> list[Score]:
        out: list[Score] = []
        for trajectory, value in zip(trajectories, raw, strict=True):
            score = validate_score(value, reward=self.name, task_id=trajectory.task.id)
            if not score.valid:
                self.failures["raised" if "raised" in (score.reason or "") else "invalid"] += 1
                if self.on_error == "raise":
                    raise RewardError(score.reason)
                if not isinstance(self.on_error, str):
                    score = Score(float(self.on_error), parts={**score.parts, f"{self.name}/failed": 1.0})
            out.append(score)
        return out


class Weighted(Reward):
    """A weighted sum of rewards; every term's value is a named part.

    A term without a valid score makes the sum invalid: leaving it out would let the trajectory compete with
    others that were scored in full.
    """

    def __init__(
        self, terms: Sequence[tuple[Reward, float]], *, name: str | None = None, on_error: OnError = "raise"
    ) -> None:
        super().__init__(name=name or " + ".join(r.name for r, _ in terms), on_error=on_error)
        self.terms = list(terms)
        self.range = (
            sum(min(w * b for b in r.range) for r, w in terms),
            sum(max(w * b for b in r.range) for r, w in terms),
        )

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Sum the terms' outcomes; step and token values are summed where the terms agree on their spans."""
        columns = [reward(trajectories) for reward, _ in self.terms]
        names = _unique([reward.name for reward, _ in self.terms])
        weights = [w for _, w in self.terms]
        return [_sum(row, weights, names) for row in zip(*columns, strict=True)]

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
        parts.update({f"{name}/{k}": v for k, v in score.parts.items()})
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


def _unique(names: Sequence[str]) -> list[str]:
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return out


async def _settle(raw: Sequence[Any]) -> list[Any]:
    async def one(value: Any) -> Any:
        return await value if inspect.isawaitable(value) else value

    return list(await asyncio.gather(*(one(v) for v in raw)))


def _wait(awaitable: Any) -> Any:
    """Run an awaitable to its end, from inside a running loop's thread as well."""
    import threading

    async def run() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(run())
    box: dict[str, Any] = {}

    def work() -> None:
        try:
            box["value"] = asyncio.run(run())
        except BaseException as error:  # noqa: BLE001  carried over to the waiting thread
            box["error"] = error

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if "error" in box:
        raise box["error"]
    return box["value"]


def reward_values(scores: Sequence[Score]) -> list[float]:
    """Outcome values; NaN where a score is invalid."""
    return [s.value for s in scores]
