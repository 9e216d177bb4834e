"""Scores a stream of records: in parallel, in order, in constant memory, resumable."""

from __future__ import annotations

import csv
import json
import math
import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from guerdon.errors import ConfigError, DataError, MissingDependency

__all__ = ["Summary", "read_records", "score_records"]

_REFERENCES = ("reference", "answer", "answers", "golds", "solution", "ground_truth", "label")
_PROMPTS = ("prompt", "question", "messages")
_COMPLETIONS = ("completion", "response", "output", "text")
_RESERVOIR = 10_000


def read_records(source: Path | IO[str], format: str = "auto") -> Iterator[dict[str, Any]]:
    """Records of a file, or of a stream of JSON lines, one after the other.

    Args:
        source: a path, or an open text stream.
        format: ``"jsonl"``, ``"csv"``, ``"parquet"``, or ``"auto"`` by the suffix (a stream is JSON lines).

    Raises:
        DataError: a line that is not an object, by its number.
        ConfigError: an unknown format.
        MissingDependency: Parquet without pyarrow.
    """
    if format == "auto":
        suffix = source.suffix.lower() if isinstance(source, Path) else ""
        format = {".csv": "csv", ".parquet": "parquet"}.get(suffix, "jsonl")
    if format not in ("jsonl", "csv", "parquet"):
        raise ConfigError(f"format must be auto, jsonl, csv or parquet, got {format!r}")
    if format == "parquet":
        yield from _parquet(source)
        return
    handle = source.open(encoding="utf-8", errors="surrogateescape", newline="") if isinstance(source, Path) else source
    try:
        if format == "csv":
            yield from csv.DictReader(handle)
            return
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"line {number} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise DataError(f"line {number} is no object")
            yield record
    finally:
        if isinstance(source, Path):
            handle.close()


