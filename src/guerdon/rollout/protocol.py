"""What a sampling engine, an environment and an episode are: the protocols of the rollout loop.

An :class:`Engine` keeps one live :class:`Stream` per trajectory: the context so far, and whatever
cache the engine needs to continue it without computing it again. The loop alternates
``await stream.generate(...)`` (policy) and ``stream.extend(...)`` (environment).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from guerdon.errors import ConfigError
from guerdon.types import Message, StopReason, Task, Usage

__all__ = ["Completion", "Engine", "Environment", "Episode", "Observation", "Sampling", "Stream"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn.

    Args:
        max_tokens: most tokens of one completion.
        temperature: 0 is greedy decoding.
        top_p: nucleus mass in (0, 1]; 1 keeps the whole vocabulary.
        top_k: 0 keeps the whole vocabulary.
        stop: generation ends as soon as the completion's text contains one of these strings. The
            token that completes it is kept whole, text past the string included.
        seed: of this stream's own generator; ``None`` draws from the engine's generator.
    """

    max_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not self.temperature >= 0:
            raise ConfigError(f"temperature must be >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be >= 0 (0: off), got {self.top_k}")
        object.__setattr__(self, "stop", tuple(self.stop))


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled policy turn.

    ``logprobs`` are under the distribution the tokens were drawn from (after temperature, top-p and
    top-k, renormalised); greedy decoding records them at temperature 1. ``None`` where the engine
    cannot know them.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    stop: StopReason
    usage: Usage = Usage()
    token_ends: tuple[int, ...] | None = None


class Stream(Protocol):
    """One trajectory's live context in an engine."""

    @property
    def length(self) -> int:
        """Tokens in the context so far (prompt, turns)."""
        ...

    async def generate(self, sampling: Sampling) -> Completion:
        """Sample one policy turn and append it to the context."""
        ...

    def extend(self, token_ids: Sequence[int], text: str) -> None:
        """Append environment tokens to the context; they are computed with the next generation."""
        ...

    def close(self) -> None:
        """Give back the cache. Idempotent."""
        ...


@runtime_checkable
class Engine(Protocol):
    """A way to sample from one policy.

    Attributes:
        tokenizer: Hugging Face tokenizer of the policy (``None`` for endpoints without one).
        max_context: most tokens of prompt and response together.
        trainable: True where ids and log-probabilities are recorded, so that rollouts can be trained on.
    """

    tokenizer: Any
    max_context: int
    trainable: bool

    def start(self, messages: Sequence[Message], prompt_ids: Sequence[int], *, group: Hashable = None) -> Stream:
        """Open a stream. Streams with one ``group`` key and equal prompts share the prompt's computation."""
        ...

    async def aclose(self) -> None:
        """Release threads, sessions and memory. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Observation:
    """What an environment answers to one policy turn.

    Args:
        text: appended to the context as an environment turn; may be empty.
        done: the episode is over.
        stop: why, when done.
        final: True asks for one last policy turn. It is passed to ``step`` as well, so that the environment
            can record it, and the episode then ends whatever ``step`` returns.
        meta: goes into the environment turn's ``meta``.
    """

    text: str = ""
    done: bool = False
    stop: StopReason | None = None
    final: bool = False
    meta: Mapping[str, Any] = field(default_factory=dict)


class Episode(Protocol):
    """One task being played."""

    @property
    def prompt(self) -> Sequence[Message]:
        """Chat messages shown to the policy first."""
        ...

    async def step(self, action: str) -> Observation:
        """Act on the text of one policy turn. May wait for the network; other episodes go on."""
        ...

    def result(self) -> tuple[Usage, Mapping[str, Any]]:
        """What the environment spent, and what it wants recorded in ``Trajectory.info``."""
        ...


class Environment(Protocol):
    """Makes episodes."""

    def start(self, task: Task, *, seed: int, group: int, member: int) -> Episode:
        """Begin ``task``.

        Args:
            task: what to play.
            seed: this episode's own.
            group: a number shared by the episodes of one group, derived from the loop's seed and the
                task's id. Episodes of one group must show the same prompt.
            member: counts within the group.
        """
        ...
