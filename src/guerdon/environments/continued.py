"""Episodes that begin in the middle of another one: from a cut on, the policy thinks on, or is made to answer at once.

A :class:`Cut` is a place between two episodes of a recorded trajectory. :func:`text_cuts` and :func:`turn_cuts` find
such places; :class:`Continued` starts an environment at one, with what was said so far in the prompt, where nothing is
ever trained on; :func:`render_continued` renders that prompt from the recorded token ids, so nothing is tokenised anew.

Source of the idea: Qu et al. 2025, "Optimizing Test-Time Compute via Meta Reinforcement Fine-Tuning" (arXiv 2503.07572).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from guerdon.credit.episodes import MARKERS, episode_offsets
from guerdon.errors import ConfigError, DataError
from guerdon.rollout.protocol import Environment, Episode, Observation
from guerdon.types import Message, Task, Trajectory, Turn, Usage

__all__ = ["Continued", "Cut", "render_continued", "text_cuts", "turn_cuts"]


@dataclass(frozen=True, slots=True)
class Cut:
    """What was said up to the end of an episode of thought.

    Args:
        turns: policy and environment turns; none is the place before any thought.
        open: the last policy turn goes on behind the cut.
        complete: the thought ended here by itself.
        forced: the environment has asked for the answer already, so no suffix has to.
    """

    turns: tuple[Turn, ...] = ()
    open: bool = False
    complete: bool = False
    forced: bool = False

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids, in order."""
        return tuple(i for turn in self.turns for i in turn.token_ids)

    @property
    def text(self) -> str:
        """The same as text."""
        return "".join(turn.text for turn in self.turns)

    def joined(self, later: Cut) -> Cut:
        """This cut and one that was found behind it; an unfinished turn goes on in the next."""
        turns = self.turns + later.turns
        if self.open and later.turns:
            turns = (*self.turns[:-1], _glued(self.turns[-1], later.turns[0]), *later.turns[1:])
        still_open = later.open if later.turns else self.open
        return Cut(turns, still_open, later.complete or self.complete, later.forced or self.forced)


def text_cuts(
    trajectory: Trajectory,
    *,
    close: str | None = "</think>",
    markers: Sequence[str] = MARKERS,
    min_paragraphs: int = 3,
    max_episodes: int | None = None,
) -> list[Cut]:
    """The places before the first episode and behind each one of a thought written in one policy turn.

    Args:
        trajectory: one policy turn with token ids and ``token_ends``.
        close: what ends the thought; what follows is the answer and in no cut. Where it is absent (or None) the whole
            turn is thought.
        markers, min_paragraphs, max_episodes: see :func:`~guerdon.credit.split_episodes`.

    Returns:
        ``k + 1`` cuts for ``k`` episodes; the last one is complete where the thought was closed.

    Raises:
        DataError: more than one turn, or no token ids and ends to cut at.
    """
    turns = [t for t in trajectory.turns if t.speaker == "policy"]
    if len(turns) != len(trajectory.turns) or len(turns) > 1:
        raise DataError(f"task {trajectory.task.id!r} has {len(trajectory.turns)} turns; use turn_cuts for dialogues")
    out = [Cut()]
    if not turns or not turns[0].text:
        return out
    turn = turns[0]
    if turn.token_ends is None or not turn.token_ids:
        raise DataError(f"task {trajectory.task.id!r} carries no token ids and token_ends to cut its text at")
    end = turn.text.find(close) if close else -1
    thought = turn.text if end < 0 else turn.text[:end]
    starts = (0, *turn.token_ends[:-1])
    offsets = episode_offsets(thought, markers, min_paragraphs, max_episodes)
    for offset in offsets:
        n = sum(start < offset for start in starts)
        piece = Turn(
            "policy",
            turn.text[: turn.token_ends[n - 1]],
            turn.token_ids[:n],
            None if turn.logprobs is None else turn.logprobs[:n],
            turn.token_ends[:n],
            turn.meta,
        )
        out.append(Cut((piece,), open=True, complete=end >= 0 and offset == offsets[-1]))
    return out


def turn_cuts(trajectory: Trajectory, thinking: int | None = None) -> list[Cut]:
    """The places before the first and behind each of the policy's turns of thought, with what was said in reply.

    Args:
        trajectory: of several turns; each policy turn is an episode.
        thinking: how many of the policy's turns are thought; by default all but the last, which is the answer.

    Returns:
        ``thinking + 1`` cuts. A reply whose ``meta`` says ``"forces"`` has asked for the answer: its cut is forced and
        complete.
    """
    spoken = [k for k, turn in enumerate(trajectory.turns) if turn.speaker == "policy"]
    count = max(0, len(spoken) - 1) if thinking is None else thinking
    if not 0 <= count <= len(spoken):
        raise DataError(
            f"task {trajectory.task.id!r} has {len(spoken)} policy turns, {count} of thought were asked for"
        )
    out = [Cut()]
    for j in range(count):
        stop = spoken[j + 1] if j + 1 < len(spoken) else len(trajectory.turns)
        turns = trajectory.turns[:stop]
        forced = bool(turns[-1].meta.get("forces")) and turns[-1].speaker == "environment"
        out.append(Cut(turns, complete=forced, forced=forced))
    return out


