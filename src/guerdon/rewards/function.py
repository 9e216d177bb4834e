"""``@gd.reward``: a plain function becomes a reward: named, composable, checked, with a declared range.

@gd.reward(range=(0, 1))
def mentions(completion: str, reference: str) -> float:
    return float(reference in completion)

total = mentions + 0.2 * gd.rewards.TagFormat("think", "answer")
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from guerdon.errors import ConfigError
from guerdon.rewards.base import OnError, Progress, Reward
from guerdon.types import Score, Trajectory, policy_text

__all__ = ["PlainFunction", "reward"]

_KNOWN = ("completion", "reference", "prompt", "trajectory", "task", "meta", "progress")


class PlainFunction(Reward):
    """A function of named arguments as a reward; made by :func:`reward`.

    The function is still callable as itself: with keywords, ``mentions(completion="...", reference="...")``.

    Args:
        function: see :func:`reward`.
        range, batched, name, on_error, timeout, workers: likewise.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        range: tuple[float, float] = (-math.inf, math.inf),
        batched: bool = False,
        name: str | None = None,
        on_error: OnError = "raise",
        timeout: float | None = None,
        workers: int | None = None,
    ) -> None:
        label = name or getattr(function, "__name__", type(function).__name__)
        super().__init__(name=label, on_error=on_error, timeout=timeout, workers=workers)
        if len(range) != 2 or not range[0] < range[1]:
            raise ConfigError(f"range must be two increasing numbers, got {range!r}")
        self.range = (float(range[0]), float(range[1]))
        self.function, self.batched = function, batched
        self.__doc__ = function.__doc__
        parameters = inspect.signature(function).parameters.values()
        self._wanted: list[str] = []
        self._meta: dict[str, Any] = {}
        for p in parameters:
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY):
                raise ConfigError(
                    f"reward {label!r}: arguments are named, so *args, **kwargs and positional-only ones cannot be filled"
                )
            if p.name in _KNOWN:
                self._wanted.append(p.name)
            else:
                self._meta[p.name] = p.default

    def _arguments(self, t: Trajectory, progress: Progress | None) -> dict[str, Any]:
        values: dict[str, Any] = {
            "completion": lambda: policy_text(t),
            "reference": lambda: t.task.reference,
            "prompt": lambda: t.task.question,
            "trajectory": lambda: t,
            "task": lambda: t.task,
            "meta": lambda: t.task.meta,
            "progress": lambda: progress,
        }
        out = {name: values[name]() for name in self._wanted}
        for name, default in self._meta.items():
            if name in t.task.meta:
                out[name] = t.task.meta[name]
            elif default is inspect.Parameter.empty:
                raise ConfigError(
                    f"reward {self.name!r} wants {name!r}, which is none of {', '.join(_KNOWN)}, and task {t.task.id!r} has "
                    f"no meta[{name!r}]; give it a default, or put it into the tasks"
                )
            else:
                out[name] = default
        return out

    def _within(self, value: Any) -> Any:
        number = value.value if isinstance(value, Score) and value.valid else value
        low, high = self.range
        if isinstance(number, int | float) and math.isfinite(number) and not low - 1e-9 <= number <= high + 1e-9:
            raise ValueError(f"{number} lies outside the declared range [{low:g}, {high:g}]")
        return value

    def score(self, trajectories: Sequence[Trajectory], progress: Progress | None = None) -> Any:
        """Call the function for each trajectory, or once with lists where it is batched."""
        rows = [self._arguments(t, progress) for t in trajectories]
        if not self.batched:
            return [self._caught(row) for row in rows]
        names = [*self._wanted, *self._meta]
        columns = {n: progress if n == "progress" else [row[n] for row in rows] for n in names}
        made = self.function(**columns)
        if inspect.isawaitable(made):
            return self._batch_later(made)
        return [self._within(v) for v in made]

    async def _batch_later(self, made: Any) -> list[Any]:
        return [self._within(v) for v in await made]

    def _caught(self, row: dict[str, Any]) -> Any:
        """What the function makes of one row; its exception in place, so that one failure is not the batch's."""
        try:
            return self._one(row)
        except Exception as error:  # noqa: BLE001  handed to the base class, which names and counts it
            return error

    def _one(self, row: dict[str, Any]) -> Any:
        made = self.function(**row)
        return self._later(made) if inspect.isawaitable(made) else self._within(made)

    async def _later(self, made: Any) -> Any:
        return self._within(await made)

    def score_one(self, trajectory: Trajectory) -> Any:
        return self._one(self._arguments(trajectory, None))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Score trajectories, or call the function itself with keywords."""
        if not args and set(kwargs) - {"progress"}:
            return self.function(**kwargs)
        return super().__call__(*args, **kwargs)


def reward(
    function: Callable[..., Any] | None = None,
    *,
    range: tuple[float, float] = (-math.inf, math.inf),
    batched: bool = False,
    name: str | None = None,
    on_error: OnError = "raise",
    timeout: float | None = None,
    workers: int | None = None,
) -> Any:
    """Decorate a function of any of ``completion`` (what the policy wrote), ``reference``, ``prompt``, ``trajectory``, ``task``,
    ``meta`` and ``progress``; any other parameter is read from ``task.meta``.

    Args:
        function: returns a number or a :class:`~guerdon.types.Score`; may be a coroutine function.
        range: lowest and highest value; a value outside is a failure.
        batched: the function takes lists, one entry per trajectory (``progress`` excepted), and returns one.
        name, on_error, timeout, workers: see :class:`~guerdon.rewards.Reward`.

    Raises:
        ConfigError: parameters that cannot be filled by name, a range that is none.
    """
    settings: dict[str, Any] = {
        "range": range, "batched": batched, "name": name, "on_error": on_error, "timeout": timeout, "workers": workers,
    }  # fmt: skip
    if function is None:
        return lambda f: PlainFunction(f, **settings)
    return PlainFunction(function, **settings)
