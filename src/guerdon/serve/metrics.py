"""Counters and histograms in Prometheus' text format, kept as plain dictionaries.

A request touches three dictionary entries; text is made only when somebody scrapes. With several worker
processes each writes its numbers to a shared folder about once a second, and whichever worker is
scraped adds the others' to its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from guerdon.types import Usage

__all__ = ["BUCKETS", "CONTENT_TYPE", "Metrics"]

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
BREAKER_STATES = ("closed", "half_open", "open")

Labels = tuple[str, ...]

_HELP = {
    "guerdon_requests_total": ("counter", "Requests by route, model and HTTP status.", ("route", "model", "status")),
    "guerdon_tokens_total": ("counter", "Tokens of pool members that were billed.", ("member", "direction")),
    "guerdon_usd_total": ("counter", "USD spent on pool members.", ("member",)),
    "guerdon_calls_total": ("counter", "Calls of pool members, failed ones included.", ("member",)),
    "guerdon_disconnects_total": ("counter", "Requests whose client went away before the answer was complete.", ()),
    "guerdon_in_flight": ("gauge", "Chat requests being answered.", ()),
    "guerdon_breaker_state": ("gauge", "1 for the state that a member's circuit breaker is in.", ("member", "state")),
}
_HISTOGRAMS = {
    "guerdon_request_seconds": ("Time from request to complete answer.", ("route",)),
    "guerdon_overhead_seconds": ("The part of it not spent waiting for the pool.", ("route",)),
}


class Metrics:
    """The numbers of one process.

    Args:
        folder: shared by the workers of one server; ``None`` for a single process.

    A subclass for another server has other ``series`` (kind, help, names of the labels) and ``timings`` (help, labels).
    """

    series: ClassVar[Mapping[str, tuple[str, str, Labels]]] = _HELP
    timings: ClassVar[Mapping[str, tuple[str, Labels]]] = _HISTOGRAMS

    def __init__(self, folder: Path | None = None) -> None:
        self.counters: dict[str, dict[Labels, float]] = {name: {} for name in self.series}
        self.histograms: dict[str, dict[Labels, list[float]]] = {name: {} for name in self.timings}
        self.folder = folder
        self._written = 0.0

    def add(self, name: str, labels: Labels, value: float = 1.0) -> None:
        """Add to a counter."""
        series = self.counters[name]
        series[labels] = series.get(labels, 0.0) + value

    def put(self, name: str, labels: Labels, value: float) -> None:
        """Set a gauge."""
        self.counters[name][labels] = value

    def observe(self, name: str, labels: Labels, seconds: float) -> None:
        """Count ``seconds`` in a histogram: one slot a bucket, one above all of them, then the sum."""
        series = self.histograms[name]
        slots = series.get(labels)
        if slots is None:
            slots = series[labels] = [0.0] * (len(BUCKETS) + 2)
        slots[bisect_left(BUCKETS, seconds)] += 1
        slots[-1] += seconds

    def member(self, name: str, used: Usage) -> None:
        """Set the sums of one member, as the ledger has them."""
        self.put("guerdon_calls_total", (name,), used.calls)
        self.put("guerdon_tokens_total", (name, "input"), used.input_tokens)
        self.put("guerdon_tokens_total", (name, "output"), used.output_tokens)
        self.put("guerdon_usd_total", (name,), used.usd)

    def breaker(self, member: str, state: str) -> None:
        """Record a breaker's state: ``closed``, ``half_open`` or ``open``."""
        for known in BREAKER_STATES:
            self.put("guerdon_breaker_state", (member, known), float(known == state))

    def share(self) -> None:
        """Write this process's numbers where the other workers find them, at most once a second."""
        now = time.monotonic()
        if self.folder is None or now - self._written < 1.0:
            return
        self._written = now
        state = {
            "counters": {name: list(series.items()) for name, series in self.counters.items()},
            "histograms": {name: list(series.items()) for name, series in self.histograms.items()},
        }
        path = self.folder / f"{os.getpid()}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        temporary.replace(path)

    def text(self) -> bytes:
        """Everything, all workers together, as Prometheus reads it."""
        total = self._merged()
        lines: list[str] = []
        for name, (kind, about, label_names) in self.series.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
            for labels, value in sorted(total.counters[name].items()):
                lines.append(f"{name}{_labels(label_names, labels)} {_number(value)}")
        for name, (about, label_names) in self.timings.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} histogram"]
            for labels, slots in sorted(total.histograms[name].items()):
                seen = 0.0
                for edge, count in zip((*map(_number, BUCKETS), "+Inf"), slots, strict=False):
                    seen += count
                    lines.append(f"{name}_bucket{_labels((*label_names, 'le'), (*labels, edge))} {_number(seen)}")
                lines.append(f"{name}_sum{_labels(label_names, labels)} {_number(slots[-1])}")
                lines.append(f"{name}_count{_labels(label_names, labels)} {_number(seen)}")
        return ("\n".join(lines) + "\n").encode()

    def _merged(self) -> Metrics:
        if self.folder is None:
            return self
        total = type(self)()
        total._absorb(self.counters, self.histograms)
        for path in self.folder.glob("*.json"):
            if path.stem == str(os.getpid()):
                continue
            with contextlib.suppress(OSError, ValueError):  # a worker may end while we read
                other = json.loads(path.read_text())
                total._absorb(
                    {n: {tuple(k): v for k, v in rows} for n, rows in other["counters"].items()},
                    {n: {tuple(k): v for k, v in rows} for n, rows in other["histograms"].items()},
                )
        return total

    def _absorb(
        self, counters: Mapping[str, Mapping[Labels, float]], histograms: Mapping[str, Mapping[Labels, list[float]]]
    ) -> None:
        for name, series in counters.items():
            for labels, value in series.items():
                if name == "guerdon_breaker_state":  # a state, not a count: open anywhere is worth seeing
                    self.put(name, labels, max(value, self.counters[name].get(labels, 0.0)))
                else:
                    self.add(name, labels, value)
        for name, rows in histograms.items():
            for labels, slots in rows.items():
                mine = self.histograms[name].setdefault(labels, [0.0] * (len(BUCKETS) + 2))
                for i, count in enumerate(slots):
                    mine[i] += count


def _labels(names: Labels, values: Labels) -> str:
    if not names:
        return ""
    return "{" + ",".join(f'{n}="{_escape(v)}"' for n, v in zip(names, values, strict=True)) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(value)
