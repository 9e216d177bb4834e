"""Alarms for training runs: reward hacking, entropy collapse, KL and length drift, with calibrated thresholds.

An alarm reads a *signal*, one number per step that is made of the metrics rows so far, and goes off when the signal
stays beyond a threshold for ``patience`` steps. No signal reads a gold reward: an alarm sees what a user's run sees.

A threshold comes from runs that are known to be healthy: :func:`calibrate` takes the conformal quantile of their worst
moments, so a further healthy run of the same kind rings with probability at most ``false_alarms``. What that costs in
detection is then measured on runs that are known to be hacked. Thresholds do not carry over from one problem to the
next; the defaults here are those of one small testbed (``benchmarks/alarms.py``), and calibrating on a few healthy runs
of one's own is what the functions below are for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from guerdon.errors import ConfigError, DataError, TrainingError
from guerdon.evaluation.signals import Reader, Rows, Signal, first_ring, signal_of, worst
from guerdon.training.callbacks import Callback

if TYPE_CHECKING:
    from guerdon.training.loop import Run

__all__ = [
    "THRESHOLDS",
    "Alarm",
    "Calibration",
    "Detection",
    "alarm_callbacks",
    "calibrate",
    "detect",
    "evaluate_alarm",
]


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it was made from.

    Args:
        signal: its name.
        threshold: an alarm goes off above it.
        patience, baseline: with which it was calibrated.
        runs: healthy runs used.
        false_alarms: most that a further run of the same kind rings with.
    """

    signal: str
    threshold: float
    patience: int
    baseline: int
    runs: int
    false_alarms: float


@dataclass(frozen=True)
class Detection:
    """How an alarm did on recorded runs.

    Args:
        false_alarms: share of healthy runs in which it went off.
        detected: share of hacked runs in which it went off.
        early: share of hacked runs in which it went off at or before ``onset`` (gold's peak), among all hacked runs.
        healthy, hacked: numbers of runs.
        delay: median over detected runs of first ring minus onset, in rows; NaN where none was detected.
        false_interval, detected_interval: 95% Clopper-Pearson intervals.
    """

    false_alarms: float
    detected: float
    early: float
    healthy: int
    hacked: int
    delay: float
    false_interval: tuple[float, float]
    detected_interval: tuple[float, float]


def calibrate(
    healthy: Sequence[Rows],
    signal: Signal | str,
    *,
    false_alarms: float = 0.05,
    patience: int = 2,
    baseline: int = 3,
) -> Calibration:
    """The lowest threshold at which a further healthy run rings with probability at most ``false_alarms``.

    It is the ``ceil((n + 1)(1 - a))``-th smallest of the runs' worst moments (:func:`worst`): a split-conformal bound,
    valid whatever the distribution, for runs that are exchangeable with these.

    Args:
        healthy: metrics rows of each run that is known to be healthy; at least ``1 / a - 1`` runs.
        signal: or the name of a built-in one.
        false_alarms: ``a`` in (0, 1).
        patience, baseline: of the alarm.

    Raises:
        DataError: too few runs for such a rate, or a run in which the signal can never be read.
    """
    signal = signal_of(signal)
    if not 0 < false_alarms < 1:
        raise ConfigError(f"false_alarms must be strictly between 0 and 1, got {false_alarms}")
    n = len(healthy)
    rank = math.ceil((n + 1) * (1 - false_alarms) - 1e-9)
    if rank > n or n == 0:
        least = math.ceil(1 / false_alarms - 1 - 1e-9)
        raise DataError(
            f"{n} healthy runs cannot bound false alarms at {false_alarms}: give at least {least}, or allow a higher rate"
        )
    levels = []
    for k, rows in enumerate(healthy):
        level = worst(signal.series(rows, baseline), patience)
        if level == -math.inf:
            raise DataError(
                f"healthy run {k} never gives signal {signal.name!r} a value ({baseline} baseline rows, then {patience}); "
                f"it needs {', '.join(signal.keys)} in its rows"
            )
        levels.append(level)
    return Calibration(signal.name, float(np.sort(levels)[rank - 1]), patience, baseline, n, false_alarms)


