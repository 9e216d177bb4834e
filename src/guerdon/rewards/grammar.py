"""The one place where completions are read: tags, boxed answers, fenced code, JSON lines.

Everything here takes the text of a response, never a prompt, and runs in (nearly) linear time on any
input: a megabyte of unclosed tags is as harmless as a megabyte of prose.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Block", "blocks", "boxed", "fenced", "json_lines", "last_block", "tag_counts"]


@dataclass(frozen=True, slots=True)
class Block:
    """A paired tag: ``text[start:stop]`` is ``<tag>content</tag>``."""

    tag: str
    content: str
    start: int
    stop: int


def blocks(text: str, tags: Sequence[str]) -> list[Block]:
    """All non-overlapping ``<tag>...</tag>`` pairs, read from the left; content may span lines.

    An opening tag is paired with the first closing tag of its kind behind it, as the regular expression
    ``<(tags)>(.*?)</\\1>`` would, but without its quadratic time. What lies inside a block is not searched again.
    """
    opens: list[tuple[int, int, str]] = []
    closes: dict[str, list[int]] = {tag: [] for tag in tags}
    for match in _tag_pattern(tuple(tags)).finditer(text):
        if match.group(1):
            closes[match.group(2)].append(match.start())
        else:
            opens.append((match.start(), match.end(), match.group(2)))
    out: list[Block] = []
    position = 0
    for start, inner, tag in opens:
        if start < position:
            continue
        ends = closes[tag]
        k = bisect_left(ends, inner)
        if k == len(ends):
            continue
        position = ends[k] + len(tag) + 3
        out.append(Block(tag, text[inner : ends[k]], start, position))
    return out


_PATTERNS: dict[tuple[str, ...], re.Pattern[str]] = {}


def _tag_pattern(tags: tuple[str, ...]) -> re.Pattern[str]:
    if tags not in _PATTERNS:
        _PATTERNS[tags] = re.compile(f"<(/?)({'|'.join(map(re.escape, tags))})>")
    return _PATTERNS[tags]


def last_block(text: str, tag: str) -> str | None:
    """Stripped content of the last ``<tag>...</tag>``, or None."""
    found = blocks(text, [tag])
    return found[-1].content.strip() if found else None


def tag_counts(text: str, tags: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Numbers of opening and closing tags of each kind."""
    return {tag: (text.count(f"<{tag}>"), text.count(f"</{tag}>")) for tag in tags}


_BRACES = re.compile(r"(\\boxed\s*\{)|\\[{}]|([{}])")


def boxed(text: str) -> str | None:
    """Content of the last balanced ``\\boxed{...}`` (nested braces allowed), or None."""
    last: tuple[int, int] | None = None
    opened: list[int | None] = []  # for each open brace where its content begins; None where it is no box's
    for match in _BRACES.finditer(text):
        if match.group(1):
            opened.append(match.end())
        elif match.group(2) == "{":
            opened.append(None)
        elif match.group(2) and opened:
            start = opened.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, match.start())
    return text[slice(*last)].strip() if last else None


def fenced(text: str, language: str | None = None) -> list[str]:
    """Contents of Markdown code fences, in order; only those marked ``language`` where given.

    A fence that is never closed runs to the end of the text.
    """
    out: list[str] = []
    lines: list[str] | None = None
    marker, wanted = "", False
    for line in text.splitlines():
        stripped = line.strip()
        if lines is None:
            match = re.match(r"^(```+|~~~+)\s*([\w+#.-]*)", stripped)
            if match:
                marker, lines = match.group(1), []
                wanted = language is None or match.group(2).lower() == language.lower()
        elif stripped == marker:
            if wanted:
                out.append("\n".join(lines))
            lines = None
        else:
            lines.append(line)
    if lines is not None and wanted:
        out.append("\n".join(lines))
    return out


def json_lines(text: str) -> Iterator[tuple[int, Any | None, str | None]]:
    """For each non-blank line: its number from 0, the value, and the error where it is not JSON."""
    for number, line in enumerate(text.splitlines()):
        if line.strip():
            try:
                yield number, json.loads(line), None
            except (json.JSONDecodeError, RecursionError) as error:
                yield number, None, f"{type(error).__name__}: {error}"
