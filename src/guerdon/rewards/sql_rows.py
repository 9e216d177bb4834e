"""Whether two query results agree, by value: as sets of rows, or as lists."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

__all__ = ["same_rows"]

Row = tuple[Any, ...]


def same_rows(
    got: Sequence[Sequence[Any]], expected: Sequence[Sequence[Any]], *, ordered: bool = False, tolerance: float = 0.0
) -> bool:
    """Whether two results agree: as sets of rows (duplicates ignored), or as lists where ``ordered``.

    The order of columns counts, their names do not; 1 equals 1.0 and never ``"1"``. With a ``tolerance`` numbers may
    differ by so much, relatively or absolutely: as sets, every row of each result then has a like one in the other.
    """
    a, b = [tuple(r) for r in got], [tuple(r) for r in expected]
    if ordered:
        return len(a) == len(b) and all(_same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if not tolerance:
        return set(a) == set(b)
    return _covers(set(a), set(b), tolerance) and _covers(set(b), set(a), tolerance)


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def _same(a: Row, b: Row, tolerance: float) -> bool:
    return len(a) == len(b) and all(_alike(u, v, tolerance) for u, v in zip(a, b, strict=True))


def _alike(a: Any, b: Any, tolerance: float) -> bool:
    if not (_number(a) and _number(b)):
        return type(a) is type(b) and a == b
    return a == b or (tolerance > 0 and math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance))


def _covers(rows: set[Row], others: set[Row], tolerance: float) -> bool:
    """Whether each of ``rows`` is like one of ``others``.

    Rows can only be alike where their texts are equal, so each is compared with those of equal texts, and of these with
    the ones whose first number is near: sorted by it, they are neighbours.
    """
    groups: dict[Row, list[Row]] = {}
    for row in others:
        groups.setdefault(_texts(row), []).append(row)
    keys: dict[Row, list[float]] = {}
    for name, group in groups.items():
        group.sort(key=_first)
        keys[name] = [_first(row) for row in group]
    for row in rows:
        name = _texts(row)
        group, first = groups.get(name, []), _first(row)
        reach = max(tolerance, abs(first) * tolerance / max(1e-9, 1 - tolerance)) if math.isfinite(first) else 0.0
        k = bisect_left(keys.get(name, []), first - reach * 1.01)
        while k < len(group) and keys[name][k] <= first + reach * 1.01:
            if _same(row, group[k], tolerance):
                break
            k += 1
        else:
            return False
    return True


def _texts(row: Row) -> Row:
    return tuple("number" if _number(v) else (type(v).__name__, v) for v in row)


def _first(row: Row) -> float:
    return next((float(v) for v in row if _number(v)), 0.0)
