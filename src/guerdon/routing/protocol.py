"""The tag protocol between the router and its pool: what a policy turn asks for, and what a reply may say.

A policy turn may hold ``<search> NAME:QUERY </search>`` (ask a member) or ``<answer> ... </answer>``
(finish). Replies come back between ``<information>`` tags. Only the text that the policy has just
written is ever parsed for actions; text from a member is data, and :func:`neutralise` makes sure that
it cannot be mistaken for anything else later.

Source: Router-R1 (arXiv 2506.09033) and its released rollout code; the grammar follows the code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

__all__ = ["STOP_STRINGS", "TAGS", "Action", "ActionKind", "cut", "neutralise", "observation", "parse_action"]

TAGS = ("think", "search", "information", "answer")
STOP_STRINGS = ("</search>", "</answer>")
PLACEHOLDERS = ("llm-name", "your-query")

_ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
# Also catches variants that a lenient reader, human or model, could take for a tag.
_CONTROL = re.compile(r"<(\s*/?\s*(?:think|search|information|answer)\b[^<>]{0,40})>", re.IGNORECASE)


class ActionKind(str, Enum):
    """What a policy turn asks for."""

    ANSWER = "answer"
    """Finish with the text of the answer block."""
    ROUTE = "route"
    """Ask a member."""
    INVALID = "invalid"
    """A search block that names no member or holds no query."""
    NONE = "none"
    """No complete action."""


@dataclass(frozen=True, slots=True)
class Action:
    """A parsed policy turn.

    Attributes:
        kind: what was asked for.
        name: text before the first ``:`` of a search block, stripped; empty otherwise.
        query: text between the first and the second ``:``, stripped; empty otherwise.
        answer: text of the answer block, stripped; ``None`` unless ``kind`` is ``ANSWER``.
        error: why the action is invalid.
        thought: text of the last think block before the action, for traces.
    """

    kind: ActionKind
    name: str = ""
    query: str = ""
    answer: str | None = None
    error: str | None = None
    thought: str = ""


def cut(text: str) -> str:
    """Keep ``text`` up to its first ``</search>``; without one, up to its first ``</answer>``; else all of it."""
    for tag in STOP_STRINGS:
        end = text.find(tag)
        if end >= 0:
            return text[: end + len(tag)]
    return text


def parse_action(text: str, *, whole_query: bool = False) -> Action:
    """Read the action of one policy turn.

    The first complete search or answer block counts. A search block needs a ``:`` and something after
    its last ``:``, and must not repeat the prompt's placeholders. With several colons the released code
    sends only what stands between the first and the second; ``whole_query=True`` sends all that follows
    the first, so that ``ratio 3:4`` arrives intact (the strict format reward still punishes it).

    Args:
        text: what the policy has just written, and nothing else.
        whole_query: keep further colons in the query.
    """
    kept = cut(text)
    match = _ACTION.search(kept)
    if match is None:
        return Action(ActionKind.NONE, error="no complete <search> or <answer> block", thought=_thought(kept))
    thought = _thought(kept[: match.start()])
    content = match.group(2).strip()
    if match.group(1) == "answer":
        return Action(ActionKind.ANSWER, answer=content, thought=thought)
    lowered = content.lower()
    if any(word in lowered for word in PLACEHOLDERS):
        return Action(ActionKind.INVALID, error="the placeholder of the instructions was repeated", thought=thought)
    if ":" not in content:
        return Action(ActionKind.INVALID, error="no ':' between member and query", thought=thought)
    if not content.rpartition(":")[2].strip():
        return Action(ActionKind.INVALID, error="empty query", thought=thought)
    name, _, rest = content.partition(":")
    query = rest.strip() if whole_query else rest.partition(":")[0].strip()
    return Action(ActionKind.ROUTE, name=name.strip(), query=query, thought=thought)


def _thought(text: str) -> str:
    start = text.rfind("<think>")
    if start < 0:
        return ""
    end = text.find("</think>", start)
    return text[start + len("<think>") : end if end >= 0 else len(text)].strip()


def neutralise(reply: str, control: Iterable[str] = ()) -> str:
    """Return ``reply`` with every control tag made harmless and still readable.

    ``<search>`` becomes ``‹search›``; the same for the other tags, closing tags, any case and inner
    blanks. ``control`` lists further strings that mean something to the policy's tokenizer, such as
    ``<|im_end|>``: an angle bracket or first character is replaced in the same way. The result
    contains none of the eight tags and none of ``control``.
    """
    control = tuple(control)
    while (safe := _once(reply, control)) != reply:
        reply = safe  # what stood around a tag inside another tag can be one now; every pass takes brackets away
    return safe


def _once(text: str, control: tuple[str, ...]) -> str:
    text = _CONTROL.sub(lambda m: f"‹{m.group(1)}›", text)
    for token in sorted(set(control), key=len, reverse=True):
        if token and token in text:
            quiet = token.replace("<", "‹").replace(">", "›").replace("[", "⟦").replace("]", "⟧")
            if quiet == token:
                quiet = f"{token[0]}\u200b{token[1:]}"
            if token in quiet:  # a single character cannot be split
                quiet = "" if token == "\ufffd" else "\ufffd"
            text = text.replace(token, quiet)
    return text


def observation(reply: str) -> str:
    """Wrap a reply as the environment writes it into the context."""
    return f"\n\n<information>{reply.strip()}</information>\n\n"
