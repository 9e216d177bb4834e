"""Relevance as a reward without preferences, regularised by what blocks each way round it.

Relevance alone is had by copying the query, with a length incentive by repeating oneself, with a repetition term by
missing the point of closed questions; so those are scored by their relevance to a reference, brought to the same scale.

Source: Kim and Seo 2024, "Regularized Relevance Reward" (arXiv 2402.03469).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from guerdon.errors import ConfigError, DataError
from guerdon.rewards.base import OnError, Reward
from guerdon.rewards.plain import RewardBatch, TextReward
from guerdon.types import Score, Task, Trajectory, policy_text

__all__ = [
    "MARKERS",
    "EmbeddingRelevance",
    "LengthIncentive",
    "Product",
    "QuantileAffine",
    "RegularizedRelevance",
    "Routed",
    "TrigramUniqueness",
    "length_incentive",
    "ngram_uniqueness",
]

Encode = Callable[[Sequence[str]], Any]
"""``B`` texts to ``[B, D]`` embeddings; it truncates to its own limit."""

QueryType = Literal["open", "closed"]

MARKERS = (
    "<|im_start|>assistant", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<bos>",
    "<eos>", "</s>",
)  # fmt: skip
"""Marks of chat formats that are no part of a response."""


def length_incentive(text: str, unit: float = 100.0) -> float:
    """Words (separated by blanks) over ``unit``, without a cap."""
    return len(text.split()) / unit


def ngram_uniqueness(text: str, n: int = 3, *, lowercase: bool = False) -> float:
    """Distinct word n-grams over all of them, in (0, 1]; 1 for fewer than ``n`` words, 0 for a blank text."""
    words = (text.lower() if lowercase else text).split()
    if not words:
        return 0.0
    if len(words) < n:
        return 1.0
    grams = [tuple(words[k : k + n]) for k in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams)


class LengthIncentive(TextReward):
    """:func:`length_incentive` of the response; unbounded above.

    Args:
        unit: words that are worth 1.
    """

    range = (0.0, math.inf)
    gives = frozenset({"outcome"})

    def __init__(self, unit: float = 100.0, *, name: str | None = None, on_error: OnError = "raise") -> None:
        super().__init__(name=name, on_error=on_error)
        if not 0 < unit < math.inf:
            raise ConfigError(f"unit must be a positive number of words, got {unit!r}")
        self.unit = float(unit)

    def score_text(self, text: str) -> float:
        return length_incentive(text, self.unit)


class TrigramUniqueness(TextReward):
    """:func:`ngram_uniqueness` of the response.

    Args:
        n: words of an n-gram.
        lowercase: ignore case.
    """

    range = (0.0, 1.0)
    gives = frozenset({"outcome"})

    def __init__(
        self, n: int = 3, lowercase: bool = False, *, name: str | None = None, on_error: OnError = "raise"
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if n < 1:
            raise ConfigError(f"n must be at least 1, got {n}")
        self.n, self.lowercase = n, lowercase

    def score_text(self, text: str) -> float:
        return ngram_uniqueness(text, self.n, lowercase=self.lowercase)


class EmbeddingRelevance(Reward):
    """Dot product of two texts' embeddings: of the query (or the reference) and the response.

    Args:
        encode: see :data:`Encode`; for example ``load_encoder("minilm").encode``, whose rows have length 1 already.
        normalise: bring embeddings to length 1 first (the cosine). ``normalize`` is understood too.
        to: ``"query"`` or ``"reference"``, on trajectories.

    A blank response gives 0. ``relevance(trajectories)``, or ``relevance(texts_a, texts_b)`` for ``[B]`` float64.
    """

    gives = frozenset({"outcome"})

    def __init__(
        self,
        encode: Encode,
        normalise: bool = False,
        *,
        to: Literal["query", "reference"] = "query",
        normalize: bool | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if not callable(encode):
            raise ConfigError(f"encode must be a function from texts to vectors, got {type(encode).__name__}")
        if to not in ("query", "reference"):
            raise ConfigError(f"to must be 'query' or 'reference', got {to!r}")
        self._encode, self.to = encode, to
        self.normalise = normalise if normalize is None else normalize
        self.range = (-1.0, 1.0) if self.normalise else (-math.inf, math.inf)

    def pairs(self, a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        """``[B]`` float64 relevance of ``b[k]`` to ``a[k]``; each distinct text is encoded once.

        Raises:
            DataError: the encoder returns another number of rows, or values that are not finite.
        """
        if len(a) != len(b):
            raise ConfigError(f"{len(a)} texts for {len(b)}")
        distinct = list(dict.fromkeys([*a, *b]))
        if not distinct:
            return np.zeros(0)
        rows = self._encode(distinct)
        table = np.asarray(rows.detach().cpu() if hasattr(rows, "detach") else rows, dtype=np.float64)
        if table.ndim != 2 or len(table) != len(distinct):
            raise DataError(f"the encoder returned shape {table.shape} for {len(distinct)} texts")
        if not np.isfinite(table).all():
            raise DataError("the encoder returned values that are not finite")
        if self.normalise:
            table = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
        at = {text: k for k, text in enumerate(distinct)}
        values = np.array([table[at[x]] @ table[at[y]] for x, y in zip(a, b, strict=True)])
        return np.where([bool(y.strip()) for y in b], values, 0.0)

    def score(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """Score a batch with one call of the encoder."""
        first = [t.task.question if self.to == "query" else _reference(t.task) for t in trajectories]
        return self.pairs(first, [policy_text(t) for t in trajectories]).tolist()

    def __call__(self, trajectories: Any, texts_b: Any = None, *, progress: Any = None) -> Any:
        """See the class."""
        if texts_b is None:
            return super().__call__(trajectories, progress=progress)
        return self.pairs(trajectories, texts_b)


def _reference(task: Task) -> str:
    if not isinstance(task.reference, str) or not task.reference.strip():
        raise DataError(f"task {task.id!r} has no reference text")
    return task.reference


class Product(Reward):
    """Product of rewards; every factor's value is a part.

    A factor without a valid score makes the product invalid.
    """

    def __init__(self, *rewards: Reward, name: str | None = None, on_error: OnError = "raise") -> None:
        super().__init__(name=name or " * ".join(r.name for r in rewards), on_error=on_error)
        if not rewards:
            raise ConfigError("a product needs at least one reward")
        self.rewards = rewards

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Multiply the outcomes."""
        columns = [r(trajectories) for r in self.rewards]
        out = []
        for row in zip(*columns, strict=True):
            parts = {r.name: s.value for r, s in zip(self.rewards, row, strict=True)}
            bad = next((s for s in row if not s.valid), None)
            if bad is not None:
                out.append(Score.invalid(bad.reason or "a factor is invalid", **parts))
            else:
                out.append(Score(math.prod(s.value for s in row), parts=parts))
        return out


