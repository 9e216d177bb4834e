"""SARI: how well a rewriting keeps, deletes and adds what reference rewritings keep, delete and add.

Source: Xu et al. 2016, "Optimizing Statistical Machine Translation for Text Simplification" (TACL 4). As usual in its
implementations: n-grams of one to four words, an F-measure for keeping and adding, precision for deleting. The recall of
keeping counts occurrences, as the corrected implementations do. Case is ignored. Texts are split at blanks: separate
punctuation first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from guerdon.errors import ConfigError, DataError

__all__ = ["sari", "sari_sentence"]

_ORDERS = 4


def sari_sentence(source: str, output: str, references: Sequence[str]) -> float:
    """SARI of one text, in [0, 100].

    Args:
        source: the original.
        output: its rewriting.
        references: at least one.

    Raises:
        DataError: no reference.
    """
    if not references:
        raise DataError("SARI needs at least one reference rewriting")
    s, c = source.lower().split(), output.lower().split()
    rs = [r.lower().split() for r in references]
    keep = delete = add = 0.0
    for n in range(1, _ORDERS + 1):
        k, d, a = _order(_grams(s, n), _grams(c, n), [_grams(r, n) for r in rs])
        keep, delete, add = keep + k / _ORDERS, delete + d / _ORDERS, add + a / _ORDERS
    return 100 * (keep + delete + add) / 3


def sari(sources: Sequence[str], outputs: Sequence[str], references: Sequence[Sequence[str] | str]) -> float:
    """Mean SARI of sentences, in [0, 100].

    Args:
        sources, outputs: ``n`` texts each.
        references: for each one text, or several.

    Raises:
        ConfigError: lists of different lengths, or empty ones.
    """
    if not len(sources) == len(outputs) == len(references) or not len(sources):
        raise ConfigError(
            f"{len(sources)} sources, {len(outputs)} outputs and {len(references)} references: give one of each"
        )
    rows = [[r] if isinstance(r, str) else list(r) for r in references]
    return sum(sari_sentence(s, o, r) for s, o, r in zip(sources, outputs, rows, strict=True)) / len(rows)


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1))


def _order(
    s: Counter[tuple[str, ...]], c: Counter[tuple[str, ...]], rs: Sequence[Counter[tuple[str, ...]]]
) -> tuple[float, float, float]:
    """Keep F1, deletion precision and addition F1 for n-grams of one length."""
    m = len(rs)
    r: Counter[tuple[str, ...]] = Counter()
    for one in rs:
        r.update(one)
    # Counts are weighted by the number of references, so that a gram that half of them keep counts half.
    s_m = Counter({g: k * m for g, k in s.items()})
    c_m = Counter({g: k * m for g, k in c.items()})

    kept, wanted = s_m & c_m, s_m & r
    both = kept & wanted
    p = _mean(both[g] / kept[g] for g in kept)
    q = sum(both.values()) / sum(wanted.values()) if wanted else 1.0

    dropped, droppable = s_m - c_m, s_m - r
    good = dropped & droppable
    deletion = _mean(good[g] / dropped[g] for g in dropped)

    added = set(c) - set(s)
    fresh = set(r) - set(s)
    right = added & fresh
    ap = len(right) / len(added) if added else float(not fresh)
    aq = len(right) / len(fresh) if fresh else float(not added)
    return _f1(p, q), deletion, _f1(ap, aq)


def _mean(values: object) -> float:
    found = list(values)  # type: ignore[call-overload]
    return sum(found) / len(found) if found else 1.0


def _f1(p: float, q: float) -> float:
    return 2 * p * q / (p + q) if p + q > 0 else 0.0
