"""The nouns: small frozen dataclasses that every floor shares. This module imports nothing of Guerdon.

Conventions used everywhere:

* A trajectory is a prompt followed by turns; its *response* is the concatenation of its turns' token
  ids, policy and environment turns alike, in order. Response positions count from 0 at the first
  token of the first turn.
* A :class:`Span` is half-open, ``[start, stop)``. Step spans are spans of response positions and
  cover policy tokens only.
* ``action_mask`` is 1 on tokens sampled by the policy and 0 on everything else. Only those tokens
  are ever trained on.
* Money is in USD, prices in USD per million tokens, time in seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

__all__ = [
    "Group",
    "Message",
    "Score",
    "Segmenter",
    "Span",
    "StopReason",
    "Task",
    "Trajectory",
    "Turn",
    "Usage",
    "action_mask",
    "group_ids",
    "last_action_index",
    "policy_text",
    "response_ids",
    "response_logprobs",
    "response_text",
    "step_ends",
    "step_ids",
    "step_spans",
    "validate_score",
]

Message = Mapping[str, str]
"""One chat message: ``{"role": "system" | "user" | "assistant", "content": text}``."""

Speaker = Literal["policy", "environment"]


class StopReason(str, Enum):
    """Why a completion, or a whole trajectory, came to an end."""

    STOP_STRING = "stop_string"
    """A stop string was produced (a completion only)."""
    EOS = "eos"
    """The model ended its message."""
    LENGTH = "length"
    """The token limit of one completion was reached."""
    DONE = "done"
    """The environment declared the episode finished (for example: it was answered)."""
    MAX_TURNS = "max_turns"
    """The turn limit was reached without a terminal action."""
    CONTEXT = "context"
    """The next turn would not have fitted into the model's context."""
    BUDGET = "budget"
    """Money, calls or time ran out."""
    ABORTED = "aborted"
    """Cancelled from outside (deadline, shutdown, client gone)."""
    ERROR = "error"
    """The environment or the engine failed; ``Trajectory.info["error"]`` says how."""

    @property
    def truncated(self) -> bool:
        """True where the policy did not choose to stop."""
        return self in _TRUNCATED


_TRUNCATED = frozenset(
    {StopReason.LENGTH, StopReason.MAX_TURNS, StopReason.CONTEXT, StopReason.ABORTED, StopReason.ERROR}
)


