"""The one place where completions are read: tags, boxed answers, fenced code, JSON lines.

Everything here takes the text of a response, never a prompt, and runs in (nearly) linear time on any
input: a megabyte of unclosed tags is as harmless as a megabyte of prose.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

__all__ = ["Block", "blocks", "boxed", "extract_answer", "fenced", "fences", "json_lines", "last_block", "tag_counts"]


class Block(NamedTuple):
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
    marks = [(f"<{tag}>", f"</{tag}>", tag) for tag in tags]
    # Where each kind's next opening tag is, -1 where none is left; no place is searched twice for one kind.
    opens = [text.find(opening) for opening, _, _ in marks]
    out: list[Block] = []
    position = 0
    while True:
        start = -1
        for k, at in enumerate(opens):
            if 0 <= at < position:
                opens[k] = at = text.find(marks[k][0], position)
            if at >= 0 and (start < 0 or at < start):
                start, first = at, k
        if start < 0:
            return out
        opening, closing, tag = marks[first]
        inner = start + len(opening)
        stop = text.find(closing, inner)
        if stop < 0:  # then none of its kind is closed any more
            opens[first] = -1
            continue
        position = stop + len(closing)
        out.append(Block(tag, text[inner:stop], start, position))


def last_block(text: str, tag: str) -> str | None:
    """Stripped content of the last ``<tag>...</tag>``, or None; of those that :func:`blocks` finds."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    found: tuple[int, int] | None = None
    start = text.find(opening)
    while start >= 0:
        start += len(opening)
        stop = text.find(closing, start)
        if stop < 0:
            break
        found = start, stop
        start = text.find(opening, stop + len(closing))
    return text[slice(*found)].strip() if found else None


def extract_answer(text: str) -> str:
    """The final answer in a response, or an empty string; the prompt must not be part of ``text``.

    With an ``<answer>`` block (the last one counts): its last balanced box, else its last ``\\( ... \\)``, else its
    whole text. Without one: the last balanced box behind the last ``</think>`` (or anywhere), else nothing.
    """
    block = last_block(text, "answer")
    if block is None:
        return boxed(text.rpartition("</think>")[2]) or ""
    found = boxed(block)
    if found is not None:
        return found
    opened = block.rfind("\\(", 0, max(block.rfind("\\)"), 0))
    return block[opened + 2 : block.find("\\)", opened)].strip() if opened >= 0 else block


def tag_counts(text: str, tags: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Numbers of opening and closing tags of each kind."""
    return {tag: (text.count(f"<{tag}>"), text.count(f"</{tag}>")) for tag in tags}


# A doubled backslash is a line end and escapes nothing, but in front of a box it is what JSON made of a single one.
_BRACES = re.compile(r"(\\boxed\s*\{)|\\[{}]|\\\\(?!boxed)|([{}])")


def boxed(text: str) -> str | None:
    """Content of the last balanced ``\\boxed{...}`` (nested braces allowed, escaped ones do not count), or None."""
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


_FENCE = re.compile(r"^[^\S\n]*(```+|~~~+)[^\S\n]*([\w+#.-]*)([^\n]*)", re.MULTILINE)


def fences(text: str) -> list[tuple[str, str]]:
    """Markdown code fences in order: the language that each is marked with, in lower case, and its content.

    A fence is closed by a line that holds its own marks and nothing else; one that is never closed runs to the end of the
    text. Lines end at ``\\n`` or ``\\r\\n`` and nowhere else: other separators (form feed, U+2028, ...) stay as they are.
    """
    if "```" not in text and "~~~" not in text:
        return []
    text = text.replace("\r\n", "\n")
    out: list[tuple[str, str]] = []
    start, marks, language = -1, "", ""
    for line in _FENCE.finditer(text):
        if start < 0:
            start, marks, language = line.end() + 1, line.group(1), line.group(2).lower()
        elif line.group(1) == marks and not line.group(2) and not line.group(3).strip():
            out.append((language, text[start : line.start() - 1] if line.start() > start else ""))
            start = -1
    if start >= 0:
        out.append((language, text[start:].removesuffix("\n")))
    return out


def fenced(text: str, language: str | None = None) -> list[str]:
    """Contents of :func:`fences`, in order; only those marked ``language`` where given."""
    return [content for mark, content in fences(text) if language is None or mark == language.lower()]


def _lines(text: str) -> list[str]:
    """Lines without their ends. :meth:`str.splitlines` would cut JSON strings and code at U+2028, NEL and form feeds."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def json_lines(text: str) -> Iterator[tuple[int, Any | None, str | None]]:
    """For each non-blank line: its number from 0, the value, and the error where it is not JSON."""
    for number, line in enumerate(_lines(text)):
        if line.strip():
            try:
                yield number, json.loads(line), None
            except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
                yield number, None, f"{type(error).__name__}: {error}"
