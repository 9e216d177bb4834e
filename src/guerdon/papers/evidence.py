"""From measurements to a verdict: effects, paired bootstrap over items and seeds, claims, result.json.

A claim is a directional statement about a difference between two arms that were measured on the
same items. Its verdict rests on a confidence interval of the effect, not on a point estimate.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from guerdon.errors import ConfigError, DataError

__all__ = ["Claim", "Result", "bootstrap", "environment", "paired_claim", "statistic_claim"]

Scale = Literal["smoke", "cpu", "gpu"]


@dataclass(frozen=True, slots=True)
class Claim:
    """One tested statement.

    Attributes:
        name: short identifier within the recipe.
        statement: the claim in words, with its direction.
        estimate: measured effect.
        ci_low, ci_high: bounds of its 95% bootstrap interval.
        p_value: share of resamples in which the statement fails (one-sided), never below 1/resamples.
        holds: the verdict; ``None`` where the scale asserts nothing (smoke).
        details: further numbers that a reader needs to judge the claim.
    """

    name: str
    statement: str
    estimate: float
    ci_low: float
    ci_high: float
    p_value: float
    holds: bool | None
    details: Mapping[str, Any] = field(default_factory=dict)


def bootstrap(
    arms: Sequence[Sequence[Sequence[float]] | np.ndarray],
    statistic: Callable[..., np.ndarray] | None = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    resample_seeds: bool = True,
) -> tuple[float, float, float, np.ndarray]:
    """Paired bootstrap over seeds and items.

    Args:
        arms: for each arm an array ``[seeds, items]``; all arms share seeds and items, and a resample
            draws the same seeds and items for every arm (that is what pairs them).
        statistic: vectorised function of the arms' resampled means (each ``[resamples]``); the default
            is the mean of the first arm minus that of the second, or the mean of the only one.
        resamples: number of bootstrap resamples.
        seed: of the resampling generator.
        level: coverage of the percentile interval.
        resample_seeds: draw training seeds too (with one seed there is nothing to draw).

    Returns:
        estimate, ci_low, ci_high, and the resampled statistics.

    Raises:
        DataError: arms differ in shape, are empty or hold non-finite values.
    """
    stacked = [np.atleast_2d(np.asarray(a, dtype=np.float64)) for a in arms]
    shape = stacked[0].shape
    if any(a.shape != shape for a in stacked):
        raise DataError(f"paired arms need equal [seeds, items] shapes, got {[a.shape for a in stacked]}")
    if 0 in shape:
        raise DataError("nothing to resample: an arm has no seeds or no items")
    for k, a in enumerate(stacked):
        if not np.isfinite(a).all():
            raise DataError(f"arm {k} holds {int((~np.isfinite(a)).sum())} non-finite values")
    if statistic is None:
        statistic = (lambda a, b: a - b) if len(stacked) == 2 else (lambda a: a)
    seeds, items = shape
    rng = np.random.default_rng(seed)
    estimate = float(statistic(*[a.mean() for a in stacked]))
    draws = np.empty((len(stacked), resamples))
    flat = np.stack(stacked)
    for start in range(0, resamples, 500):
        n = min(500, resamples - start)
        item_weights = _counts(rng, n, items)
        seed_weights = _counts(rng, n, seeds) if resample_seeds and seeds > 1 else np.full((n, seeds), 1.0 / seeds)
        per_seed = np.einsum("asi,ni->ans", flat, item_weights)
        draws[:, start : start + n] = np.einsum("ans,ns->an", per_seed, seed_weights)
    samples = np.asarray(statistic(*draws), dtype=np.float64)
    tail = (1 - level) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return estimate, float(low), float(high), samples


def _counts(rng: np.random.Generator, resamples: int, n: int) -> np.ndarray:
    return rng.multinomial(n, np.full(n, 1.0 / n), size=resamples) / n


def paired_claim(
    name: str,
    statement: str,
    better: Any,
    worse: Any,
    *,
    margin: float = 0.0,
    resamples: int = 10_000,
    seed: int = 0,
    asserted: bool = True,
    details: Mapping[str, Any] | None = None,
) -> Claim:
    """Test ``mean(better) - mean(worse) > margin`` on arrays ``[seeds, items]``.

    It holds when the lower bound of the 95% interval exceeds ``margin``. A negative margin states
    non-inferiority.
    """
    estimate, low, high, samples = bootstrap([better, worse], resamples=resamples, seed=seed)
    return _claim(name, statement, estimate, low, high, samples, margin, asserted, details)


def statistic_claim(
    name: str,
    statement: str,
    arms: Sequence[Any],
    statistic: Callable[..., np.ndarray],
    *,
    margin: float = 0.0,
    resamples: int = 10_000,
    seed: int = 0,
    asserted: bool = True,
    details: Mapping[str, Any] | None = None,
) -> Claim:
    """Test ``statistic(means of arms) > margin``, for claims that are not a plain difference."""
    estimate, low, high, samples = bootstrap(arms, statistic, resamples=resamples, seed=seed)
    return _claim(name, statement, estimate, low, high, samples, margin, asserted, details)


def _claim(
    name: str,
    statement: str,
    estimate: float,
    low: float,
    high: float,
    samples: np.ndarray,
    margin: float,
    asserted: bool,
    details: Mapping[str, Any] | None,
) -> Claim:
    p = max(float((samples <= margin).mean()), 1.0 / len(samples))
    return Claim(name, statement, estimate, low, high, p, bool(low > margin) if asserted else None, dict(details or {}))


@dataclass(frozen=True, slots=True)
class Result:
    """What one run of a recipe found; the shape of ``result.json``."""

    slug: str
    scale: Scale
    seeds: tuple[int, ...]
    claims: tuple[Claim, ...]
    paper_numbers: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    duration_s: float = 0.0
    notes: str = ""

    @property
    def holds(self) -> bool:
        """True when no asserted claim failed (a smoke run asserts none)."""
        return all(c.holds is not False for c in self.claims)

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-ready form."""
        return {
            "slug": self.slug,
            "scale": self.scale,
            "seeds": list(self.seeds),
            "claims": [asdict(c) for c in self.claims],
            "holds": self.holds if self.scale != "smoke" else None,
            "paper_numbers": dict(self.paper_numbers),
            "measured": dict(self.measured),
            "environment": dict(self.environment),
            "duration_s": round(self.duration_s, 2),
            "notes": self.notes,
        }

    def write(self, folder: str | os.PathLike[str], name: str = "result.json") -> Path:
        """Write ``folder/name`` atomically and return its path."""
        target = Path(folder) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_finite(self.to_dict()), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as f:
                f.write(text)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return target

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Result:
        """Read a ``result.json``.

        Raises:
            DataError: the file is not a result.
        """
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            raw.pop("holds", None)
            claims = tuple(Claim(**c) for c in raw.pop("claims"))
            return cls(claims=claims, seeds=tuple(raw.pop("seeds")), **raw)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise DataError(f"{Path(path).name} is not a result.json ({type(error).__name__}: {error})") from error


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that does not exist is written as null."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def environment() -> dict[str, Any]:
    """Versions and device of this run, without anything that identifies the machine."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("guerdon", "torch", "transformers", "numpy", "scikit-learn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = "cpu"
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            device = torch.cuda.get_device_name(0)
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "device": device,
        "versions": versions,
    }


class Timer:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._start


def require_scale(scale: str) -> Scale:
    """Return ``scale`` when it is one that recipes know.

    Raises:
        ConfigError: it is not.
    """
    if scale not in ("smoke", "cpu", "gpu"):
        raise ConfigError(f"scale must be smoke, cpu or gpu, got {scale!r}")
    return scale  # type: ignore[return-value]
