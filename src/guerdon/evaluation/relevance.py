"""Does a score prefer a short answer to the point over a longer one that is off it?

Source: the preliminary study of Kim and Seo 2024, "Regularized Relevance Reward" (arXiv 2402.03469): a query about an
entity, a short relevant response and a longer one about another entity. Reward models trained on human preferences often
fail it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from guerdon.errors import DataError

__all__ = ["Triplet", "relevance_benchmark"]


@dataclass(frozen=True, slots=True)
class Triplet:
    """One item.

    Args:
        query: what is asked.
        relevant: a response about it, usually the shorter one.
        irrelevant: a response about something else, usually the longer one.
    """

    query: str
    relevant: str
    irrelevant: str


def relevance_benchmark(
    score_fn: Callable[[Sequence[str], Sequence[str]], Any],
    triplets: Iterable[Triplet | tuple[str, str, str]],
    *,
    bins: int = 4,
) -> dict[str, Any]:
    """How often a score is higher for the relevant response than for the irrelevant one.

    Args:
        score_fn: ``B`` queries and ``B`` responses to ``[B]`` scores, for example an
            :class:`~guerdon.rewards.EmbeddingRelevance`.
        triplets: items.
        bins: groups of about equal size into which the items are cut by length gap.

    Returns:
        ``accuracy`` (ties count half), ``by_length_gap`` (for each group ``low`` and ``high`` gap in words of the irrelevant
        over the relevant response, ``n``, ``accuracy``), ``n``, and ``wins`` (``[n]``: 1, 0.5 or 0 each).

    Raises:
        DataError: no items, or scores that are not one finite number each.
    """
    items = [t if isinstance(t, Triplet) else Triplet(*t) for t in triplets]
    if not items or bins < 1:
        raise DataError(f"the benchmark needs at least one triplet and one bin, got {len(items)} and {bins}")
    queries = [t.query for t in items]
    sides = []
    for responses in ([t.relevant for t in items], [t.irrelevant for t in items]):
        values = np.asarray(score_fn(queries, responses), dtype=np.float64)
        if values.shape != (len(items),) or not np.isfinite(values).all():
            raise DataError(
                f"score_fn must give one finite number for each of {len(items)} responses, got {values.shape}"
            )
        sides.append(values)
    wins = (sides[0] > sides[1]) + 0.5 * (sides[0] == sides[1])
    gaps = np.array([len(t.irrelevant.split()) - len(t.relevant.split()) for t in items])
    cuts = np.array_split(np.argsort(gaps, kind="stable"), min(bins, len(items)))
    groups = [
        {"low": int(gaps[k].min()), "high": int(gaps[k].max()), "n": len(k), "accuracy": float(wins[k].mean())}
        for k in cuts
    ]
    return {"accuracy": float(wins.mean()), "by_length_gap": groups, "n": len(items), "wins": wins.tolist()}
