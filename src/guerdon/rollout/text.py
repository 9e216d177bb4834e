"""What tokens look like as text: pieces, offsets of tokens in a text, and stop strings found as tokens arrive."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["StopSet", "TokenText"]


class TokenText:
    """Text of token ids, with the bytes of every single token where the tokenizer allows it.

    Args:
        tokenizer: Hugging Face tokenizer.
        decode: ids to text, special tokens kept; the truth that everything here is checked against.
        size: number of ids that the model may produce; at least the tokenizer's own.

    Attributes:
        pieces: bytes of each id. Concatenated they are the text (up to a separator before the first).
        exact: True for byte-level tokenizers, whose pieces concatenate to the text byte by byte.
    """

    def __init__(self, tokenizer: Any, decode: Callable[[Sequence[int]], str], size: int = 0) -> None:
        self.decode = decode
        self.exact, self.pieces = _pieces(tokenizer, decode, len(tokenizer))
        self.pieces += [b""] * (size - len(self.pieces))
        self._lengths = np.array([len(piece) for piece in self.pieces])
        plain = [i for i, piece in enumerate(self.pieces) if piece.isascii() and i < len(tokenizer)]
        # Then the text of such tokens is known without asking the tokenizer, which is slow.
        self._joins = self.exact and decode(plain) == b"".join([self.pieces[i] for i in plain]).decode()

    def text_and_ends(self, ids: Sequence[int], final: int = 0) -> tuple[str, tuple[int, ...]]:
        """Text of ``ids`` without the last ``final`` of them, and each id's end offset in it.

        A token that ends inside a character ends where the last whole character does; the last one ends the text.
        """
        body = ids[: len(ids) - final]
        if self._joins and body and (joined := b"".join([self.pieces[i] for i in body])).isascii():
            return joined.decode(), (*self._lengths[list(body)].cumsum().tolist(), *[len(joined)] * final)
        text = self.decode(body) if body else ""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        ends, length = [], 0
        for token in body:
            length += len(decoder.decode(self.pieces[token]))
            ends.append(length)
        length += len(decoder.decode(b"", final=True))
        shift = 0 if self.exact else len(text) - length
        if length + shift != len(text) or (not self.exact and shift not in (0, -1)):
            ends, shift = [len(self.decode(body[: k + 1]).rstrip("\ufffd")) for k in range(len(body))], 0
        ends = [min(max(end + shift, 0), len(text)) for end in ends]
        ends = [*np.maximum.accumulate(ends[:-1]).tolist(), len(text)] if ends else []
        return text, (*ends, *[len(text)] * final)


class StopSet:
    """Finds stop strings in a completion while it grows.

    Args:
        strings: the stop strings.
        text: the tokenizer's pieces.

    Attributes:
        candidate: bool [V]; only a token that contains the last byte of a stop string can complete it.
    """

    def __init__(self, strings: Sequence[str], text: TokenText) -> None:
        self.strings = tuple(s for s in strings if s)
        self._text = text
        self._bytes = [s.encode() for s in self.strings]
        self._longest = max((len(b) for b in self._bytes), default=0)
        last = {b[-1:] for b in self._bytes}
        self.candidate = np.fromiter((any(b in p for b in last) for p in text.pieces), bool, len(text.pieces))

    def completed(self, ids: Sequence[int]) -> bool:
        """Whether the last of ``ids`` (a whole completion so far) completes a stop string."""
        tail: list[bytes] = []
        size = 0
        for token in reversed(ids):
            piece = self._text.pieces[token]
            tail.append(piece)
            # The last token alone may be long; what counts is what lies before it.
            size += len(piece) if len(tail) > 1 else 0
            if size >= self._longest:
                break
        joined = b"".join(reversed(tail))
        if not any(b in joined for b in self._bytes):
            return False
        if self._text.exact:
            return True
        text = self._text.decode(list(ids))
        return any(s in text for s in self.strings)


def _pieces(tokenizer: Any, decode: Callable[[Sequence[int]], str], size: int) -> tuple[bool, list[bytes]]:
    tokens = tokenizer.convert_ids_to_tokens(list(range(size)))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = (json.loads(backend.to_str()).get("decoder") or {}) if backend is not None else {}
    if decoder.get("type") == "ByteLevel":
        table = _byte_level_table()
        return True, [_byte_level(token or "", table) for token in tokens]
    # Other tokenizers may put a separator between tokens: measure each one behind another.
    anchor = next((i for i in range(size) if len(decode([i, i])) > 0), 0)
    before = decode([anchor])
    pieces = []
    for i, token in enumerate(tokens):
        if token and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            pieces.append(bytes([int(token[3:5], 16)]))
            continue
        both = decode([anchor, i])
        pieces.append((both[len(before) :] if both.startswith(before) else token or "").encode())
    return False, pieces


def _byte_level_table() -> dict[str, int]:
    """The printable stand-in for each byte in byte-level BPE vocabularies."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(b): b for b in printable}
    others = [b for b in range(256) if b not in set(printable)]
    return table | {chr(256 + n): b for n, b in enumerate(others)}


def _byte_level(token: str, table: dict[str, int]) -> bytes:
    if all(c in table for c in token):
        return bytes(table[c] for c in token)
    return token.encode()