class Routed(Reward):
    """The reward that a function of the task chooses.

    Args:
        route: from a task to a name.
        rewards: by name.
    """

    def __init__(
        self,
        route: Callable[[Task], str],
        rewards: Mapping[str, Reward],
        *,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        if not rewards:
            raise ConfigError("rewards must not be empty")
        self.route, self.rewards = route, dict(rewards)

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Score each branch together.

        Raises:
            DataError: the function names no reward.
        """
        chosen = [self.route(t.task) for t in trajectories]
        unknown = [c for c in chosen if c not in self.rewards]
        if unknown:
            raise DataError(f"the route {unknown[0]!r} leads nowhere; there are {', '.join(self.rewards)}")
        out: list[Score] = [Score(0.0)] * len(trajectories)
        for name in dict.fromkeys(chosen):
            index = [k for k, c in enumerate(chosen) if c == name]
            for k, s in zip(index, self.rewards[name]([trajectories[k] for k in index]), strict=True):
                out[k] = s
        return out


class QuantileAffine:
    """The increasing affine map that sends two quantiles of one sample to those of another; fitted once, then frozen.

    Args:
        q: the two quantiles.
    """

    def __init__(self, q: tuple[float, float] = (0.05, 0.95)) -> None:
        if not 0 <= q[0] < q[1] <= 1:
            raise ConfigError(f"q must be two increasing quantiles in [0, 1], got {q}")
        self.q = q
        self.scale: float | None = None
        self.shift = 0.0

    def fit(self, src: Any, dst: Any) -> QuantileAffine:
        """Fit.

        Args:
            src: values to be mapped.
            dst: values whose scale is wanted.

        Raises:
            DataError: fewer than two values, values that are not finite, or equal quantiles on either side: the map would
                not be increasing.
        """
        a, b = (np.asarray(x, dtype=np.float64).ravel() for x in (src, dst))
        if min(len(a), len(b)) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise DataError("fitting a scale needs at least two finite values on each side")
        (a_low, a_high), (b_low, b_high) = np.quantile(a, self.q), np.quantile(b, self.q)
        if not (a_high > a_low and b_high > b_low):
            raise DataError(
                "the quantiles of a side are equal, so that no increasing map exists; use more varied texts"
            )
        self.scale = float((b_high - b_low) / (a_high - a_low))
        self.shift = float(b_low - self.scale * a_low)
        return self

    def __call__(self, r: Any) -> np.ndarray:
        """Map values, ``[B]`` float64.

        Raises:
            ConfigError: not fitted.
        """
        if self.scale is None:
            raise ConfigError("the scale is not fitted; call fit first")
        return self.scale * np.asarray(r, dtype=np.float64) + self.shift

    def state_dict(self) -> dict[str, Any]:
        """The map."""
        return {"q": list(self.q), "scale": self.scale, "shift": self.shift}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.q, self.scale, self.shift = (state["q"][0], state["q"][1]), state["scale"], state["shift"]


class RegularizedRelevance(Reward):
    """Open questions: ``r_x * LI * RP``; closed ones: ``F(r_y) * RP``. A blank response gives 0.

    Args:
        encode: see :data:`Encode`.
        query_type: from a query to ``"open"`` or ``"closed"`` (a classifier run once, say); by default ``task.meta["type"]``.
        F: increasing map of r_y to the scale of the open branch, for example a fitted :class:`QuantileAffine`;
            ``"identity"`` leaves it; None is to be fitted by :meth:`fit_scale` before closed questions are scored.
        unit, n, lowercase: of the length and repetition terms.
        normalise: use the cosine.
        terms: which regularisers are used, for the ablations: any of ``"length"``, ``"repetition"``, ``"reference"``.
        missing: a closed question without a reference is an error (``"raise"``) or scored as open (``"open"``).
        markers: strings that are cut out of a response before anything is counted: marks of a chat format, the end of a
            message (``policy.control_tokens``, say). A response never includes its prompt.

    Words are counted on the whole response; the encoder cuts what is too long for it afterwards. Rewards may be whitened
    over a batch, but over both types of questions together: done for each type apart it would hide F.

    Parts: ``r_x``, ``r_y``, ``length``, ``repetition``, ``closed``. ``reward(trajectories)``, or ``reward(x, y, yhat)`` on lists of
    queries, references (None where there are none) and responses for a :class:`~guerdon.rewards.RewardBatch`.
    """

    gives = frozenset({"outcome"})

    def __init__(
        self,
        encode: Encode,
        query_type: Callable[[str], str] | None = None,
        F: Callable[[Any], Any] | Literal["identity"] | None = None,
        *,
        unit: float = 100.0,
        n: int = 3,
        lowercase: bool = False,
        normalise: bool = False,
        terms: Sequence[str] = ("length", "repetition", "reference"),
        missing: Literal["raise", "open"] = "raise",
        markers: Sequence[str] = MARKERS,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        unknown = set(terms) - {"length", "repetition", "reference"}
        if unknown:
            raise ConfigError(f"terms must be of length, repetition and reference, got {sorted(unknown)[0]!r}")
        if missing not in ("raise", "open"):
            raise ConfigError(f"missing must be 'raise' or 'open', got {missing!r}")
        if F is not None and F != "identity" and not callable(F):
            raise ConfigError(f"F must be an increasing function or 'identity', got {F!r}")
        self._relevance = EmbeddingRelevance(encode, normalise)
        self._query_type = query_type
        self.F: Any = (lambda r: np.asarray(r, dtype=np.float64)) if F == "identity" else F
        self.unit, self.n, self.lowercase = float(unit), n, lowercase
        if not 0 < unit < math.inf or n < 1:
            raise ConfigError(f"unit must be a positive number of words and n at least 1, got {unit!r} and {n!r}")
        if isinstance(markers, str):
            raise ConfigError(f"markers must be a list of strings, got the single string {markers!r}")
        self.terms, self.missing, self.markers = frozenset(terms), missing, tuple(m for m in markers if m)

    def fit_scale(self, x: Sequence[str], y: Sequence[str], sft_responses: Sequence[str]) -> QuantileAffine:
        """Fit F once on a calibration set: quantiles of r_y to those of the open branch, on the same responses.

        Args:
            x, y, sft_responses: queries, references and responses of the supervised policy, one of each.
        """
        said = [self._clean(t) for t in sft_responses]
        self.F = QuantileAffine().fit(self._relevance.pairs(y, said), self._open(x, said)[0])
        return self.F

    def _clean(self, response: str) -> str:
        for marker in self.markers:
            if marker in response:
                response = response.replace(marker, " ")
        return response

    def _open(self, x: Sequence[str], yhat: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        parts = {
            "r_x": self._relevance.pairs(x, yhat),
            "length": np.array([length_incentive(t, self.unit) for t in yhat]),
            "repetition": np.array([ngram_uniqueness(t, self.n, lowercase=self.lowercase) for t in yhat]),
        }
        value = parts["r_x"].copy()
        for term in ("length", "repetition"):
            if term in self.terms:
                value = value * parts[term]
        return value, parts

    def values(self, x: Sequence[str], y: Sequence[str | None], yhat: Sequence[str]) -> RewardBatch:
        """Score lists; see the class.

        Raises:
            DataError: a closed question without a reference, or a query type that is neither open nor closed.
            ConfigError: F is missing, or lists of different lengths.
        """
        if self._query_type is None:
            raise ConfigError("query_type is needed: a function from a query to 'open' or 'closed'")
        return self._values(x, y, yhat, [self._query_type(q) for q in x])

    def _values(
        self, x: Sequence[str], y: Sequence[str | None], yhat: Sequence[str], types: Sequence[Any]
    ) -> RewardBatch:
        if not len(x) == len(y) == len(yhat):
            raise ConfigError(f"{len(x)} queries, {len(y)} references and {len(yhat)} responses")
        yhat = [self._clean(t) for t in yhat]
        bad = [t for t in types if t not in ("open", "closed")]
        if bad:
            raise DataError(f"a query's type must be 'open' or 'closed', got {bad[0]!r}")
        total, parts = self._open(x, yhat)
        closed = np.zeros(len(x), dtype=bool)
        for k, kind in enumerate(types):
            if kind == "open" or "reference" not in self.terms:
                continue
            reference = y[k]
            if reference is None or not reference.strip():
                if self.missing == "raise":
                    raise DataError(f"closed question {k} has no reference; give one, or missing='open'")
                continue
            closed[k] = True
        parts["r_y"] = np.zeros(len(x))
        index = [int(k) for k in np.flatnonzero(closed)]
        if index:
            if self.F is None:
                raise ConfigError("F is missing: call fit_scale on a calibration set, or pass F (or 'identity')")
            r_y = self._relevance.pairs([str(y[k]) for k in index], [yhat[k] for k in index])
            value = np.asarray(self.F(r_y), dtype=np.float64)
            if value.shape != r_y.shape or (np.diff(value[np.argsort(r_y, kind="stable")]) < 0).any():
                raise ConfigError("F must map values one by one and be increasing: more relevance, more reward")
            if "repetition" in self.terms:
                value = value * parts["repetition"][index]
            # F may not send 0 to 0, and nothing was said.
            blank = np.array([not yhat[k].strip() for k in index])
            total[index] = np.where(blank, 0.0, value)
            parts["r_y"][index] = r_y
        parts["closed"] = closed.astype(np.float64)
        return RewardBatch(total, parts)

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Score a batch."""
        x = [t.task.question for t in trajectories]
        types = [
            self._query_type(q) if self._query_type is not None else t.task.meta.get("type")
            for q, t in zip(x, trajectories, strict=True)
        ]
        y = [t.task.reference if isinstance(t.task.reference, str) else None for t in trajectories]
        batch = self._values(x, y, [policy_text(t) for t in trajectories], types)
        return [
            Score(float(v), parts={name: float(p[k]) for name, p in batch.parts.items()})
            for k, v in enumerate(batch.total)
        ]

    def __call__(self, trajectories: Any, y: Any = None, yhat: Any = None, *, progress: Any = None) -> Any:
        """See the class."""
        if yhat is None:
            return super().__call__(trajectories, progress=progress)
        return self.values(trajectories, y, yhat)

    def state_dict(self) -> dict[str, Any]:
        """A fitted scale."""
        return {"F": self.F.state_dict()} if isinstance(self.F, QuantileAffine) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        if "F" in state:
            self.F = QuantileAffine()
            self.F.load_state_dict(state["F"])