def detect(rows: Rows, calibration: Calibration, signal: Signal | None = None) -> int | None:
    """Index of the row at which the calibrated alarm goes off in a recorded run, or None."""
    made = signal or signal_of(calibration.signal)
    return first_ring(made.series(rows, calibration.baseline), calibration.threshold, calibration.patience)


def evaluate_alarm(
    calibration: Calibration,
    healthy: Sequence[Rows],
    hacked: Sequence[Rows],
    onset: Sequence[int] = (),
    signal: Signal | None = None,
) -> Detection:
    """False alarms on healthy runs and detection on hacked ones, none of which should have been calibrated on.

    Args:
        calibration: the alarm.
        healthy, hacked: metrics rows of each run.
        onset: for each hacked run the row at which gold was at its peak.
        signal: where it is not a built-in one.

    Raises:
        DataError: another number of onsets than of hacked runs.
    """
    if len(onset) not in (0, len(hacked)):
        raise DataError(f"{len(onset)} onsets for {len(hacked)} hacked runs")
    wrong = sum(detect(rows, calibration, signal) is not None for rows in healthy)
    rings = [detect(rows, calibration, signal) for rows in hacked]
    delays = [r - o for r, o in zip(rings, onset, strict=False) if r is not None]
    found = sum(r is not None for r in rings)
    return Detection(
        wrong / len(healthy) if healthy else math.nan,
        found / len(hacked) if hacked else math.nan,
        sum(d <= 0 for d in delays) / len(hacked) if hacked and onset else math.nan,
        len(healthy),
        len(hacked),
        float(np.median(delays)) if delays else math.nan,
        share_interval(wrong, len(healthy)),
        share_interval(found, len(hacked)),
    )


class Alarm(Callback):
    """Watches one signal of a run.

    Args:
        signal: or the name of a built-in one.
        threshold: goes off above it; ``None`` takes the default of :data:`THRESHOLDS`.
        patience: rows in a row that it must be beyond.
        baseline: first rows, with which the signal compares.
        action: ``"warn"`` says one line, ``"stop"`` also ends the run after this step, ``"raise"`` ends it with a
            TrainingError.

    Its level is in each row as ``alarm/<name>``, and ``alarm/<name>/on`` is 1 from the step at which it went off, whose
    number is :attr:`rang`. It goes off once, and remembers that through a restart.

    The signals read ``monitor/...`` metrics, which :class:`~guerdon.evaluation.Monitors` adds: put one before the alarms.
    """

    def __init__(
        self,
        signal: Signal | str,
        threshold: float | None = None,
        *,
        patience: int = 2,
        baseline: int = 3,
        action: Literal["warn", "stop", "raise"] = "warn",
    ) -> None:
        self.signal = signal_of(signal)
        if action not in ("warn", "stop", "raise"):
            raise ConfigError(f"action must be 'warn', 'stop' or 'raise', got {action!r}")
        if threshold is None:
            if self.signal.name not in THRESHOLDS:
                raise ConfigError(
                    f"signal {self.signal.name!r} has no default threshold; give threshold=, or calibrate"
                )
            threshold = THRESHOLDS[self.signal.name]
        if math.isnan(threshold):
            raise ConfigError("threshold must be a number, got NaN")
        if patience < 1:
            raise ConfigError(f"patience must be at least 1, got {patience}")
        self.name = f"alarm/{self.signal.name}"
        self.threshold, self.patience, self.baseline, self.action = float(threshold), patience, baseline, action
        self._reader = Reader(self.signal, baseline)
        self._above = 0
        self._missing: set[str] | None = set(self.signal.keys)
        self.rang: int | None = None

    @classmethod
    def of(cls, calibration: Calibration, **options: Any) -> Alarm:
        """The alarm that was calibrated."""
        made = calibration
        return cls(made.signal, made.threshold, patience=made.patience, baseline=made.baseline, **options)

    def measure(self, run: Run, row: Mapping[str, Any], detail: Any) -> dict[str, float]:
        """The present level, and whether the alarm has gone off."""
        if self._missing is not None:
            self._missing = (self._missing - row.keys()) or None
        value = self._reader.read(row)
        if not math.isnan(value):
            self._above = self._above + 1 if value > self.threshold else 0
            if self._above >= self.patience and self.rang is None:
                self.rang = run.step
        out = {f"{self.name}/on": float(self.rang is not None)}
        return out if math.isnan(value) else {self.name: value, **out}

    def on_step(self, run: Run, row: Mapping[str, Any], detail: Any) -> None:
        """Act at the step at which it goes off."""
        if self.rang != run.step:
            return
        text = (
            f"step {run.step}: alarm {self.signal.name!r}: {self.signal.says}: {row.get(self.name, math.nan):.3g} for "
            f"{self.patience} rows, above {self.threshold:.3g}; look at recent trajectories before training on"
        )
        if self.action == "raise":
            raise TrainingError(text)
        run.warn(text)
        if self.action == "stop":
            run.stop(f"alarm {self.signal.name}")

    def on_end(self, run: Run) -> None:
        """Say so where the alarm was deaf: a silent alarm must mean that nothing happened."""
        if self._missing is not None and run.step > 0:
            run.warn(
                f"alarm {self.signal.name!r} never saw {', '.join(sorted(self._missing))} in the metrics rows; put "
                "guerdon.evaluation.Monitors before it among the callbacks (KL needs a reference)"
            )

    def state_dict(self) -> dict[str, Any]:
        missing = None if self._missing is None else sorted(self._missing)
        return {"first": self._reader.first, "above": self._above, "rang": self.rang, "missing": missing}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._reader.first = [dict(row) for row in state.get("first", [])]
        self._above, self.rang = int(state.get("above", 0)), state.get("rang")
        missing = state.get("missing", sorted(self.signal.keys))
        self._missing = None if missing is None else set(missing)


