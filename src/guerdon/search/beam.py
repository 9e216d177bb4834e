"""Beam search over steps: every beam samples next steps, all candidates are scored, the best stay.

Used with the effective reward of a step (its value to the policy plus its progress under a prover), with the value of a
prefix, or with any other score. Source: Setlur et al. 2024 (arXiv 2410.08146), section 4.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from guerdon.errors import ConfigError, DataError
from guerdon.rollout.loop import derive_seed
from guerdon.search.prefixes import EngineSampler

__all__ = ["Beam", "BeamResult", "EffectiveReward", "beam_search", "beam_searches"]


@dataclass(frozen=True, slots=True)
class Beam:
    """A partial (or whole) solution in the beam.

    Args:
        state: the prefix (whatever the sampler deals in).
        score: by which it was kept.
        tie: by which equal scores are told apart, greater first.
        ended: nothing follows.
    """

    state: Any
    score: float
    tie: float = 0.0
    ended: bool = False


@dataclass(frozen=True, slots=True)
class BeamResult:
    """What a beam search found.

    Args:
        best: the chosen solution; None where no beam ended (see ``beams``).
        score: its final score; NaN where there is none.
        beams: the last beam, best first.
        steps: rounds of expansion.
        candidates: how many candidates were sampled, duplicates included.
        cut: the search stopped at its limit of steps with beams that had not ended.
    """

    best: Any
    score: float
    beams: tuple[Beam, ...]
    steps: int
    candidates: int
    cut: bool


class EffectiveReward:
    """``E = Q^pi + alpha * A^mu`` of candidates, with ``Q^pi`` to break ties.

    Args:
        base: values under the policy: ``base.prefix_values(prefixes) -> [P]``, or a function of that form.
        prover: values under the prover, likewise. ``None`` leaves progress out (then ``E = Q^pi``).
        alpha: weight of the progress, at least 0; 0.5 is usual in search.

    A prefix's value is computed once.
    """

    def __init__(self, base: Any, prover: Any = None, alpha: float = 0.5) -> None:
        if not (alpha >= 0 and math.isfinite(alpha)):
            raise ConfigError(f"alpha must be at least 0 and finite, got {alpha}")
        self.base, self.prover, self.alpha = _Cached(base), None if prover is None else _Cached(prover), alpha

    def __call__(self, states: Sequence[Any], parents: Sequence[Any]) -> list[tuple[float, float]]:
        """``(E, Q^pi)`` of each candidate, given the beam that it extends."""
        q = self.base(states)
        if self.prover is None:
            return [(v, v) for v in q]
        after, before = self.prover(states), self.prover(parents)
        return [(v + self.alpha * (a - b), v) for v, a, b in zip(q, after, before, strict=True)]


class _Cached:
    def __init__(self, values: Any) -> None:
        self._values = getattr(values, "prefix_values", values)
        self._known: dict[Any, float] = {}

    def __call__(self, states: Sequence[Any]) -> list[float]:
        keys = [_key(s) for s in states]
        new = {k: s for k, s in zip(keys, states, strict=True) if k not in self._known}
        if new:
            self._known.update(zip(new, map(float, self._values(list(new.values()))), strict=True))
        return [self._known[k] for k in keys]


def beam_search(
    sampler: Any,
    score_fn: Callable[..., Sequence[Any]],
    beam: int,
    expand: int,
    final_score: Callable[[Any], float] | None = None,
    *,
    root: Any = "",
    max_steps: int = 32,
    dedup: bool = True,
    seed: int = 0,
) -> BeamResult:
    """Search for one solution.

    Args:
        sampler: an :class:`~guerdon.search.EngineSampler` (whose prefixes know whether they have ended); or a function
            ``(state, n)`` that returns ``n`` states, each extending ``state`` by a step. A state has ended where it has
            an attribute ``ended`` that is true, or where the sampler returns no state, or the state itself.
        score_fn: ``(states)`` or ``(states, parents)`` to a number each, or a pair of a number and one that breaks ties.
        beam: how many stay.
        expand: steps sampled from each.
        final_score: chooses among the solutions that have ended (an outcome verifier); default: the beam's own score.
        root: where the search begins: the empty prefix of a task (``sampler.root(task)``), or a text.
        max_steps: rounds at most.
        dedup: candidates with equal text (or equal states) count once; the first of them stays.
        seed: of an engine sampler's draws.

    Returns:
        See :class:`BeamResult`. Ties go by the second number, then to the candidate that came first. A finished solution
        stays a candidate with the score that it had, and may be displaced by others.

    Raises:
        ConfigError: beam, expand or max_steps below 1.
        DataError: another number of scores than of candidates, or a score that is NaN.
    """
    return beam_searches(
        sampler, score_fn, beam, expand, final_score, roots=[root], max_steps=max_steps, dedup=dedup, seed=seed
    )[0]


def beam_searches(
    sampler: Any,
    score_fn: Callable[..., Sequence[Any]],
    beam: int,
    expand: int,
    final_score: Callable[[Any], float] | None = None,
    *,
    roots: Sequence[Any],
    max_steps: int = 32,
    dedup: bool = True,
    seed: int = 0,
) -> list[BeamResult]:
    """:func:`beam_search` for many roots at once: one call of sampler and scorer a round. Results as for each alone."""
    for name, value in (("beam", beam), ("expand", expand), ("max_steps", max_steps)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    beams: list[list[Beam]] = [[Beam(root, math.nan, 0.0, _ended(root))] for root in roots]
    counts, rounds = [0] * len(roots), [0] * len(roots)
    for step in range(max_steps):
        live = [(r, b) for r, row in enumerate(beams) for b in row if not b.ended]
        if not live:
            break
        made = _expand(sampler, [b.state for _, b in live], expand, derive_seed(seed, step))
        fresh: list[list[tuple[Any, Any]]] = [[] for _ in roots]
        stuck: list[list[Beam]] = [[] for _ in roots]
        for (r, b), states in zip(live, made, strict=True):
            counts[r] += len(states)
            rounds[r] = step + 1
            onwards = [s for s in states if _key(s) != _key(b.state)]
            if len(onwards) < len(states) or not states:
                # Nothing can follow: it is a solution as it stands.
                stuck[r].append(Beam(b.state, b.score, b.tie, True))
            fresh[r] += [(s, b.state) for s in onwards]
        if dedup:
            fresh = [_distinct(row) for row in fresh]
        flat = [pair for row in fresh for pair in row]
        scored = iter(_scores(score_fn, flat))
        for r, row in enumerate(fresh):
            if not row and not stuck[r]:
                continue
            candidates = [b for b in beams[r] if b.ended] + stuck[r]
            candidates += [Beam(s, *next(scored), _ended(s)) for s, _ in row]
            candidates.sort(key=lambda b: (-_or_least(b.score), -b.tie))
            beams[r] = candidates[:beam]
    return [_result(row, final_score, rounds[r], counts[r]) for r, row in enumerate(beams)]


def _expand(sampler: Any, states: Sequence[Any], n: int, seed: int) -> list[list[Any]]:
    if isinstance(sampler, EngineSampler) or hasattr(sampler, "steps"):
        seeds = [derive_seed(seed, _key(s)) for s in states]
        return sampler.steps(states, [n] * len(states), seeds)
    return [list(sampler(state, n)) for state in states]


def _scores(score_fn: Callable[..., Sequence[Any]], pairs: Sequence[tuple[Any, Any]]) -> list[tuple[float, float]]:
    if not pairs:
        return []
    states, parents = [s for s, _ in pairs], [p for _, p in pairs]
    raw = list(score_fn(states, parents) if _two(score_fn) else score_fn(states))
    if len(raw) != len(states):
        raise DataError(f"score_fn returned {len(raw)} scores for {len(states)} candidates")
    out = []
    for value in raw:
        score, tie = value if isinstance(value, tuple | list) else (value, 0.0)
        if math.isnan(float(score)) or math.isnan(float(tie)):
            raise DataError("score_fn returned NaN for a candidate; a value that is missing cannot be ranked")
        out.append((float(score), float(tie)))
    return out


def _distinct(pairs: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    seen: dict[Any, tuple[Any, Any]] = {}
    for state, parent in pairs:
        text = getattr(state, "text", None)
        key = _key(state) if text is None else (getattr(state, "task", None) and state.task.id, text, _ended(state))
        seen.setdefault(key, (state, parent))
    return list(seen.values())


def _result(row: Sequence[Beam], final_score: Callable[[Any], float] | None, steps: int, candidates: int) -> BeamResult:
    done = [b for b in row if b.ended]
    best, score = None, math.nan
    if done:
        finals = [b.score if final_score is None else float(final_score(b.state)) for b in done]
        k = max(range(len(done)), key=lambda i: (_or_least(finals[i]), done[i].tie, -i))
        best, score = done[k].state, finals[k]
    return BeamResult(best, score, tuple(row), steps, candidates, len(done) < len(row))


def _or_least(score: float) -> float:
    """The root has no score; if nothing follows it, it stands behind everything."""
    return -math.inf if math.isnan(score) else score


def _ended(state: Any) -> bool:
    return bool(getattr(state, "ended", False))


def _key(state: Any) -> Any:
    key = getattr(state, "key", None)
    if key is not None:
        return key
    try:
        hash(state)
    except TypeError:
        return repr(state)
    return state


def _two(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters) >= 2
