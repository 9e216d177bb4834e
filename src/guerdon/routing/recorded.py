"""A backend that replays recorded replies, and never makes one up."""

from __future__ import annotations

import asyncio
import csv
import json
import math
import threading
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.errors import ConfigError, DataError
from guerdon.routing.member import BackendError, Outcome, RawReply
from guerdon.routing.whole import WholeBackend, last_user_text
from guerdon.types import Message

__all__ = ["Recorded", "RecordedBackend", "read_recorded", "squash"]

Recorded = RawReply | tuple[str, int | None] | str
"""A recorded reply: whole, as ``(text, output tokens)``, or its text."""


class RecordedBackend(WholeBackend):
    """Replays recorded replies: the exact question first, then the nearest one above a threshold, else a miss.

    Questions are the same when they are equal up to blanks.

    Args:
        replies: question to reply.
        encoder: has ``encode(texts) -> [n, d]`` of unit rows; without one only exact questions are known.
        threshold: least cosine similarity of a nearest question.
        identity: which recording this is; it makes replies cacheable.
        extract: finds the recorded question in what is asked (for example behind a wrapper prompt).

    Raises:
        DataError: no replies.
        ConfigError: the threshold is not in (0, 1].
    """

    def __init__(
        self,
        replies: Mapping[str, Recorded],
        *,
        encoder: Any = None,
        threshold: float = 0.9,
        identity: str | None = None,
        extract: Callable[[str], str] = str,
    ) -> None:
        if not replies:
            raise DataError("a recorded member needs at least one recorded reply")
        if not 0 < threshold <= 1:
            raise ConfigError(f"threshold must be in (0, 1], got {threshold}")
        self._replies = {squash(q): _raw(r) for q, r in replies.items()}
        self._encoder, self._threshold, self._extract = encoder, threshold, extract
        self._vectors: np.ndarray | None = None
        self._lock = threading.Lock()
        self.identity = identity
        self.exact = self.near = self.missed = 0

    async def complete(self, messages: Seq[Message], **options: Any) -> RawReply:
        """Look it up.

        Raises:
            BackendError: ``Outcome.MISS`` where nothing fits.
        """
        question = squash(self._extract(last_user_text(messages)))
        found = self._replies.get(question)
        if found is not None:
            self.exact += 1
            return found
        if self._encoder is not None:
            found = await asyncio.to_thread(self._nearest, question)
            if found is not None:
                self.near += 1
                return found
        self.missed += 1
        raise BackendError(Outcome.MISS, "no recorded reply to this question")

    def _nearest(self, question: str) -> RawReply | None:
        with self._lock:
            if self._vectors is None:
                self._vectors = np.asarray(self._encoder.encode(list(self._replies)))
        scores = self._vectors @ np.asarray(self._encoder.encode([question]))[0]
        best = int(scores.argmax())
        return list(self._replies.values())[best] if scores[best] >= self._threshold else None


def squash(text: str) -> str:
    """``text`` with every run of blanks made one, and none around it."""
    return " ".join(text.split())


def _raw(reply: Recorded) -> RawReply:
    if isinstance(reply, RawReply):
        return reply
    return RawReply(reply) if isinstance(reply, str) else RawReply(reply[0], None, reply[1])


def read_recorded(
    path: str | Path, *, member: str = "member", query: str = "query", reply: str = "reply"
) -> dict[str, dict[str, RawReply]]:
    """Read recorded replies from JSONL or CSV.

    Args:
        path: with the three columns below, and optionally ``input_tokens``, ``output_tokens`` and ``model``.
        member, query, reply: names of the columns. A file without a member column is one member's, under ``""``.

    Returns:
        Member to question to reply.

    Raises:
        DataError: unreadable, empty, or rows that are not whole; the first bad rows are named.
    """
    path = Path(path)
    out: dict[str, dict[str, RawReply]] = {}
    bad: list[str] = []
    rows = _rows(path)
    single = all(isinstance(row, dict) and member not in row for row in rows)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            bad.append(f"row {number} is no object")
            continue
        missing = [k for k in ((query, reply) if single else (member, query, reply)) if row.get(k) in (None, "")]
        if missing:
            bad.append(f"row {number} has no {missing[0]!r}")
            continue
        try:
            given, made = (_tokens(row.get(k)) for k in ("input_tokens", "output_tokens"))
        except ValueError:
            bad.append(f"row {number} has token counts that are no whole numbers >= 0")
            continue
        whose = "" if single else str(row[member])
        model = row.get("model") or None
        out.setdefault(whose, {})[str(row[query])] = RawReply(str(row[reply]), given, made, model)
    if bad:
        raise DataError(f"{path}: {'; '.join(bad[:3])}{f' and {len(bad) - 3} more' if len(bad) > 3 else ''}")
    if not out:
        raise DataError(f"{path} holds no recorded replies")
    return out


def _rows(path: Path) -> list[Any]:
    try:
        if path.suffix.lower() == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                return list(csv.DictReader(file))
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as recorded replies: {error}") from error


def _tokens(value: Any) -> int | None:
    if value is None or value == "":
        return None
    number = float(value)
    if not (math.isfinite(number) and number >= 0 and number.is_integer()):
        raise ValueError(value)
    return int(number)
