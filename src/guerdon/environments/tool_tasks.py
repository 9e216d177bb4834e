"""Tool calls to be written as JSON from a schema in the prompt: names are shuffled, masked, and partly never seen.

A prompt lists tools; a request names one to three of them by topic, with the values of their parameters. What a tool and
its parameters are called stands in the list alone: a random share of the tools of every prompt goes by random aliases (the
masking of Hammer, Lin et al. 2024, arXiv 2410.04587), the list is shuffled, and so are the parameters. So the schema has
to be read. Four of the sixteen tools occur in the test split only. Nothing is executed.

Tasks carry the reference output in ToolRL's form (arXiv 2504.13958): ``<think>``, and ``<tool_call>`` with one JSON object
a line. Episodes are single turns (:class:`~guerdon.environments.single.SingleTurn`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from guerdon.errors import ConfigError
from guerdon.rewards import Reward
from guerdon.rewards.tools import ToolParseError, parse_tool_calls, reference_calls
from guerdon.types import Message, Score, Task, Trajectory, policy_text

__all__ = ["HELD_OUT", "TOOLS", "ExactCalls", "Tool", "drill_tasks", "tool_tasks", "tool_tokenizer", "tool_words"]

Register = Literal["compact", "natural"]


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool.

    Args:
        topic: the word by which requests and the list speak of it.
        name: what calls must name, unless it is masked.
        parameters: ``(word in requests, name in calls, kind of value)``, the kind being a key of :data:`KINDS`.
    """

    topic: str
    name: str
    parameters: tuple[tuple[str, str, str], ...] = ()


KINDS: dict[str, tuple[Any, ...]] = {
    "number": tuple(range(2, 32)),
    "city": ("rome", "lima", "oslo", "cairo", "quito", "delhi", "paris", "tokyo"),
    "colour": ("red", "blue", "green", "amber", "white", "violet"),
    "language": ("french", "hindi", "greek", "dutch", "polish", "korean"),
    "person": ("anna", "boris", "chen", "dora", "emil", "fatima", "goran", "hana"),
    "thing": ("apple", "chair", "violin", "ladder", "candle", "mirror", "basket", "hammer"),
}
"""Values of each kind."""

TOOLS = (
    Tool("weather", "get_forecast", (("town", "location", "city"), ("days", "horizon", "number"))),
    Tool("alarm", "set_alarm", (("hour", "wake_hour", "number"),)),
    Tool("hotel", "book_room", (("near", "area", "city"), ("nights", "stay", "number"), ("guests", "party", "number"))),
    Tool("flight", "find_flights", (("from", "origin", "city"), ("to", "destination", "city"), ("on", "date", "number"), ("seats", "tickets", "number"))),
    Tool("song", "play_song", (("by", "artist", "person"),)),
    Tool("timer", "start_timer", (("minutes", "duration", "number"),)),
    Tool("news", "read_news"),
    Tool("word", "translate", (("term", "source_text", "thing"), ("into", "target_language", "language"))),
    Tool("mail", "send_mail", (("for", "recipient", "person"), ("about", "subject", "thing"))),
    Tool("shop", "order_item", (("item", "product", "thing"), ("count", "quantity", "number"), ("tint", "variant", "colour"))),
    Tool("joke", "tell_joke"),
    Tool("meeting", "plan_meeting", (("with", "attendee", "person"), ("at", "start_hour", "number"), ("lasting", "length_minutes", "number"), ("in", "venue", "city"))),
    Tool("lamp", "set_light", (("shade", "light_colour", "colour"), ("level", "brightness", "number"))),
    Tool("parcel", "track_parcel", (("code", "tracking_number", "number"),)),
    Tool("taxi", "call_taxi", (("pickup", "start_point", "city"), ("drop", "end_point", "city"), ("riders", "passengers", "number"))),
    Tool("gift", "send_gift", (("friend", "receiver", "person"), ("present", "gift_item", "thing"), ("wrapped", "paper_colour", "colour"), ("day", "delivery_day", "number"))),
)  # fmt: skip
HELD_OUT = ("lamp", "parcel", "taxi", "gift")
"""Topics of the tools that no training prompt shows."""

_SYLLABLES = ("ba", "ko", "mi", "du", "ze", "ra", "pu", "lo", "ti", "ne")
NAME_ALIASES = tuple(f"{a}{b}x" for a in _SYLLABLES for b in _SYLLABLES if a != b)[::2]
KEY_ALIASES = tuple(f"{a}{b}q" for a in _SYLLABLES for b in _SYLLABLES if a != b)[::2]
_SPOKEN = ("list", "ask", "and")


