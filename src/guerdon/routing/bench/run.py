"""One benchmark: split, fit, choose the weight of money on validation, measure on test, next to the fixed rows.

The test part is read once per row, at a setting that the validation part chose. Beside every
router stand each member alone, the best single member in training, the cheapest, the dearest, the
largest, a random choice and the oracle.
"""

from __future__ import annotations

import json
import math
import platform
import random
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from guerdon.errors import ConfigError, DataError, MissingDependency
from guerdon.registry import registry
from guerdon.routing.bench import metrics
from guerdon.routing.bench.formats import read_matrix
from guerdon.routing.bench.matrix import ScoreMatrix
from guerdon.routing.bench.metrics import Figure
from guerdon.routing.routers.base import ROUTERS, CachedEncoder, Router, TextEncoder
from guerdon.routing.routers.rules import Cheapest, Constant, Dearest, Largest, Oracle, RandomRouter

__all__ = ["ALPHAS", "DEFAULT_ROUTERS", "BenchResult", "Row", "misspell", "run_bench", "run_bench_from_files"]

ALPHAS = tuple(k / 100 for k in (*range(0, 11), 12, 14, 16, 20, 25, 30, 40, 50, 60, 70, 80, 90, 100))
"""Weights of money that are tried."""

DEFAULT_ROUTERS = ("elo", "knn", "mlp", "knn-regression", "ridge", "kernel-ridge", "tfidf-ridge", "blend")

# A name and not an import: pictures are made on a floor above.
FIGURES = registry("figure", {"frontier": "guerdon.report.frontier:plot_frontier"})


