"""Is the response well formed? Paired tags in general, and Router-R1's nine rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from guerdon.errors import ConfigError
from guerdon.rewards.base import OnError, Reward
from guerdon.rewards.grammar import blocks, tag_counts
from guerdon.types import Score, Trajectory, policy_text, response_text

__all__ = ["ROUTER_RULES", "RouterFormat", "TagFormat"]

_TAGS = ("search", "answer", "think", "information")
_TAG_STRINGS = tuple(f"<{slash}{tag}>" for tag in _TAGS for slash in ("", "/"))

ROUTER_RULES: Mapping[int, str] = {
    1: "no paired tag at all",
    2: "a tag is opened and closed a different number of times",
    3: "a think block is empty or just '...'",
    4: "a block contains a tag",
    5: "not exactly one answer, no thought, or as many searches as replies are missing",
    6: "the response does not begin with <think>",
    7: "the response does not end with </answer>",
    8: "a search block is not 'NAME:QUERY' with one colon, repeats the placeholder, or names the member in its query",
    9: "a search block names no member of the pool",
}
"""What each rule of :class:`RouterFormat` forbids."""


class TagFormat(Reward):
    """1 where each of ``tags`` occurs exactly once, in order, not nested, with non-blank content; else 0.

    Args:
        tags: names, in the order wanted.
        only: nothing but blanks may stand outside the blocks.
    """

    gives = frozenset({"outcome"})
    range = (0.0, 1.0)

    def __init__(self, *tags: str, only: bool = False, name: str | None = None, on_error: OnError = "raise") -> None:
        super().__init__(name=name, on_error=on_error)
        if not tags or len(set(tags)) < len(tags):
            raise ConfigError(f"give each tag once, got {tags!r}")
        self.tags, self.only = tags, only
        self._marks = [(f"<{tag}>", f"</{tag}>") for tag in tags]

    def score_one(self, trajectory: Trajectory) -> float:
        text = policy_text(trajectory)
        outside, end = "", 0
        for opening, closing in self._marks:
            if text.count(opening) != 1 or text.count(closing) != 1:
                return 0.0
            start = text.find(opening, end)
            inner = start + len(opening)
            stop = text.find(closing, inner) if start >= 0 else -1
            if stop < 0 or not text[inner:stop].strip():
                return 0.0
            if self.only:
                outside += text[end:start]
            end = stop + len(closing)
        return float(not self.only or not (outside + text[end:]).strip())


class RouterFormat(Reward):
    """Router-R1's format reward: 0 where a response breaks none of nine rules, else the severity of the worst.

    The text of the whole response is read, observations included, the prompt never.

    Args:
        members: names that may be asked. ``None`` takes them from the trajectory's ``info["members"]``;
            where neither is known, rule 9 is not checked.
        resolver: maps a written name and the members to a member or ``None``; by default a name must equal
            a member's up to case and outer blanks.
        severities: reward of each broken rule; -1 for all by default.

    The score's parts hold ``rule_k = 1`` for every broken rule; :meth:`check` lists them for a text.

    Source: Router-R1 (arXiv 2506.09033), released format reward, whose three severities are all -1.
    """

    gives = frozenset({"outcome"})
    range = (-1.0, 0.0)

    def __init__(
        self,
        members: Sequence[str] | None = None,
        *,
        resolver: Callable[[str, Sequence[str]], Any] | None = None,
        severities: Mapping[int, float] | None = None,
        name: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(name=name, on_error=on_error)
        unknown = set(severities or {}) - set(ROUTER_RULES)
        if unknown:
            raise ConfigError(f"severities knows the rules 1 to 9, got {sorted(unknown)[0]}")
        self.members = None if members is None else tuple(members)
        self.resolver = resolver
        self.severities = dict.fromkeys(ROUTER_RULES, -1.0) | dict(severities or {})
        self.range = (min(self.severities.values()), 0.0)

    def score_one(self, trajectory: Trajectory) -> Score:
        members = self.members if self.members is not None else trajectory.info.get("members")
        broken = self.check(response_text(trajectory), members)
        value = min((self.severities[rule] for rule in broken), default=0.0)
        return Score(value, parts={f"rule_{rule}": 1.0 for rule in broken})

    def check(self, text: str, members: Sequence[str] | None = None) -> list[int]:
        """Numbers of the rules that ``text`` breaks, in order; see :data:`ROUTER_RULES`."""
        members = self.members if members is None else members
        found = blocks(text, _TAGS)
        by_tag = {tag: [b.content for b in found if b.tag == tag] for tag in _TAGS}
        stripped = text.strip()
        searches = [self._search(content, members) for content in by_tag["search"]]
        broken = {
            1: not found,
            2: any(opened != closed for opened, closed in tag_counts(text, _TAGS).values()),
            3: any(content.strip() in ("", "...") for content in by_tag["think"]),
            4: any(tag in block.content for block in found for tag in _TAG_STRINGS),
            5: len(by_tag["answer"]) != 1 or not by_tag["think"] or len(by_tag["search"]) != len(by_tag["information"]),
            6: not stripped.startswith("<think>"),
            7: not stripped.endswith("</answer>"),
            8: any(malformed for malformed, _ in searches),
            9: any(unknown for _, unknown in searches),
        }
        return [rule for rule, is_broken in broken.items() if is_broken]

    def _search(self, content: str, members: Sequence[str] | None) -> tuple[bool, bool]:
        lowered = content.lower()
        name, colon, query = content.partition(":")
        name, query = name.strip(), query.strip()
        malformed = (
            content.count(":") != 1
            or not query
            or "llm-name" in lowered
            or "your-query" in lowered
            or name.lower() in query.lower()
        )
        if members is None or not colon:
            return malformed, members is not None and not colon
        if self.resolver is not None:
            return malformed, self.resolver(name, members) is None
        return malformed, name.lower() not in {m.strip().lower() for m in members}
