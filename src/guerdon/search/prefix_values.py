"""What is a prefix of a solution worth? The one Monte Carlo estimator, with a cache and a budget.

The value of a prefix is the chance that a policy which goes on from it ends with a right answer. Process labels,
progress rewards, tree search and the search for a first error all ask it here.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from guerdon.errors import ConfigError, DataError
from guerdon.rewards.base import Reward
from guerdon.rollout.loop import derive_seed
from guerdon.search.prefixes import Prefix, prefixes_of
from guerdon.types import Segmenter, Trajectory

__all__ = ["Estimate", "PrefixValues", "mc_values", "step_estimates"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is known of one prefix.

    Args:
        successes: sum of what the verifier said about the rollouts (right answers, where it says 0 or 1).
        n: number of rollouts; 0 means that nothing is known.
        exact: the solution had ended, so the verifier has said all there is to say.
        samples: the rollouts, where they are kept.
    """

    successes: float = 0.0
    n: int = 0
    exact: bool = False
    samples: tuple[Any, ...] = ()

    @property
    def value(self) -> float:
        """Share of successes; NaN without a rollout: missing is not 0."""
        return self.successes / self.n if self.n else math.nan

    def hard(self, threshold: float = 0.0) -> bool | None:
        """Whether the share of successes exceeds a threshold (by default: any success); None without a rollout."""
        return self.value > threshold if self.n else None


