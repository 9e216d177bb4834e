"""Turns of a small text world as bags of features, without any weights: sentences, the turn, and pairs of both."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

from guerdon.errors import ConfigError

__all__ = ["SentencePairs"]

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


class SentencePairs:
    """Encodes a text whose last line is a turn and whose other lines are what it answers.

    Features are each sentence of the context, the turn, and each sentence together with the turn, hashed into a vector
    of counts. A linear map of it already knows which action suits which sentence. For worlds with few distinct
    sentences; use a sentence encoder or a policy elsewhere.

    Args:
        width: of the vector; features that collide cannot be told apart.

    Raises:
        ConfigError: a width below 1.
    """

    def __init__(self, width: int = 2048) -> None:
        if width < 1:
            raise ConfigError(f"width must be at least 1, got {width}")
        self.width = width

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Counts ``[n, width]`` float32."""
        out = np.zeros((len(texts), self.width), dtype=np.float32)
        for row, text in zip(out, texts, strict=True):
            context, _, turn = text.rpartition("\n")
            said = {s.strip() for s in _SENTENCE.split(context) if s.strip()}
            for feature in (f"\0{turn}", *said, *(f"{s}\0{turn}" for s in said)):
                row[zlib.crc32(feature.encode()) % self.width] += 1.0
        return out
