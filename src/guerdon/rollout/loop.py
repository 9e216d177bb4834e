"""The multi-turn loop: policy turn, environment step, observation, and so on, for many trajectories at once.

Token ids are appended exactly as sampled and as fed to the model; nothing is tokenised twice.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

from guerdon.errors import ConfigError
from guerdon.rollout.protocol import Completion, Engine, Environment, Episode, Observation, Sampling, Stream
from guerdon.types import Group, Message, StopReason, Task, Trajectory, Turn, Usage

__all__ = ["derive_seed", "rollout", "rollout_sync"]

_CHARACTERS_PER_TOKEN = 4
"""Rough length of a token where an engine has no tokenizer to count with."""

CloseObservation = str | Callable[[str], str]
Render = Callable[[Sequence[Message]], Sequence[int]]


def derive_seed(*parts: Any) -> int:
    """A 63-bit number that depends on the parts' ``repr`` alone: the same in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


async def rollout(
    engine: Engine,
    environment: Environment,
    tasks: Sequence[Task],
    *,
    max_turns: int,
    group_size: int = 1,
    sampling: Sampling | None = None,
    final_sampling: Sampling | None = None,
    max_observation_tokens: int | None = None,
    close_observation: CloseObservation | None = None,
    overflow: Literal["stop", "slide"] = "stop",
    on_error: Literal["record", "raise"] = "record",
    seed: int = 0,
    concurrency: int | None = None,
    on_trajectory: Callable[[Trajectory], None] | None = None,
    render: Render | None = None,
) -> list[Group]:
    """Play every task ``group_size`` times and return one group per task, in order.

    Args:
        engine: samples the policy.
        environment: what the policy acts in. While one episode waits for its environment, others go on.
        tasks: what to play. The randomness of a trajectory depends on ``seed``, its task's id and its place in the
            group alone, so two tasks with one id play the same.
        max_turns: most policy turns of one trajectory.
        group_size: trajectories per task; they share the computation of their prompt.
        sampling: of each policy turn; its ``seed`` is replaced by the trajectory's own.
        final_sampling: of the last turn that is possible or that the environment asks for; default ``sampling``.
        max_observation_tokens: longer observations are cut on the right (by characters, four to a token, where the
            engine has no tokenizer).
        close_observation: what ends an observation that was cut, within the limit: a text, or a function that maps
            the whole observation's text to one.
        overflow: when an observation leaves no room in the context: ``"stop"`` ends the trajectory with CONTEXT;
            ``"slide"`` keeps the last tokens of the context only, computes them anew and goes on. Such a trajectory
            carries ``info["slid"] = True``: its log-probabilities are not those of its whole response.
        on_error: ``"record"`` ends a trajectory whose environment or engine raises with ERROR and the message in
            ``info["error"]``; ``"raise"`` ends the whole rollout.
        seed: of all randomness.
        concurrency: most trajectories at once; default all.
        on_trajectory: called with each trajectory as it finishes.
        render: chat messages to prompt ids; default the engine's policy's ``render``.

    Returns:
        one :class:`~guerdon.types.Group` per task.

    Raises:
        ConfigError: a setting is out of range.
        Exception: with ``on_error="raise"``, whatever an environment raised.
    """
    _check(max_turns, group_size, max_observation_tokens, concurrency, overflow, on_error)
    if overflow == "slide" and not engine.trainable:
        raise ConfigError("overflow='slide' needs an engine that records token ids; use overflow='stop'")
    render_prompt, encode, decode = _text_functions(engine, render)
    settings = _Settings(
        engine=engine,
        environment=environment,
        render=render_prompt,
        encode=encode,
        decode=decode,
        sampling=sampling or Sampling(),
        final_sampling=final_sampling or sampling or Sampling(),
        max_turns=max_turns,
        max_observation_tokens=max_observation_tokens,
        close_observation=close_observation,
        overflow=overflow,
        seed=seed,
    )
    # Streams of different calls never share a prompt: the policy may have changed in between.
    call = object()
    plays = [_Play(settings, task, member, (call, i)) for i, task in enumerate(tasks) for member in range(group_size)]
    results: list[Trajectory | None] = [None] * len(plays)
    queue = iter(range(len(plays)))

    async def work(first: int) -> None:
        number: int | None = first
        while number is not None:
            play = plays[number]
            following = None
            try:
                trajectory = await play.run()
            except Exception as error:  # environments are strangers' code; the error is recorded
                if on_error == "raise":
                    raise
                trajectory = play.failed(error)
            finally:
                # The next stream opens before this one's slot is given back, so that it can take over its prompt.
                following = next(queue, None)
                if following is not None:
                    plays[following].open()
                play.close()
            results[number] = trajectory
            if on_trajectory is not None:
                on_trajectory(trajectory)
            number = following

    started = list(islice(queue, concurrency or len(plays)))
    try:
        for number in started:
            plays[number].open()
        await _all([asyncio.ensure_future(work(number)) for number in started])
    finally:
        for play in plays:
            play.close()
    done = [t for t in results if t is not None]
    assert len(done) == len(plays)
    return [Group(task, tuple(done[i * group_size : (i + 1) * group_size])) for i, task in enumerate(tasks)]