@dataclass(frozen=True)
class Row:
    """One router, measured on the test part.

    Attributes:
        name: of the router.
        role: ``"rule"`` (reads no question), ``"bound"`` (reads labels) or ``"router"``.
        alpha: weight of money that validation chose; None where there is nothing to choose.
        figures: name to :class:`Figure`.
        covered: test queries on which the chosen member had been run; the others have no outcome.
        failed: test queries whose chosen call had failed; they count as quality 0.
        shares: member to share of the choices, members never chosen left out.
        sweep: ``(alpha, quality, usd_per_1000)`` on the test part, for curves only.
        validation: the same triple that was chosen on the validation part.
        router_seconds: the router's own time per query, embedding included.
        router_usd_per_1000: that time at the stated price.
    """

    name: str
    role: Literal["rule", "bound", "router"]
    alpha: float | None
    figures: Mapping[str, Figure]
    covered: int
    failed: int
    shares: Mapping[str, float]
    sweep: tuple[tuple[float, float, float], ...] = ()
    validation: tuple[float, float, float] | None = None
    router_seconds: float = 0.0
    router_usd_per_1000: float = 0.0

    @property
    def quality(self) -> float:
        """Mean quality."""
        return self.figures["quality"].value

    @property
    def usd_per_1000(self) -> float:
        """USD per 1,000 queries paid to members."""
        return self.figures["usd_per_1000"].value

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, NaN as null."""
        return {
            "name": self.name,
            "role": self.role,
            "alpha": self.alpha,
            "figures": {k: {n: _plain(v) for n, v in f.to_dict().items()} for k, f in self.figures.items()},
            "covered": self.covered,
            "failed": self.failed,
            "shares": {k: _plain(v) for k, v in self.shares.items()},
            "sweep": [[_plain(v) for v in p] for p in self.sweep],
            "validation": None if self.validation is None else [_plain(v) for v in self.validation],
            "router_seconds": _plain(self.router_seconds),
            "router_usd_per_1000": _plain(self.router_usd_per_1000),
            "total_usd_per_1000": _plain(self.usd_per_1000 + self.router_usd_per_1000),
        }


@dataclass(frozen=True)
class BenchResult:
    """What :func:`run_bench` found.

    Attributes:
        dataset: name, numbers of queries per part, members.
        settings: everything that decides the numbers: seed, shares, alphas, rule of selection, prices.
        rows: rules first, then routers, the bound last.
        reference: the member with which routers are compared: best on training and validation.
        fitted: the routers, by row name, at the chosen alpha, ready to be saved.
    """

    dataset: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]
    reference: str
    versions: Mapping[str, str] = field(default_factory=dict)
    fitted: Mapping[str, Router] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "dataset": dict(self.dataset),
            "settings": dict(self.settings),
            "reference": self.reference,
            "versions": dict(self.versions),
            "rows": [r.to_dict() for r in self.rows],
        }

    def to_json(self) -> str:
        """The result as text."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headers and cells of the printed table; brackets are 95% intervals."""
        headers = [
            "router",
            "alpha",
            "quality",
            "95%",
            "USD/1k",
            "vs best single",
            "95%",
            "cost share",
            "arena",
            "Opt.Sel",
            "Opt.Cost",
            "Opt.Acc",
            "AIQ",
            "APGR",
            "robust",
            "n",
            "failed",
        ]
        return headers, [self._cells(r) for r in self.rows]

    def _cells(self, row: Row) -> list[str]:
        def value(name: str, digits: int = 3) -> str:
            f = row.figures.get(name)
            return "-" if f is None or not math.isfinite(f.value) else f"{f.value:.{digits}f}"

        def span(name: str, sign: str = "") -> str:
            f = row.figures.get(name)
            return "-" if f is None or not math.isfinite(f.ci_low) else f"[{f.ci_low:{sign}.3f}, {f.ci_high:{sign}.3f}]"

        gain = row.figures.get("gain")
        return [
            row.name,
            "-" if row.alpha is None else f"{row.alpha:g}",
            value("quality"),
            span("quality"),
            value("usd_per_1000", 4),
            "-" if gain is None else f"{gain.value:+.3f}",
            span("gain", "+"),
            value("cost_share"),
            value("arena", 2),
            *(value(k) for k in ("opt_sel", "opt_cost", "opt_acc", "aiq", "apgr", "robustness")),
            str(row.covered),
            str(row.failed),
        ]

    def plot(self, path: str | Path) -> Path:
        """Draw quality against USD per 1,000 queries: single members and rules as points, routers as sweeps.

        Raises:
            MissingDependency: matplotlib is not installed.
        """
        points: list[tuple[str, float, float]] = []
        for row in self.rows:
            if row.role == "router" and len({(u, q) for _, q, u in row.sweep}) > 1:
                points += [(row.name, u, q) for _, q, u in row.sweep]
            elif row.name not in ("cheapest", "dearest", "largest", "best single"):
                points.append((row.name, row.usd_per_1000, row.quality))
        xlabel = "USD per 1,000 queries"
        path_drawn: Path = FIGURES["frontier"](
            [p for p in points if math.isfinite(p[1]) and math.isfinite(p[2])],
            path,
            xlabel=xlabel,
            ylabel="mean quality on the test part",
            title=f"{self.dataset['name']}: {self.dataset['test']} queries, {len(self.dataset['members'])} members",
            log_cost=all(p[1] > 0 for p in points if math.isfinite(p[1])),
            frontier=False,
        )
        return path_drawn

    def write(self, path: str | Path) -> Path:
        """Write the JSON to ``path``."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")
        return path


def run_bench(
    matrix: ScoreMatrix,
    routers: Sequence[Router | str] | None = None,
    *,
    seed: int = 0,
    shares: tuple[float, float, float] = (0.6, 0.2, 0.2),
    alphas: Sequence[float] = ALPHAS,
    select: Literal["budget", "match", "quality", "arena"] = "budget",
    budget: float = 0.45,
    margin: float = 0.01,
    encoder: TextEncoder | str = "minilm",
    usd_per_hour: float = 0.1,
    resamples: int = 1000,
    perturb: bool = True,
) -> BenchResult:
    """Fit routers on one part of the queries, choose alpha on a second, measure on a third.

    Args:
        matrix: recorded outcomes.
        routers: routers or their registered names; :data:`DEFAULT_ROUTERS` otherwise.
        seed: of the split, the random row and the bootstrap.
        shares: of training, validation and test queries.
        alphas: weights of money to try.
        select: which alpha validation chooses: ``"budget"`` the best quality that costs at most
            ``budget`` times what the best single member costs (the cheapest where none does), ``"match"``
            the cheapest whose quality is at least that member's plus ``margin`` (the best quality where
            none is), ``"quality"`` the best quality, ``"arena"`` the best arena score.
        budget, margin: see ``select``.
        encoder: for routers given by name.
        usd_per_hour: price of the machine that the router itself runs on; an assumption to replace.
        resamples: of the bootstrap.
        perturb: measure robustness to misspelt queries.

    Raises:
        ConfigError: a setting out of range.
        DataError: too few queries, or two routers of one name.
    """
    if select not in ("budget", "match", "quality", "arena"):
        raise ConfigError(f"select must be budget, match, quality or arena, got {select!r}")
    if not alphas or any(not 0 <= a <= 1 for a in alphas):
        raise ConfigError(f"alphas must be one or more numbers in [0, 1], got {list(alphas)}")
    if usd_per_hour < 0 or budget < 0 or resamples < 1:
        raise ConfigError(
            f"usd_per_hour and budget must be >= 0 and resamples >= 1, got {usd_per_hour}, {budget} and {resamples}"
        )
    parts = matrix.split(shares, seed)
    train, validation, test = (matrix.take(rows) for rows in parts)
    shared = CachedEncoder(encoder, limit=None)
    learned = [_make(r, shared) for r in (DEFAULT_ROUTERS if routers is None else routers)]
    rules: list[Router] = [
        *(Constant(m) for m in matrix.members),
        Constant(),
        Cheapest(),
        Dearest(),
        Largest(),
        RandomRouter(seed=seed),
    ]
    everyone = [*rules, *learned, Oracle()]
    names = [r.name for r in everyone]
    if len(set(names)) < len(names):
        double = next(n for n in names if names.count(n) > 1)
        raise DataError(f"two rows would be called {double!r}; give each router a name of its own")

    seen = matrix.take(np.sort(np.concatenate(parts[:2])))
    best = int(np.nanargmax(seen.mean_quality))
    single = _point(validation, np.full(len(validation), best))
    goal = _Goal(select, budget * single[1], single[0] + margin)
    encode_s = 0.0
    if any(getattr(r, "encoder", None) is shared for r in learned):
        shared.encode([*train.queries, *validation.queries])
        start = time.perf_counter()
        shared.encode(test.queries)
        encode_s = (time.perf_counter() - start) / len(test)
    misspelt = [misspell(q, seed) for q in test.queries] if perturb else []

    measured = []
    for router in everyone:
        router.fit(train)
        measured.append(
            _Measured(
                router,
                validation,
                test,
                tuple(alphas),
                goal,
                misspelt,
                encode_s if getattr(router, "encoder", None) is shared else 0.0,
            )
        )
    largest = max(u for m in measured for _, _, u in m.sweep if math.isfinite(u))
    weak = int(np.nanargmin(train.mean_cost))
    pair = (weak, best) if weak != best else None
    options = {"resamples": resamples, "seed": seed}
    rows = tuple(m.row(test, best, pair, largest, usd_per_hour, options) for m in measured)
    return BenchResult(
        dataset={
            "name": matrix.name,
            "members": list(matrix.members),
            "queries": len(matrix),
            "train": len(train),
            "validation": len(validation),
            "test": len(test),
            "notes": list(matrix.notes),
        },
        settings={
            "seed": seed,
            "shares": list(shares),
            "alphas": list(alphas),
            "select": select,
            "budget": budget,
            "margin": margin,
            "encoder": shared.ref,
            "usd_per_hour": usd_per_hour,
            "resamples": resamples,
            "aiq_largest_cost": _plain(largest),
            "apgr_pair": None if pair is None else {"weak": matrix.members[weak], "strong": matrix.members[best]},
        },
        rows=rows,
        reference=matrix.members[best],
        versions=_versions(),
        fitted={m.router.name: m.router for m in measured if not m.router.needs_labels},
    )


@dataclass(frozen=True)
class _Goal:
    """Which point of the validation curve to take; see ``select`` of :func:`run_bench`."""

    select: str
    most_usd: float
    least_quality: float

    def pick(self, points: Sequence[tuple[float, float]]) -> int:
        quality, usd = (np.array([p[k] for p in points]) for k in (0, 1))
        known = np.flatnonzero(np.isfinite(quality)).tolist()
        if not known:
            return 0

        def best(of: Sequence[int]) -> int:
            # Equal quality: the cheaper; equal both: the smaller alpha, which comes first.
            return min(of, key=lambda k: (-round(float(quality[k]), 12), usd[k], k))

        def frugal(of: Sequence[int]) -> int:
            return min(of, key=lambda k: (usd[k], -quality[k], k))

        if self.select == "budget":
            fits = [k for k in known if usd[k] <= self.most_usd]
            return best(fits) if fits else frugal(known)
        if self.select == "match":
            enough = [k for k in known if quality[k] >= self.least_quality]
            return frugal(enough) if enough else best(known)
        if self.select == "arena":
            return max(known, key=lambda k: float(metrics.arena_score(quality[k], usd[k])))
        return best(known)


class _Measured:
    """A fitted router with its choices: at every alpha for the curve, at the chosen one for the figures."""

    def __init__(
        self,
        router: Router,
        validation: ScoreMatrix,
        test: ScoreMatrix,
        alphas: tuple[float, ...],
        goal: _Goal,
        misspelt: Sequence[str],
        encode_s: float,
    ) -> None:
        self.router = router
        tried = alphas if router.learns else (0.0,)
        on_validation = [_point(validation, c) for c in _choices(router, validation, tried)]
        k = goal.pick(on_validation)
        self.alpha = tried[k]
        self.validation = (self.alpha, *on_validation[k]) if router.learns else None
        if router.learns:
            router.alpha = self.alpha
        start = time.perf_counter()
        self.chosen = router.decide(test)
        self.seconds = (time.perf_counter() - start) / len(test) + encode_s
        curve = alphas if router.learns or router.needs_labels else (0.0,)
        self.sweep = tuple((a, *_point(test, c)) for a, c in zip(curve, _choices(router, test, curve), strict=True))
        self.predicted = router.scores(test.queries) if router.learns else None
        self.misspelt = router.choose(misspelt) if misspelt and not router.needs_labels else None

    def row(
        self,
        test: ScoreMatrix,
        best: int,
        pair: tuple[int, int] | None,
        largest: float,
        usd_per_hour: float,
        options: dict[str, Any],
    ) -> Row:
        n = np.arange(len(test))
        quality, cost = test.quality, test.cost
        ok = test.ran[n, self.chosen]
        figures = dict(metrics.summarise(quality[n, self.chosen][ok], cost[n, self.chosen][ok], **options))
        both = ok & test.ran[:, best]
        own, other = quality[n, self.chosen][both], quality[both, best]
        figures["gain"] = metrics.bootstrap(own - other, lambda s: s[..., 0], **options)
        money = np.column_stack([cost[n, self.chosen][both], cost[both, best]])
        figures["cost_share"] = metrics.bootstrap(money, lambda s: s[..., 0] / s[..., 1], **options)
        figures |= metrics.optimality(self.chosen, quality, cost, **options)
        if all(math.isfinite(q) for _, q, _ in self.sweep):
            figures["aiq"] = self._aiq(test, largest, "zero", options)
            figures["aiq_range"] = self._aiq(test, largest, "range", options)
        if pair is not None and self.predicted is not None and test.ran[:, list(pair)].all():
            weak, strong = pair
            # Ranks and not thresholds: tied predictions would leave out shares of calls.
            rank = np.argsort(
                np.argsort(-(self.predicted[:, strong] - self.predicted[:, weak]), kind="stable"), kind="stable"
            )
            calls = rank[:, None] < np.linspace(0, len(test), 11).round()[None]
            figures |= metrics.curve_figures(
                calls, quality[:, weak], quality[:, strong], **{**options, "resamples": min(options["resamples"], 300)}
            )
        if self.misspelt is not None:
            figures["robustness"] = metrics.robustness(self.chosen.tolist(), self.misspelt.tolist(), **options)
        shares = np.bincount(self.chosen, minlength=len(test.members)) / len(test)
        role: Literal["rule", "bound", "router"] = (
            "bound" if self.router.needs_labels else "router" if self.router.learns else "rule"
        )
        return Row(
            self.router.name,
            role,
            self.alpha if self.router.learns else None,
            figures,
            int(ok.sum()),
            int(test.fails[n, self.chosen].sum()),
            {m: float(s) for m, s in zip(test.members, shares, strict=True) if s},
            self.sweep,
            self.validation,
            self.seconds,
            self.seconds * usd_per_hour / 3600 * 1000,
        )

    def _aiq(self, test: ScoreMatrix, largest: float, convention: Any, options: dict[str, Any]) -> Figure:
        curve = [a for a, _, _ in self.sweep]
        choices = _choices(self.router, test, curve)
        n = np.arange(len(test))
        ok = np.all([test.ran[n, c] for c in choices], axis=0)
        q = np.column_stack([test.quality[n, c] for c in choices])[ok]
        u = np.column_stack([test.cost[n, c] * 1000 for c in choices])[ok]
        k = len(curve)

        def statistic(m: np.ndarray) -> np.ndarray:
            # The range of costs moves with the resample where it must, so that no setting lies outside it.
            return np.array(
                [metrics.aiq(r[k:], r[:k], max(largest, float(r[k:].max())), convention=convention) for r in m]
            )

        return metrics.bootstrap(
            np.column_stack([q, u]), statistic, resamples=min(options["resamples"], 200), seed=options["seed"]
        )


def _choices(router: Router, matrix: ScoreMatrix, alphas: Sequence[float]) -> list[np.ndarray]:
    """Choices ``[n]`` at each alpha; predictions are made once."""
    if router.needs_labels or not router.learns:
        return [router.decide(matrix, alpha=a) for a in alphas]
    predicted = router.scores(matrix.queries)
    return [router.weigh(predicted, a).argmax(1) for a in alphas]


def _point(matrix: ScoreMatrix, chosen: np.ndarray) -> tuple[float, float]:
    """Mean quality and USD per 1,000 queries, over the queries on which the chosen member was run."""
    n = np.arange(len(matrix))
    ok = matrix.ran[n, chosen]
    if not ok.any():
        return math.nan, math.nan
    return float(matrix.quality[n, chosen][ok].mean()), float(1000 * matrix.cost[n, chosen][ok].mean())


def _make(router: Router | str, encoder: CachedEncoder) -> Router:
    if isinstance(router, Router):
        return router
    part = ROUTERS[router]
    if not isinstance(part, type):
        return part()
    embeds = router in ("blend", "knn", "knn-regression", "mlp", "ridge", "kernel-ridge")
    return part(encoder=encoder) if embeds else part()


def misspell(text: str, seed: int = 0) -> str:
    """Swap two neighbouring inner letters in about one long word of ten, the same way for the same text and seed."""
    rng = random.Random(zlib.crc32(text.encode()) ^ seed)
    words = text.split(" ")
    long = [k for k, w in enumerate(words) if len(w) > 3 and w.isalpha()]
    for k in rng.sample(long, min(len(long), max(1, len(long) // 10))):
        i = rng.randrange(1, len(words[k]) - 2)
        w = words[k]
        words[k] = w[:i] + w[i + 1] + w[i] + w[i + 2 :]
    return " ".join(words)


def run_bench_from_files(
    path: str | Path,
    *,
    format: str = "auto",
    pool: str | Path | None = None,
    second: str | Path | None = None,
    prices: Mapping[str, tuple[float, float]] | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    **settings: Any,
) -> BenchResult:
    """Read recorded outcomes, run the benchmark and, where ``out`` is given, write what it found.

    Args:
        path, format, pool, second, prices: see :func:`~guerdon.routing.bench.formats.read_matrix`.
        out: a folder for ``bench.json`` and, where matplotlib is installed, ``frontier.png``; or the
            name of a ``.json`` file.
        seed, settings: see :func:`run_bench`.
    """
    matrix = read_matrix(path, format=format, pool=pool, second=second, prices=prices)
    result = run_bench(matrix, seed=seed, **settings)
    if out is not None:
        out = Path(out)
        if out.suffix == ".json":
            result.write(out)
        else:
            result.write(out / "bench.json")
            try:
                result.plot(out / "frontier.png")
            except MissingDependency:
                # The numbers are the result; the picture can be drawn from them elsewhere.
                (out / "frontier.png").unlink(missing_ok=True)
    return result


def _versions() -> dict[str, str]:
    out = {"python": platform.python_version()}
    for package in ("guerdon", "numpy", "scipy", "scikit-learn", "torch", "transformers"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            continue
    return out


def _plain(value: Any) -> Any:
    """Six significant digits are more than the intervals allow; NaN becomes null."""
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