def _parquet(source: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(source, Path):
        raise ConfigError("Parquet is read from a file, not from a pipe")
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingDependency("Parquet files need pyarrow: pip install pyarrow") from error
    for batch in parquet.ParquetFile(source).iter_batches(1024):
        yield from batch.to_pylist()


def completion_of(record: Mapping[str, Any]) -> Any:
    """The completion of a record: ``completion``, ``response``, ``output`` or ``text``, or the record itself where it is
    an OpenAI-format reply (``choices``)."""
    for key in _COMPLETIONS:
        if record.get(key) is not None:
            return record[key]
    if record.get("choices") is not None:
        return {"choices": record["choices"]}
    raise DataError("no completion: give completion (text or messages), or an OpenAI-format reply with choices")


@dataclass
class Summary:
    """What a stream of scores looked like.

    Attributes:
        n, valid: records, and those with an honest value.
        reasons: invalid scores by reason (its first words).
        values: by part (``"value"`` is the outcome): count, mean, deviation, extremes and quantiles.
    """

    n: int = 0
    valid: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    _parts: dict[str, _Running] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in one scored record."""
        self.n += 1
        if not row["valid"]:
            self.reasons[str(row.get("reason"))[:120]] += 1
            return
        self.valid += 1
        for name, value in {"value": row["value"], **row["parts"]}.items():
            self._parts.setdefault(name, _Running()).add(value)

    @property
    def values(self) -> dict[str, dict[str, float]]:
        """Distribution of each part."""
        return {name: part.to_dict() for name, part in self._parts.items()}

    def sample(self, part: str = "value") -> list[float]:
        """At most 10,000 of a part's values, each as likely as another."""
        return list(self._parts[part].kept) if part in self._parts else []

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {"n": self.n, "valid": self.valid, "invalid": dict(self.reasons.most_common()), "parts": self.values}


class _Running:
    """Mean and deviation of a stream, and a random sample of it for quantiles."""

    def __init__(self) -> None:
        self.n, self.mean, self._square = 0, 0.0, 0.0
        self.low, self.high = math.inf, -math.inf
        self.kept: list[float] = []
        self._random = random.Random(0)

    def add(self, value: Any) -> None:
        if not isinstance(value, int | float) or not math.isfinite(value):
            return
        self.n += 1
        change = value - self.mean
        self.mean += change / self.n
        self._square += change * (value - self.mean)
        self.low, self.high = min(self.low, value), max(self.high, value)
        if len(self.kept) < _RESERVOIR:
            self.kept.append(float(value))
        elif (k := self._random.randrange(self.n)) < _RESERVOIR:
            self.kept[k] = float(value)

    def to_dict(self) -> dict[str, float]:
        ordered = sorted(self.kept)
        at = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
        std = math.sqrt(self._square / (self.n - 1)) if self.n > 1 else 0.0
        return {
            "n": self.n, "mean": self.mean, "std": std, "min": self.low, "p05": at(0.05), "median": at(0.5), "p95": at(0.95),
            "max": self.high,
        }  # fmt: skip


_REWARD: Any = None


def open_reward(spec: Any) -> Any:
    """Make the reward with which this process scores, once, and return it."""
    global _REWARD
    from guerdon.training.job import make_reward

    _REWARD = make_reward(spec)
    return _REWARD


def check_workers(spec: Any, workers: int) -> None:
    """Check that a reward can be made, and by so many processes.

    Raises:
        UnknownName, ConfigError: it cannot be made, or it has running statistics and there are several workers.
    """
    from guerdon.training.job import make_reward

    if _has_state(make_reward(spec).state_dict()) and workers > 1:
        raise ConfigError("this reward keeps running statistics, which workers would not share; use one worker")


def score_records(
    records: Iterable[Mapping[str, Any]], spec: Any, *, workers: int = 1, batch: int = 256, first: int = 0
) -> Iterator[dict[str, Any]]:
    """Score records, in order.

    Args:
        records: with ``completion`` (text, messages, or an OpenAI-format reply) or ``choices``, and optionally ``prompt``
            (or ``messages``), ``reference`` (or ``answer``, ``golds``, ...), ``id`` and anything else, which is the task's
            ``meta``.
        spec: the reward, as YAML spells it.
        workers: processes; each makes the reward anew.
        batch: records scored together.
        first: number of the first record, for names of records without an id.

    Yields:
        ``{"id", "value", "valid", "reason", "parts"}``; an invalid score has ``value`` None and a reason.

    Raises:
        ConfigError: a reward with running statistics and several workers.
    """
    if workers < 1 or batch < 1:
        raise ConfigError(f"workers and batch must be at least 1, got {workers} and {batch}")
    if workers > 1:
        check_workers(spec, workers)
    chunks = _chunks(records, batch, first)
    if workers == 1:
        open_reward(spec)
        for chunk in chunks:
            yield from score_chunk(chunk)
        return
    from concurrent.futures import Future, ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=open_reward, initargs=(spec,)
    ) as pool:
        waiting: deque[Future[list[dict[str, Any]]]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(score_chunk, chunk))
            # A bounded queue: a million records never wait in memory.
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _has_state(state: Any) -> bool:
    return any(_has_state(v) for v in state.values()) if isinstance(state, Mapping) else state is not None


def _chunks(records: Iterable[Mapping[str, Any]], batch: int, first: int) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    stream = iter(records)
    number = first
    while chunk := [dict(r) for r in islice(stream, batch)]:
        yield [(number + k, r) for k, r in enumerate(chunk)]
        number += len(chunk)


def score_chunk(chunk: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Score numbered records with the process's reward."""
    from guerdon.rewards.conversation import to_trajectory
    from guerdon.types import Trajectory

    rows: list[dict[str, Any]] = []
    good: list[tuple[int, Trajectory]] = []
    for k, (number, record) in enumerate(chunk):
        name = record.get("id", record.get("custom_id", number))
        row: dict[str, Any] = {"id": name, "value": None, "valid": False, "reason": None, "parts": {}}
        rows.append(row)
        key = next((c for c in _REFERENCES if record.get(c) is not None), None)
        meta = {c: v for c, v in record.items() if c not in ("id", "prompt", "completion", key)}
        try:
            made = to_trajectory(
                next((record[c] for c in _PROMPTS if record.get(c) is not None), None),
                completion_of(record), record.get(key) if key else None,
                task_id=str(name), meta=meta,
            )  # fmt: skip
        except DataError as error:
            row["reason"] = f"record: {error}"
            continue
        good.append((k, made))
    scores, _ = _REWARD.assess([t for _, t in good])
    for (k, _), score in zip(good, scores, strict=True):
        parts = {n: v for n, v in score.parts.items() if math.isfinite(v)}
        rows[k] |= {
            "value": score.value if score.valid else None,
            "valid": score.valid,
            "reason": score.reason,
            "parts": parts,
        }
    return rows