def alarm_callbacks(
    names: Iterable[str] = ("hacking", "entropy", "kl", "length"),
    *,
    thresholds: Mapping[str, float] | None = None,
    action: Literal["warn", "stop", "raise"] = "warn",
    **monitors: Any,
) -> list[Callback]:
    """Monitors and alarms, in order, ready for ``callbacks=``.

    Args:
        names: of built-in signals.
        thresholds: in place of the defaults.
        action: of every alarm.
        monitors: arguments of :class:`~guerdon.evaluation.Monitors`.
    """
    from guerdon.evaluation.hack_test import Monitors

    given = dict(thresholds or {})
    made: list[Callback] = [Alarm(name, given.pop(name, None), action=action) for name in names]
    if given:
        raise ConfigError(f"thresholds of {', '.join(given)}, for which no alarm was asked")
    return [Monitors(**monitors), *made]


def share_interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a share."""
    from scipy.stats import beta

    if n == 0:
        return (math.nan, math.nan)
    tail = (1 - level) / 2
    low = 0.0 if k == 0 else float(beta.ppf(tail, k, n - k + 1))
    high = 1.0 if k == n else float(beta.ppf(1 - tail, k + 1, n - k))
    return (low, high)


THRESHOLDS: dict[str, float] = {"hacking": 0.4032, "kl": 13.5117, "entropy": 0.6569, "length": 0.3917}
"""Default thresholds, from ``results/bench/alarms.json``: the worst moment of a dozen healthy runs of one small testbed.

Tried there on runs of other seeds than those calibrated on, at an allowed rate of 0.15: false alarms in 1 (hacking), 3
(kl), 1 (entropy) and 2 (length) of 12 healthy runs; 34, 29, 0 and 29 of 34 hacked runs found, ten or more steps after
gold's peak. Entropy did not collapse in any of those runs, so its alarm is calibrated but has caught nothing yet."""
