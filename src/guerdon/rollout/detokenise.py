"""Text of sampled tokens as they come: bytes of each token, stop strings, token ends."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

__all__ = ["TokenBytes", "TokenText"]


@lru_cache(maxsize=1)
def _byte_of_symbol() -> dict[str, int]:
    """The inverse of the alphabet by which byte-level BPE writes bytes as printable characters."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    table |= {chr(256 + k): b for k, b in enumerate(b for b in range(256) if b not in printable)}
    return table


class TokenBytes:
    """Bytes of every token of a byte-level tokenizer; ``table`` is ``None`` for other kinds.

    Other kinds are decoded by the tokenizer itself, which is exact and slower.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.table = self._table(tokenizer)
        self._ends: dict[str, frozenset[int]] = {}

    @staticmethod
    def _table(tokenizer: Any) -> list[bytes] | None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or "ByteLevel" not in repr(backend.decoder):
            return None
        symbols = _byte_of_symbol()
        added = {i: t.content.encode() for i, t in tokenizer.added_tokens_decoder.items()}
        table = [b""] * len(tokenizer)
        for token, i in tokenizer.get_vocab().items():
            if i in added:
                table[i] = added[i]
            elif all(c in symbols for c in token):
                table[i] = bytes(symbols[c] for c in token)
            else:
                return None
        return table

    def may_end(self, stop: Sequence[str]) -> frozenset[int] | None:
        """Tokens that could complete one of the stop strings: those that hold its last byte."""
        if self.table is None:
            return None
        key = "\0".join(stop)
        if key not in self._ends:
            last = {s.encode()[-1:] for s in stop if s}
            self._ends[key] = frozenset(i for i, b in enumerate(self.table) if any(x in b for x in last))
        return self._ends[key]


class TokenText:
    """The text of one completion, kept up to date token by token."""

    __slots__ = ("_bytes", "_ends", "_may_end", "_source", "_stop", "_tail", "ids")

    def __init__(self, source: TokenBytes, stop: Sequence[str]) -> None:
        self._source = source
        self._stop = [s.encode() for s in stop if s]
        self._tail = max((len(s) for s in self._stop), default=0)
        self._may_end = source.may_end(stop) if self._stop else frozenset()
        self._bytes = bytearray()
        self._ends: list[int] = []
        self.ids: list[int] = []

    def push(self, token: int) -> bool:
        """Add a token; True when the text now holds a stop string."""
        self.ids.append(token)
        table = self._source.table
        if table is None:
            return self._push_decoded()
        piece = table[token]
        self._bytes += piece
        self._ends.append(len(self._bytes))
        if not self._stop or token not in (self._may_end or ()):
            return False
        window = bytes(self._bytes[-(self._tail + len(piece)) :])
        return any(s in window for s in self._stop)

    def _push_decoded(self) -> bool:
        text = self._source.tokenizer.decode(self.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        self._bytes = bytearray(text.encode("utf-8", "replace"))
        self._ends.append(len(self._bytes))
        return any(s in self._bytes for s in self._stop)

    def text(self) -> str:
        """Everything so far; bytes that are not UTF-8 yet show as U+FFFD, as tokenizers decode them."""
        return self._bytes.decode("utf-8", "replace")

    def ends(self) -> tuple[int, ...]:
        """For each token the offset in :meth:`text` just past it; a character split over tokens ends with its last."""
        if self._bytes.isascii():
            return tuple(self._ends)
        out, total = [], len(self.text())
        for k, end in enumerate(self._ends):
            out.append(
                total if k == len(self._ends) - 1 else min(total, len(self._bytes[:end].decode("utf-8", "ignore")))
            )
        return tuple(out)