def rollout_sync(engine: Engine, environment: Environment, tasks: Sequence[Task], **options: Any) -> list[Group]:
    """:func:`rollout` for callers without an event loop.

    Raises:
        ConfigError: an event loop is running in this thread; await :func:`rollout` there.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(rollout(engine, environment, tasks, **options))
    raise ConfigError("rollout_sync() was called inside a running event loop; use 'await rollout(...)' there")


@dataclass(frozen=True)
class _Settings:
    engine: Engine
    environment: Environment
    render: Render
    encode: Callable[[str], list[int]] | None
    decode: Callable[[Sequence[int]], str]
    sampling: Sampling
    final_sampling: Sampling
    max_turns: int
    max_observation_tokens: int | None
    close_observation: CloseObservation | None
    overflow: str
    seed: int
    rendered: dict[Hashable, tuple[tuple[Message, ...], tuple[int, ...]]] = field(default_factory=dict)

    def prompt_ids(self, group: Hashable, messages: tuple[Message, ...]) -> tuple[int, ...]:
        """Token ids of a prompt; those of one group are nearly always the same, and templates are slow."""
        known = self.rendered.get(group)
        if known is None or known[0] != messages:
            known = self.rendered[group] = messages, tuple(self.render(messages))
        return known[1]


@dataclass
class _Play:
    """One trajectory in the making."""

    settings: _Settings
    task: Task
    member: int
    group: Hashable
    turns: list[Turn] = field(default_factory=list)
    usage: Usage = Usage()
    messages: tuple[Message, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)
    episode: Episode | None = None
    stream: Stream | None = None
    slides: int = 0
    error: BaseException | None = None

    @property
    def seed(self) -> int:
        return derive_seed(self.settings.seed, self.task.id, self.member)

    def open(self) -> None:
        """Start the episode and its stream; an error is kept for :meth:`run`."""
        s = self.settings
        try:
            group = derive_seed(s.seed, self.task.id)
            self.episode = s.environment.start(self.task, seed=self.seed, group=group, member=self.member)
            self.messages = tuple(self.episode.prompt)
            self.prompt_ids = s.prompt_ids(self.group, self.messages)
            self.stream = s.engine.start(self.messages, self.prompt_ids, group=self.group)
        except Exception as error:  # noqa: BLE001 - raised again by run()
            self.error = error

    def close(self) -> None:
        """Give back the stream."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    async def run(self) -> Trajectory:
        """Alternate policy and environment until one of them ends it."""
        if self.error is not None:
            raise self.error
        s = self.settings
        assert self.episode is not None
        final = False
        for turn in range(s.max_turns):
            completion = await self._policy_turn(s.final_sampling if final or turn + 1 == s.max_turns else s.sampling)
            if completion.stop is StopReason.CONTEXT and not completion.token_ids:
                return self._finish(StopReason.CONTEXT)
            observation = await self.episode.step(completion.text)
            if observation.done:
                self._last_words(observation)
                # An environment that gives no reason cannot know that the policy was cut off.
                cut = completion.stop if completion.stop.truncated else StopReason.DONE
                return self._finish(observation.stop or cut)
            if final or turn + 1 == s.max_turns:
                self._last_words(observation)
                return self._finish(observation.stop or StopReason.MAX_TURNS)
            if completion.stop is StopReason.CONTEXT and s.overflow == "stop":
                return self._finish(StopReason.CONTEXT)
            if not self._observe(observation, s.final_sampling if observation.final else s.sampling):
                return self._finish(StopReason.CONTEXT)
            final = observation.final
        raise AssertionError("unreachable: the last turn always returns")

    def failed(self, error: BaseException) -> Trajectory:
        """What was played before an error, and the error."""
        return self._finish(StopReason.ERROR, {"error": f"{type(error).__name__}: {error}"})

    async def _policy_turn(self, sampling: Sampling) -> Completion:
        assert self.stream is not None
        seed = self.seed if self.slides == 0 else derive_seed(self.seed, self.slides)
        completion = await self.stream.generate(replace(sampling, seed=seed))
        self.usage = self.usage + completion.usage
        if completion.token_ids or completion.text:
            self.turns.append(
                Turn(
                    "policy",
                    completion.text,
                    completion.token_ids,
                    completion.logprobs,
                    completion.token_ends,
                    {"stop": completion.stop},
                )
            )
        return completion

    def _observe(self, observation: Observation, sampling: Sampling) -> bool:
        """Append an observation to the context; False where it does not fit."""
        assert self.stream is not None
        made = self._environment_turn(observation)
        if made is None:
            return True
        turn, ids = made
        limit = self.settings.engine.max_context
        if self.stream.length + len(ids) < limit:
            self.turns.append(turn)
            self.stream.extend(ids, turn.text)
            return True
        if self.settings.overflow == "stop":
            return False
        self.turns.append(turn)
        self._slide(max(1, limit - sampling.max_tokens))
        return True

    def _last_words(self, observation: Observation) -> None:
        """Record what the environment said when the episode was over, as far as there is room."""
        made = self._environment_turn(observation)
        if made is not None and len(self) + len(made[1]) <= self.settings.engine.max_context:
            self.turns.append(made[0])

    def __len__(self) -> int:
        return len(self.prompt_ids) + sum(len(turn) for turn in self.turns)

    def _environment_turn(self, observation: Observation) -> tuple[Turn, Sequence[int]] | None:
        """The observation as a turn, and its tokens; None where it is empty."""
        text, meta = observation.text, observation.meta
        if not text:
            return None
        s = self.settings
        limit = s.max_observation_tokens
        if s.encode is None:
            if limit is not None and len(text) > limit * _CHARACTERS_PER_TOKEN:
                ending = self._ending(text)
                text = text[: max(0, limit * _CHARACTERS_PER_TOKEN - len(ending))] + ending
                meta = {**meta, "truncated": True}
            return Turn("environment", text, meta=meta), ()
        ids = s.encode(text)
        if limit is not None and len(ids) > limit:
            tail = s.encode(self._ending(text))
            ids = [*ids[: max(0, limit - len(tail))], *tail][:limit]
            text, meta = s.decode(ids), {**meta, "truncated": True}
        # Half a transcript's ids would be worse than none: endpoints that give no ids get no ids recorded.
        return Turn("environment", text, tuple(ids) if s.engine.trainable else (), meta=meta), ids

    def _ending(self, text: str) -> str:
        close = self.settings.close_observation
        return "" if close is None else close if isinstance(close, str) else close(text)

    def _slide(self, keep: int) -> None:
        """Go on in a new stream that holds the last ``keep`` tokens of the response so far."""
        assert self.stream is not None
        self.stream.close()
        context = [*self.prompt_ids, *(i for turn in self.turns for i in turn.token_ids)]
        self.slides += 1
        self.info["slid"] = True
        self.stream = self.settings.engine.start(self.messages, context[-keep:])

    def _finish(self, stop: StopReason, info: Mapping[str, Any] | None = None) -> Trajectory:
        spent, report = self.episode.result() if self.episode is not None else (Usage(), {})
        return Trajectory(
            task=self.task,
            turns=tuple(self.turns),
            stop=stop,
            usage=spent,
            policy_usage=self.usage,
            prompt_ids=self.prompt_ids,
            info={**report, **self.info, **(info or {})},
        )