def tool_tasks(
    n: int,
    split: Literal["train", "test"] = "train",
    *,
    unseen: bool = False,
    listed: int = 4,
    calls: Sequence[int] = (1, 2, 3),
    masked: float = 0.5,
    register: Register = "compact",
    seed: int = 0,
) -> list[Task]:
    """Draw ``n`` tasks; the same arguments give the same tasks.

    Args:
        n: tasks.
        split: whose; the two share no draw.
        unseen: the tools asked for are those that training never shows (test split only).
        listed: tools in each prompt.
        calls: numbers of calls to draw from.
        masked: probability that a tool goes by aliases.
        register: ``"compact"`` is a list of words for small vocabularies; ``"natural"`` is ToolRL's prompt with JSON
            schemas.
        seed: of the draw.

    Raises:
        ConfigError: senseless numbers.
    """
    if unseen and split == "train":
        raise ConfigError("unseen tools are the test split's; give split='test'")
    known = [t for t in TOOLS if t.topic not in HELD_OUT]
    novel = [t for t in TOOLS if t.topic in HELD_OUT]
    most = max(calls, default=0)
    if min(calls, default=0) < 1 or most > min(listed, len(novel)) or not listed <= len(known):
        raise ConfigError(f"calls must be from 1 to at most listed (1 to {len(known)}), got calls={tuple(calls)}, listed={listed}")  # fmt: skip
    if not 0 <= masked <= 1 or register not in ("compact", "natural"):
        raise ConfigError(f"masked is a probability and register compact or natural, got {masked} and {register!r}")
    rng = np.random.default_rng([seed, 2 * (split == "test") + unseen])
    out = []
    for k in range(n):
        count = int(rng.choice(calls))
        if unseen:
            asked = _some(novel, count, rng)
            rest = _some([t for t in TOOLS if t not in asked], listed - count, rng)
        else:
            shown = _some(known, listed, rng)
            asked, rest = shown[:count], shown[count:]
        name = f"tools-{split}{'-unseen' if unseen else ''}-{seed}-{k}"
        out.append(_task(name, asked, rest, masked, register, rng))
    return out


def drill_tasks(n: int, *, listed: int = 4, calls: Sequence[int] = (1, 2, 3), seed: int = 0) -> list[Task]:
    """Tasks about tools that do not exist, put together from all words: reading, and nothing to remember.

    Every topic, word, name and alias of the vocabulary occurs here in arbitrary places, those of the held-out tools
    included, so that no word owns another.
    """
    rng = np.random.default_rng([seed, 7])
    words = [*(t.topic for t in TOOLS), *(p[0] for t in TOOLS for p in t.parameters)]
    kinds = list(KINDS)
    out = []
    for k in range(n):
        spoken = iter(rng.permutation(words).tolist())
        made = []
        for _ in range(listed):
            topic = next(spoken)
            size = int(rng.choice(5, p=(0.1, 0.25, 0.3, 0.2, 0.15)))
            made.append(
                Tool(topic, "", tuple((next(spoken), "", kinds[int(rng.integers(len(kinds)))]) for _ in range(size)))
            )
        count = int(rng.choice(calls))
        names = [*NAME_ALIASES, *(t.name for t in TOOLS)]
        keys = [*KEY_ALIASES, *(p[1] for t in TOOLS for p in t.parameters)]
        out.append(_task(f"tool-drill-{seed}-{k}", made[:count], made[count:], 1.0, "compact", rng, names, keys))
    return out


def tool_words() -> list[str]:
    """Single tokens of a vocabulary for the compact register: topics, words, names, values and pieces of JSON."""
    names = [*(t.name for t in TOOLS), *NAME_ALIASES]
    keys = [*(p[1] for t in TOOLS for p in t.parameters), *KEY_ALIASES]
    values = [f" {json.dumps(v)}" for kind in KINDS.values() for v in kind]
    spoken = [*_SPOKEN, *(t.topic for t in TOOLS), *(p[0] for t in TOOLS for p in t.parameters)]
    pieces = ["<think>", " </think>", "\n", "<tool_call>", "</tool_call>", "<response>", "</response>", '{"name":', ', "parameters": {', ",", "}}\n", "}}"]  # fmt: skip
    return [*dict.fromkeys([*pieces, *(f" {w}" for w in spoken), *(f' "{w}"' for w in names), *(f' "{w}":' for w in keys), *values])]  # fmt: skip


def tool_tokenizer() -> Any:
    """A tokenizer with one token for each of :func:`tool_words`, and bytes for anything else."""
    from guerdon.policies import train_bpe

    words = tool_words()
    return train_bpe(["0"], 258 + len(words), atoms=(), words=words)