class PrefixValues:
    """Monte Carlo values of prefixes.

    Args:
        sampler: an :class:`~guerdon.search.EngineSampler`, or any callable of that form ``(prefixes, counts, seeds) ->
            list of lists``; or a plain function ``(prefix, n)`` that returns ``n`` completions of one prefix, which may
            then be of any kind (text, say).
        verify: what a rollout is worth, in [0, 1]: a :class:`~guerdon.rewards.Reward` (its outcome; trajectories only),
            a function of a rollout, or a function ``(prefix, rollout)``.
        n: rollouts of a prefix.
        budget: most rollouts in all; None for no limit. What is asked beyond it stays missing.
        keep_samples: keep the rollouts in the estimates.
        seed: of all rollouts. A prefix's rollouts depend on it, on the prefix and on their number alone: asking in
            another order, or for more later, gives the same ones.
        on_error: a verifier that raises: ``"raise"``, or ``"wrong"`` (the rollout counts as 0). Either way it is counted
            in :attr:`failures`.

    Attributes:
        rollouts: how many were spent.
        failures: verifier failures by kind.

    Raises:
        ConfigError: n below 1, a negative budget, or ``on_error`` is none of these.
    """

    def __init__(
        self,
        sampler: Callable[..., Any],
        verify: Callable[..., Any],
        *,
        n: int = 8,
        budget: int | None = None,
        keep_samples: bool = False,
        seed: int = 0,
        on_error: Literal["raise", "wrong"] = "raise",
    ) -> None:
        if n < 1:
            raise ConfigError(f"n must be at least 1 rollout, got {n}")
        if budget is not None and budget < 0:
            raise ConfigError(f"budget must not be negative, got {budget}")
        if on_error not in ("raise", "wrong"):
            raise ConfigError(f"on_error must be 'raise' or 'wrong', got {on_error!r}")
        self.sampler, self.verify = sampler, verify
        self.n, self.budget, self.keep_samples = n, budget, keep_samples
        self.seed, self.on_error = seed, on_error
        self.rollouts = 0
        self.failures: Counter[str] = Counter()
        self._batched = _takes(sampler, 3)
        self._with_prefix = not isinstance(verify, Reward) and _takes(verify, 2)
        self._cache: dict[Hashable, Estimate] = {}

    def __len__(self) -> int:
        """Number of prefixes with an estimate."""
        return len(self._cache)

    @property
    def left(self) -> float:
        """Rollouts that may still be spent."""
        return math.inf if self.budget is None else max(0, self.budget - self.rollouts)

    def known(self, prefix: Any) -> Estimate | None:
        """What the cache holds for a prefix; None where it has never been asked for."""
        return self._cache.get(_key(prefix))

    def estimate(self, prefixes: Sequence[Any], n: int | None = None) -> list[Estimate]:
        """Estimates of at least ``n`` rollouts each, as far as the budget goes; in order.

        Rollouts that the cache holds count; only missing ones are sampled, all prefixes in one call. An ended prefix is
        verified itself and costs nothing. The budget is spent in order, so prefixes at the end may get fewer or none.
        """
        want = self.n if n is None else n
        if want < 1:
            raise ConfigError(f"n must be at least 1 rollout, got {want}")
        order: dict[Hashable, Any] = {}
        for prefix in prefixes:
            order.setdefault(_key(prefix), prefix)
        asked: list[tuple[Hashable, Any, int]] = []
        left = self.left
        for key, prefix in order.items():
            now = self._cache.get(key, Estimate())
            if now.exact:
                continue
            if getattr(prefix, "ended", False):
                whole = prefix.trajectory()
                self._cache[key] = Estimate(self._judge(prefix, [whole])[0], 1, True, self._kept([whole]))
                continue
            missing = int(min(max(0, want - now.n), left))
            left -= missing
            if missing:
                asked.append((key, prefix, missing))
        if asked:
            self._sample(asked)
        return [self._cache.get(_key(prefix), Estimate()) for prefix in prefixes]

    def values(self, prefixes: Sequence[Any], n: int | None = None) -> Tensor:
        """``[P]`` float64 shares of success; NaN where nothing is known."""
        return torch.tensor([e.value for e in self.estimate(prefixes, n)], dtype=torch.float64)

    def _sample(self, asked: Sequence[tuple[Hashable, Any, int]]) -> None:
        if self._batched:
            # A prefix that is asked again goes on in its own sequence of rollouts.
            seeds = [derive_seed(self.seed, key, self._cache.get(key, Estimate()).n) for key, _, _ in asked]
            made = self.sampler([p for _, p, _ in asked], [c for _, _, c in asked], seeds)
        else:
            made = [self.sampler(prefix, count) for _, prefix, count in asked]
        if len(made) != len(asked):
            raise DataError(f"the sampler returned rollouts of {len(made)} prefixes for {len(asked)}")
        for (key, prefix, count), rollouts in zip(asked, made, strict=True):
            rollouts = list(rollouts)
            if len(rollouts) != count:
                raise DataError(f"the sampler returned {len(rollouts)} rollouts of a prefix, {count} were asked for")
            self.rollouts += count
            now = self._cache.get(key, Estimate())
            gained = sum(self._judge(prefix, rollouts))
            self._cache[key] = Estimate(
                now.successes + gained, now.n + count, False, (*now.samples, *self._kept(rollouts))
            )

    def _kept(self, rollouts: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(rollouts) if self.keep_samples else ()

    def _judge(self, prefix: Any, rollouts: Sequence[Any]) -> list[float]:
        if isinstance(self.verify, Reward):
            scores = self.verify(list(rollouts))
            return [self._number(s.value if s.valid else None, prefix, s.reason or "") for s in scores]
        out = []
        for rollout in rollouts:
            try:
                value = self.verify(prefix, rollout) if self._with_prefix else self.verify(rollout)
            except Exception as error:
                self.failures[type(error).__name__] += 1
                if self.on_error == "raise":
                    raise DataError(
                        f"the verifier raised {type(error).__name__}: {error}; mend it, or count such rollouts as wrong "
                        "with on_error='wrong'"
                    ) from error
                value = 0.0
            out.append(self._number(value, prefix, ""))
        return out

    def _number(self, value: Any, prefix: Any, reason: str) -> float:
        try:
            number = float(getattr(value, "value", value))
        except (TypeError, ValueError):
            number = math.nan
        if 0.0 <= number <= 1.0:
            return number
        self.failures["not a share"] += 1
        if self.on_error == "raise":
            raise DataError(f"the verifier must say a number in [0, 1], got {value!r} {reason}".rstrip())
        return 0.0


def mc_values(sampler: Callable[..., Any], prefixes: Sequence[Any], verify: Callable[..., Any], n: int = 8) -> Tensor:
    """``Q_mc``: the share of right answers among ``n`` rollouts from each prefix, ``[P]`` float64.

    A thin layer on :class:`PrefixValues` (sampler and verify as there) without cache, budget or kept rollouts.

    Source: Setlur et al. 2024 (arXiv 2410.08146), section 4; Wang et al. 2024 (Math-Shepherd, arXiv 2312.08935).
    """
    return PrefixValues(sampler, verify, n=n).values(prefixes)


def step_estimates(
    values: PrefixValues,
    trajectories: Sequence[Trajectory],
    segmenter: Segmenter,
    *,
    n: int | None = None,
    first_pit: bool = False,
) -> list[list[Estimate]]:
    """Estimates of the empty prefix and of each step's end, ``S + 1`` per trajectory.

    Args:
        values: the estimator.
        trajectories: solutions in one policy turn.
        segmenter: cuts them.
        n: rollouts of a prefix.
        first_pit: go on along a solution only until the first prefix without any success; every later one is taken to
            have none either (``successes=0`` with the pit's ``n``), the end included, and costs nothing.
    """
    rows = [prefixes_of(t, segmenter) for t in trajectories]
    if not first_pit:
        flat = values.estimate([p for row in rows for p in row], n)
        out, at = [], 0
        for row in rows:
            out.append(flat[at : at + len(row)])
            at += len(row)
        return out
    done: list[list[Estimate]] = [[] for _ in rows]
    for k in range(max(map(len, rows), default=0)):
        live = [r for r, row in enumerate(rows) if k < len(row) and not (done[r] and _dead(done[r][-1]))]
        made = dict(zip(live, values.estimate([rows[r][k] for r in live], n), strict=True))
        for r, row in enumerate(rows):
            if k < len(row):
                done[r].append(made[r] if r in made else Estimate(0.0, done[r][-1].n))
    return done


def _dead(estimate: Estimate) -> bool:
    return estimate.n > 0 and estimate.successes == 0


def _key(prefix: Any) -> Hashable:
    if isinstance(prefix, Prefix):
        return prefix.key
    try:
        hash(prefix)
    except TypeError:
        return repr(prefix)
    return prefix


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a callable wants (at least) so many positional arguments."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) >= count
