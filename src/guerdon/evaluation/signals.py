"""Signals of training runs: one number per step, made of the metrics rows so far, that rises when something goes wrong.

No signal reads a gold reward: it sees what a user's run sees. See :mod:`guerdon.evaluation.alarms` for what is done with
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from guerdon.errors import ConfigError

__all__ = ["SIGNALS", "Reader", "Signal", "first_ring", "signal_of", "worst"]

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Signal:
    """A number per step; larger is worse.

    Args:
        name: of the alarm that reads it.
        keys: metrics that it needs; a row without one of them gives NaN, which never rings.
        of: from the baseline (means of the first rows) and the present row's numbers to the signal.
        says: what it means, for the message.
    """

    name: str
    keys: tuple[str, ...]
    of: Callable[[Mapping[str, float], Mapping[str, float]], float]
    says: str

    def series(self, rows: Rows, baseline: int = 3) -> np.ndarray:
        """``[len(rows)]`` the signal at each row; NaN during the ``baseline`` rows and where a metric is missing.

        Rows that lack a metric do not count towards the baseline, so metrics may be measured every few steps.
        """
        reader = Reader(self, baseline)
        return np.array([reader.read(row) for row in rows])


class Reader:
    """Reads a signal row by row."""

    def __init__(self, signal: Signal, baseline: int) -> None:
        if baseline < 1:
            raise ConfigError(f"baseline must be at least 1, got {baseline}")
        self.signal, self.baseline = signal, baseline
        self.first: list[dict[str, float]] = []

    def read(self, row: Mapping[str, Any]) -> float:
        now = {}
        for key in self.signal.keys:
            value = row.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                return math.nan
            now[key] = float(value)
        if len(self.first) < self.baseline:
            self.first.append(now)
            return math.nan
        start = {key: sum(r[key] for r in self.first) / len(self.first) for key in now}
        return float(self.signal.of(start, now))


def _log_ratio(start: float, now: float) -> float:
    # Half a token or half a thousandth of a nat: keeps what begins or ends at zero finite.
    return math.log((max(now, 0.0) + 1e-3) / (max(start, 0.0) + 1e-3))


_FORM = ("repetition", "truncated", "copying", "empty")


def _hacking(start: Mapping[str, float], now: Mapping[str, float]) -> float:
    """Gain of the proxy in its first deviations, times the drift in form; neither alone is suspicious.

    A policy that learns raises the proxy, and one that learns to be brief changes its form. The drift is the absolute
    log-ratio of lengths plus the gains in repeated, truncated, copied and empty shares.
    """
    gain = (now["monitor/proxy"] - start["monitor/proxy"]) / max(start["monitor/proxy_std"], 1e-6)
    drift = abs(_log_ratio(start["monitor/length"], now["monitor/length"]))
    drift += sum(max(0.0, now[f"monitor/{key}"] - start[f"monitor/{key}"]) for key in _FORM)
    return max(gain, 0.0) * drift


SIGNALS: dict[str, Signal] = {
    s.name: s
    for s in (
        Signal(
            "hacking",
            ("monitor/proxy", "monitor/proxy_std", "monitor/length", *(f"monitor/{key}" for key in _FORM)),
            _hacking,
            "the reward rises while responses change in form (gain in its first deviations, times drift)",
        ),
        Signal(
            "kl",
            ("monitor/kl",),
            lambda start, now: now["monitor/kl"],
            "the policy has moved far from its reference (sequence KL in nats)",
        ),
        Signal(
            "entropy",
            ("monitor/entropy",),
            lambda start, now: -_log_ratio(start["monitor/entropy"], now["monitor/entropy"]),
            "entropy is collapsing (log of how many times it has fallen)",
        ),
        Signal(
            "length",
            ("monitor/length",),
            lambda start, now: abs(_log_ratio(start["monitor/length"], now["monitor/length"])),
            "responses have become much longer or shorter (absolute log-ratio)",
        ),
        Signal(
            "repetition",
            ("monitor/repetition",),
            lambda start, now: now["monitor/repetition"] - start["monitor/repetition"],
            "responses repeat themselves more (share of repeated n-grams, gain)",
        ),
        Signal(
            "truncation",
            ("monitor/truncated",),
            lambda start, now: now["monitor/truncated"] - start["monitor/truncated"],
            "more responses run into the length limit (share, gain)",
        ),
    )
}
"""Built-in signals by name."""


def worst(series: np.ndarray, patience: int) -> float:
    """The highest level that a signal stays at for ``patience`` rows in a row: what an alarm compares; -inf if never.

    NaN rows are skipped: they neither ring nor break a row of values.
    """
    values = series[~np.isnan(series)]
    if patience < 1:
        raise ConfigError(f"patience must be at least 1, got {patience}")
    if len(values) < patience:
        return -math.inf
    return float(np.lib.stride_tricks.sliding_window_view(values, patience).min(1).max())


def first_ring(series: np.ndarray, threshold: float, patience: int) -> int | None:
    """Index of the row at which an alarm goes off, or None."""
    above = 0
    for k, value in enumerate(series):
        if math.isnan(value):
            continue
        above = above + 1 if value > threshold else 0
        if above >= patience:
            return k
    return None


def signal_of(signal: Signal | str) -> Signal:
    if isinstance(signal, Signal):
        return signal
    if signal not in SIGNALS:
        raise ConfigError(f"unknown signal {signal!r}; known: {', '.join(SIGNALS)}")
    return SIGNALS[signal]