class ExactCalls(Reward):
    """1 where the calls are those of the reference, in order, every value included; else 0. The form does not matter.

    Parts: ``calls`` (how many were read; 0 where they cannot be).
    """

    range = (0.0, 1.0)
    gives = frozenset({"outcome"})

    def score_one(self, trajectory: Trajectory) -> Score:
        wanted = reference_calls(trajectory.task.reference, trajectory.task.id)[1] or []
        try:
            made = parse_tool_calls(policy_text(trajectory))
        except ToolParseError:
            return Score(0.0, parts={"calls": 0.0})
        return Score(float(made == wanted), parts={"calls": float(len(made))})


def _some(items: Sequence[Tool], n: int, rng: np.random.Generator) -> list[Tool]:
    return [items[int(i)] for i in rng.permutation(len(items))[:n]]


def _task(
    name: str,
    asked: Sequence[Tool],
    rest: Sequence[Tool],
    masked: float,
    register: Register,
    rng: np.random.Generator,
    names: Sequence[str] = NAME_ALIASES,
    more_keys: Sequence[str] = KEY_ALIASES,
) -> Task:
    """Name what is listed, draw values, and write prompt and reference."""
    tools = [*asked, *rest]
    aliases, keys = (iter(rng.permutation(list(x)).tolist()) for x in (names, more_keys))
    shown = []
    for tool in tools:
        hidden = rng.random() < masked
        order = rng.permutation(len(tool.parameters)).tolist()
        parameters = [tool.parameters[i] for i in order]
        shown.append(Tool(tool.topic, next(aliases) if hidden else tool.name, tuple((w, next(keys) if hidden else k, kind) for w, k, kind in parameters)))  # fmt: skip
    used: set[Any] = set()
    request: list[str] = []
    wanted: list[dict[str, Any]] = []
    for tool in shown[: len(asked)]:
        spoken = [tool.topic]
        filled: dict[str, Any] = {}
        for word, key, kind in tool.parameters:
            free = [v for v in KINDS[kind] if v not in used] or list(KINDS[kind])
            value = free[int(rng.integers(len(free)))]
            used.add(value)
            spoken.append(f"{word} {json.dumps(value)}")
            filled[key] = value
        request.append(" ".join(spoken))
        wanted.append({"name": tool.name, "parameters": filled})
    listed = [shown[int(i)] for i in rng.permutation(len(shown))]
    prompt: str | list[Message] = _compact(listed, request) if register == "compact" else _natural(listed, request)
    topics = tuple(t.topic for t in asked)
    reference = _output(asked[0].topic, wanted, spaced=register == "compact")
    return Task(name, prompt, reference, {"topics": topics, "calls": len(asked)})


def _compact(listed: Sequence[Tool], request: Sequence[str]) -> str:
    entries = [f'list {t.topic} "{t.name}"' + "".join(f' {w} "{k}":' for w, k, _ in t.parameters) for t in listed]
    return f" {' '.join(entries)} ask {' and '.join(request)}"


def _output(thought: str, calls: Sequence[dict[str, Any]], *, spaced: bool) -> str:
    """A reference output; ``spaced`` spells its JSON so that every compact token begins with the space before it."""
    lines = []
    for call in calls:
        inside = ",".join(f' "{k}": {json.dumps(v)}' for k, v in call["parameters"].items())
        lines.append(f'{{"name": "{call["name"]}", "parameters": {{{inside}}}}}' if spaced else json.dumps(call))
    return f"<think> {thought} </think>\n<tool_call>\n" + "\n".join(lines) + "\n</tool_call>"


_SYSTEM = """You help in a dialogue by calling tools and by answering.

**Available Tools**
{tools}

**Steps**
1. Think about what the user wants.
2. Decide which tools to call, and with which parameters.
3. Respond where words are needed.

**Output Format**
<think> your thoughts </think>
<tool_call>
{{"name": "tool name", "parameters": {{"parameter name": "value"}}}}
{{"name": "another tool", "parameters": {{}}}}
</tool_call>
<response> your answer </response>

**Notes**
- <think> is required, and at least one of <tool_call> and <response>.
- Several calls are allowed, one JSON object a line, each with "name" and "parameters" (an empty object where there are none).
- The history may hold earlier calls and their results in <obs>."""


def _natural(listed: Sequence[Tool], request: Sequence[str]) -> list[Message]:
    lines = []
    for number, tool in enumerate(listed, 1):
        schema = {
            k: {"description": w, "type": "integer" if kind == "number" else "string"} for w, k, kind in tool.parameters
        }
        lines.append(f"{number}. Name: {tool.name}\nDescription: {tool.topic}\nParameters: {json.dumps(schema)}")
    user = f"**Dialogue Records History**\n<user> Please do this, in order: {'; '.join(request)}. </user>"
    return [
        {"role": "system", "content": _SYSTEM.format(tools="\n".join(lines))},
        {"role": "user", "content": user},
    ]