async def _all(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait for all tasks; the first failure, or a cancellation from outside, cancels the others and waits for them."""
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _text_functions(
    engine: Engine, render: Render | None
) -> tuple[Render, Callable[[str], list[int]] | None, Callable[[Sequence[int]], str]]:
    """How prompts are rendered, observations encoded (None where the engine has no tokenizer) and ids decoded."""
    policy, tokenizer = getattr(engine, "policy", None), engine.tokenizer
    if policy is not None:
        return render or policy.render, policy.encode, policy.decode
    if tokenizer is None:
        return render or (lambda messages: ()), None, lambda ids: ""

    def apply_template(messages: Sequence[Message]) -> list[int]:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return render or apply_template, encode, decode


def _check(
    max_turns: int,
    group_size: int,
    max_observation_tokens: int | None,
    concurrency: int | None,
    overflow: str,
    on_error: str,
) -> None:
    for name, value in (("max_turns", max_turns), ("group_size", group_size)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    for name, limit in (("max_observation_tokens", max_observation_tokens), ("concurrency", concurrency)):
        if limit is not None and limit < 1:
            raise ConfigError(f"{name} must be at least 1, or None for no limit; got {limit}")
    if overflow not in ("stop", "slide"):
        raise ConfigError(f"overflow must be 'stop' or 'slide', got {overflow!r}")
    if on_error not in ("record", "raise"):
        raise ConfigError(f"on_error must be 'record' or 'raise', got {on_error!r}")