@dataclass(frozen=True, slots=True)
class Task:
    """One problem to solve.

    Args:
        id: unique within its dataset.
        prompt: chat messages, the last one usually the user's; a plain string is one user message.
        reference: whatever the reward needs: gold answers, unit tests, a database, a rubric.
        meta: anything else that is worth carrying (split, domain, hops, ...).
    """

    id: str
    prompt: tuple[Message, ...]
    reference: Any = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    if TYPE_CHECKING:  # the constructor takes plain text or any sequence; the field always holds a tuple

        def __init__(
            self,
            id: str,
            prompt: str | Sequence[Message],
            reference: Any = None,
            meta: Mapping[str, Any] = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        if isinstance(self.prompt, str):
            object.__setattr__(self, "prompt", ({"role": "user", "content": self.prompt},))
        else:
            object.__setattr__(self, "prompt", tuple(self.prompt))

    @property
    def question(self) -> str:
        """Text of the last user message."""
        return next((m["content"] for m in reversed(self.prompt) if m["role"] == "user"), "")


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A half-open range of positions ``[start, stop)``."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.stop < self.start:
            raise ValueError(f"a span needs 0 <= start <= stop, got [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, position: object) -> bool:
        return isinstance(position, int) and self.start <= position < self.stop


@dataclass(frozen=True, slots=True)
class Turn:
    """One contiguous stretch of text by one speaker.

    Args:
        speaker: ``"policy"`` or ``"environment"``.
        text: what was said.
        token_ids: the ids as sampled (policy) or as fed to the model (environment); empty where the
            engine has no access to ids.
        logprobs: log-probability of each sampled token under the distribution it was drawn from
            (temperature and support included); ``None`` on environment turns and unknown engines.
        token_ends: for each token the offset in ``text`` just past it, where known; it lets a
            :class:`Segmenter` cut inside a turn.
        meta: details of this turn (member asked, latency, ...).
    """

    speaker: Speaker
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] | None = None
    token_ends: tuple[int, ...] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.speaker not in ("policy", "environment"):
            raise ValueError(f"speaker must be 'policy' or 'environment', got {self.speaker!r}")
        for name, values in (("logprobs", self.logprobs), ("token_ends", self.token_ends)):
            if values is not None and len(values) != len(self.token_ids):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.token_ids)} tokens")
        if self.speaker == "environment" and self.logprobs is not None:
            raise ValueError("an environment turn has no log-probabilities: it was not sampled")

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Usage:
    """What something used: calls, tokens, money (USD) and wall-clock seconds; addable."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.calls + other.calls,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.usd + other.usd,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A task, what was said about it, why it stopped, and what it used.

    Args:
        task: the task.
        turns: policy and environment turns in order.
        stop: why the trajectory ended.
        usage: what its environment spent (pool calls, tools). The policy's own tokens are
            in ``policy_usage``.
        policy_usage: tokens and seconds of the policy itself.
        prompt_ids: token ids of the rendered prompt.
        info: what the environment reports (numbers of valid routes, parse errors, an ``"error"``).
    """

    task: Task
    turns: tuple[Turn, ...]
    stop: StopReason
    usage: Usage = Usage()
    policy_usage: Usage = Usage()
    prompt_ids: tuple[int, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of response tokens."""
        return sum(len(turn) for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Group:
    """The trajectories sampled for one task."""

    task: Task
    trajectories: tuple[Trajectory, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "trajectories", tuple(self.trajectories))

    def __len__(self) -> int:
        return len(self.trajectories)


@dataclass(frozen=True, slots=True)
class Score:
    """What a reward says about one trajectory.

    Args:
        value: the outcome.
        steps: one value per step, in the order of ``step_spans``.
        step_spans: the response positions each step covers.
        tokens: one value per response token (0.0 on environment tokens).
        parts: named components, for logs and for blame.
        valid: False where no honest value exists; ``value`` is then NaN and ``reason`` says why.
        reason: why the score is invalid.
    """

    value: float
    steps: tuple[float, ...] | None = None
    step_spans: tuple[Span, ...] | None = None
    tokens: tuple[float, ...] | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    valid: bool = True
    reason: str | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) != (self.step_spans is None):
            raise ValueError("steps and step_spans come together or not at all")
        if self.steps is not None and len(self.steps) != len(self.step_spans or ()):
            raise ValueError(f"{len(self.steps)} step values for {len(self.step_spans or ())} step spans")
        if not self.valid and not self.reason:
            raise ValueError("an invalid score must say why: give reason=")

    @classmethod
    def invalid(cls, reason: str, **parts: float) -> Score:
        """Return a score without an honest value."""
        return cls(math.nan, parts=parts, valid=False, reason=reason)

    def with_value(self, value: float, **parts: float) -> Score:
        """Return a copy with another outcome value and further named parts."""
        return replace(self, value=value, parts={**self.parts, **parts})


def validate_score(score: Any, *, reward: str, task_id: str) -> Score:
    """Return ``score`` when it is a finite :class:`Score` (or an invalid one that says so).

    Numbers and booleans are wrapped. Anything else becomes an invalid score that names reward and task.
    """
    if isinstance(score, bool | int | float):
        score = Score(float(score))
    if not isinstance(score, Score):
        return Score.invalid(f"reward {reward!r} returned {type(score).__name__} for task {task_id!r}")
    values = [score.value, *(score.steps or ()), *(score.tokens or ())]
    if score.valid and not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        return Score.invalid(f"reward {reward!r} returned a non-finite value for task {task_id!r}", **score.parts)
    return score


def response_ids(trajectory: Trajectory) -> list[int]:
    """Token ids of the response: all turns concatenated."""
    return [i for turn in trajectory.turns for i in turn.token_ids]


def action_mask(trajectory: Trajectory) -> list[int]:
    """1 for each response token sampled by the policy, 0 for each environment token."""
    return [int(turn.speaker == "policy") for turn in trajectory.turns for _ in turn.token_ids]


def response_logprobs(trajectory: Trajectory) -> list[float]:
    """Sampling log-probability per response token; 0.0 on environment tokens.

    Raises:
        ValueError: a policy turn carries no log-probabilities.
    """
    out: list[float] = []
    for k, turn in enumerate(trajectory.turns):
        if turn.speaker == "environment":
            out += [0.0] * len(turn)
        elif turn.logprobs is None:
            raise ValueError(f"turn {k} of task {trajectory.task.id!r} has no recorded log-probabilities")
        else:
            out += turn.logprobs
    return out


def response_text(trajectory: Trajectory) -> str:
    """Text of the response, policy and environment turns, prompt excluded."""
    return "".join(turn.text for turn in trajectory.turns)


def policy_text(trajectory: Trajectory) -> str:
    """Text written by the policy alone."""
    return "".join(turn.text for turn in trajectory.turns if turn.speaker == "policy")


def last_action_index(trajectory: Trajectory) -> int | None:
    """Response position of the last policy token, or None where there is none."""
    mask = action_mask(trajectory)
    return max((i for i, m in enumerate(mask) if m), default=None)


def group_ids(groups: Iterable[Group]) -> list[int]:
    """One group number per trajectory, in order; statistics within groups always use these."""
    return [g for g, group in enumerate(groups) for _ in group.trajectories]


def step_ends(spans: Sequence[Span]) -> list[int]:
    """Position of the last token of each step. Empty spans are refused.

    Raises:
        ValueError: a span covers no token.
    """
    for k, span in enumerate(spans):
        if len(span) == 0:
            raise ValueError(f"step {k} covers no token")
    return [span.stop - 1 for span in spans]


def step_ids(spans: Sequence[Span], length: int) -> list[int]:
    """For each of ``length`` positions the number of the step it belongs to, or -1.

    Raises:
        ValueError: spans overlap, are out of order, or exceed ``length``.
    """
    out = [-1] * length
    previous = 0
    for k, span in enumerate(spans):
        if span.start < previous or span.stop > length:
            raise ValueError(f"step {k} [{span.start}, {span.stop}) overlaps, is out of order or exceeds {length}")
        out[span.start : span.stop] = [k] * len(span)
        previous = span.stop
    return out


@dataclass(frozen=True, slots=True)
class Segmenter:
    """Cuts the policy's text of a trajectory into steps.

    Args:
        by: ``"turns"`` (each policy turn is a step), ``"lines"``, ``"blank_lines"``, ``"regex"``
            (``pattern`` matches the separators, which belong to the step they end), or ``"callable"``
            (``cut`` maps a turn's text to the offsets at which steps end).
        pattern: the regular expression for ``"regex"``.
        cut: the function for ``"callable"``.

    A step never crosses a turn. A token that straddles a cut belongs to the step in which it starts.
    Whitespace-only pieces join the step before them (or the one after, at the start of a turn).
    """

    by: Literal["turns", "lines", "blank_lines", "regex", "callable"] = "turns"
    pattern: str | None = None
    cut: Callable[[str], Sequence[int]] | None = None

    def __post_init__(self) -> None:
        if self.by not in ("turns", "lines", "blank_lines", "regex", "callable"):
            raise ValueError(f"by must be turns, lines, blank_lines, regex or callable, got {self.by!r}")
        if (self.by == "regex") != (self.pattern is not None):
            raise ValueError("pattern is required for by='regex', and only there")
        if (self.by == "callable") != (self.cut is not None):
            raise ValueError("cut is required for by='callable', and only there")

    def offsets(self, text: str) -> list[int]:
        """Offsets in ``text`` at which steps end; the last one is ``len(text)``."""
        if self.by == "turns":
            ends: list[int] = []
        elif self.cut is not None:
            ends = [e for e in self.cut(text) if 0 < e < len(text)]
        else:
            pattern = {"lines": r"\n", "blank_lines": r"\n[ \t]*\n\s*"}.get(self.by, self.pattern or "")
            ends = [m.end() for m in re.finditer(pattern, text) if 0 < m.end() < len(text)]
        merged: list[int] = []
        start = 0
        for end in [*sorted(set(ends)), len(text)]:
            if text[start:end].strip():
                merged.append(end)
            elif merged:
                merged[-1] = end
            else:
                continue
            start = end
        return merged or ([len(text)] if text else [])

    def spans(self, trajectory: Trajectory) -> list[Span]:
        """Step spans of a trajectory in response positions.

        Raises:
            ValueError: a turn must be cut inside but carries no ``token_ends``.
        """
        out: list[Span] = []
        base = 0
        for turn in trajectory.turns:
            if turn.speaker == "policy" and len(turn):
                out += [Span(base + s.start, base + s.stop) for s in self._turn_spans(turn)]
            base += len(turn)
        return out

    def _turn_spans(self, turn: Turn) -> list[Span]:
        ends = self.offsets(turn.text)
        if len(ends) <= 1:
            return [Span(0, len(turn))]
        if turn.token_ends is None:
            raise ValueError(f"cutting a turn by {self.by!r} needs Turn.token_ends; ask the engine to record them")
        starts = [0, *turn.token_ends[:-1]]
        cuts = [0, *(sum(s < end for s in starts) for end in ends[:-1]), len(turn)]
        return [Span(a, b) for a, b in pairwise(cuts) if b > a]


def step_spans(trajectory: Trajectory, segmenter: Segmenter) -> tuple[Span, ...]:
    """Step spans of a trajectory under ``segmenter``; the one place where steps are cut."""
    return tuple(segmenter.spans(trajectory))