class _Began(dict[str, str]):
    """An assistant's message that has begun; it carries its token ids and a text that is put behind them."""

    def __init__(self, text: str, ids: tuple[int, ...], suffix: str) -> None:
        super().__init__(role="assistant", content=text + suffix)
        self.ids, self.suffix = ids, suffix


def render_continued(policy: Any) -> Callable[[Sequence[Message]], list[int]]:
    """How prompts of :class:`Continued` become token ids, for the rollout's ``render``; others as the policy does."""

    def render(messages: Sequence[Message]) -> list[int]:
        last = messages[-1] if messages else None
        if isinstance(last, _Began):
            return [*policy.render(messages[:-1]), *last.ids, *(policy.encode(last.suffix) if last.suffix else ())]
        return list(policy.render(messages))

    return render


class Continued:
    """An environment that starts tasks with ``meta["cut"]`` at that cut, and all others as ever.

    With ``meta["terminate"]`` the policy is made to answer at once. What the policy said before the cut is played again
    to the environment, which must therefore answer alike whenever it is told alike; where it does not, the episode
    fails and says so.

    Args:
        environment: what is played.
        force: text behind the cut that makes the policy answer (see :data:`guerdon.search.FORCE_SUFFIX`).
        force_action: what the environment is told as if the policy had said it, where an answer is asked for; None where
            the answer is part of the policy's only turn.
        episodes: after so many new turns of thought the answer is asked for (needs ``force_action``); None: never.

    Raises:
        ConfigError: episodes below 1, or without ``force_action``.
    """

    def __init__(
        self, environment: Environment, *, force: str, force_action: str | None = None, episodes: int | None = None
    ) -> None:
        if episodes is not None and (episodes < 1 or force_action is None):
            raise ConfigError(
                f"episodes needs a number of at least 1 and force_action, got {episodes}, {force_action!r}"
            )
        self.environment, self.force = environment, force
        self.force_action, self.episodes = force_action, episodes

    def start(self, task: Task, *, seed: int, group: int, member: int) -> Episode:
        """Begin ``task``, at its cut where it has one."""
        inner = self.environment.start(task, seed=seed, group=group, member=member)
        cut = task.meta.get("cut")
        if cut is None:
            return inner
        return _ContinuedEpisode(self, inner, cut, bool(task.meta.get("terminate")))


class _ContinuedEpisode:
    def __init__(self, world: Continued, inner: Episode, cut: Cut, terminate: bool) -> None:
        self._world, self._inner, self._cut, self._terminate = world, inner, cut, terminate
        self._suffix = world.force if terminate and not cut.forced else ""
        self._steps = 0

    @property
    def prompt(self) -> Sequence[Message]:
        return (*self._inner.prompt, _Began(self._cut.text, self._cut.ids, self._suffix))

    async def step(self, action: str) -> Observation:
        if self._steps == 0:
            action = await self._replay() + action
        self._steps += 1
        observation = await self._inner.step(action)
        limit, force = self._world.episodes, self._world.force_action
        if observation.done or observation.final or self._terminate or limit is None or self._steps < limit:
            return observation
        assert force is not None
        asked = await self._inner.step(force)
        meta = {**observation.meta, **asked.meta, "forces": True}
        return replace(asked, text=observation.text + asked.text, meta=meta)

    async def _replay(self) -> str:
        """Play what stands before the cut; returns what the policy's next words are a continuation of."""
        turns = self._cut.turns[:-1] if self._cut.open else self._cut.turns
        for k, turn in enumerate(turns):
            if turn.speaker == "policy":
                answer = await self._inner.step(turn.text)
                told = turns[k + 1] if k + 1 < len(turns) else None
                if told is not None and told.speaker == "environment" and not told.text.startswith(answer.text):
                    raise DataError(
                        f"turn {k} was answered {told.text!r} when it was recorded and {answer.text!r} now; "
                        "an episode can only be gone on with where the environment repeats itself"
                    )
        if self._cut.open:
            return self._cut.turns[-1].text + self._suffix
        if self._terminate and not self._cut.forced and self._world.force_action is not None:
            await self._inner.step(self._world.force_action)
        return ""

    def result(self) -> tuple[Usage, Mapping[str, Any]]:
        usage, info = self._inner.result()
        return usage, {**info, "continued": len(self._cut.ids), "terminated": self._terminate}


def _glued(first: Turn, second: Turn) -> Turn:
    """One policy turn out of its two halves."""
    known = first.logprobs is not None and second.logprobs is not None
    ends = None
    if first.token_ends is not None and second.token_ends is not None:
        ends = (*first.token_ends, *(len(first.text) + e for e in second.token_ends))
    return Turn(
        "policy",
        first.text + second.text,
        first.token_ids + second.token_ids,
        (*first.logprobs, *second.logprobs) if known else None,  # type: ignore[misc]
        ends,
        second.meta,
    )
