"""Prefixes of solutions as sampled token ids, and going on from them on any engine: whole solutions or single steps."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from guerdon.errors import ConfigError, DataError
from guerdon.rollout.loop import derive_seed
from guerdon.rollout.protocol import Completion, Engine, Sampling
from guerdon.types import Segmenter, StopReason, Task, Trajectory, Turn, Usage, step_spans

if TYPE_CHECKING:
    from guerdon.policies import Policy

__all__ = ["EngineSampler", "Prefix", "prefixes_of"]


@dataclass(frozen=True, slots=True)
class Prefix:
    """The beginning of a solution, as it was sampled.

    Args:
        task: what is solved.
        prompt_ids: token ids of the rendered prompt.
        ids: response token ids so far; empty at the root.
        text: their text.
        token_ends: for each token the offset in ``text`` just past it, where known.
        logprobs: of each token when it was sampled, where known.
        ended: the policy has ended its message; nothing can follow.
        stop: why the last piece ended, where known.

    Two prefixes are the same prefix when task and ids agree (:attr:`key`).
    """

    task: Task
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...] = ()
    text: str = ""
    token_ends: tuple[int, ...] | None = ()
    logprobs: tuple[float, ...] | None = ()
    ended: bool = False
    stop: StopReason | None = None

    def __post_init__(self) -> None:
        for name in ("token_ends", "logprobs"):
            values = getattr(self, name)
            if self.ids and values is not None and len(values) == 0:
                object.__setattr__(self, name, None)
            elif values is not None and len(values) != len(self.ids):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.ids)} tokens")

    @property
    def key(self) -> tuple[str, tuple[int, ...], tuple[int, ...], bool]:
        """What makes a prefix this prefix."""
        return self.task.id, self.prompt_ids, self.ids, self.ended

    def __len__(self) -> int:
        """Response tokens so far."""
        return len(self.ids)

    @classmethod
    def root(cls, policy: Policy, task: Task) -> Prefix:
        """The empty prefix: the prompt alone."""
        return cls(task, tuple(policy.render(task.prompt)))

    def extended(self, completion: Completion) -> Prefix:
        """This prefix and a completion sampled behind it."""
        if self.ended:
            raise DataError(f"the solution of task {self.task.id!r} has ended; nothing can follow")
        ends = logprobs = None
        if self.token_ends is not None and completion.token_ends is not None:
            ends = (*self.token_ends, *(len(self.text) + e for e in completion.token_ends))
        if self.logprobs is not None and completion.logprobs is not None:
            logprobs = (*self.logprobs, *completion.logprobs)
        return replace(
            self,
            ids=(*self.ids, *completion.token_ids),
            text=self.text + completion.text,
            token_ends=ends,
            logprobs=logprobs,
            ended=completion.stop is StopReason.EOS,
            stop=completion.stop,
        )

    def trajectory(self, usage: Usage | None = None) -> Trajectory:
        """The prefix as a trajectory of one policy turn: DONE where it has ended, else as it was cut off."""
        turn = Turn("policy", self.text, self.ids, self.logprobs, self.token_ends, {"stop": self.stop})
        stop = StopReason.DONE if self.ended else self.stop or StopReason.LENGTH
        if stop in (StopReason.STOP_STRING, StopReason.EOS):
            stop = StopReason.DONE
        return Trajectory(
            self.task, (turn,) if self.ids else (), stop, policy_usage=usage or Usage(), prompt_ids=self.prompt_ids
        )


def prefixes_of(trajectory: Trajectory, segmenter: Segmenter) -> list[Prefix]:
    """The empty prefix and the one at the end of each step, ``S + 1`` in all; the last is the whole solution.

    Raises:
        DataError: more than one turn (the environment's state cannot be rebuilt from tokens), no ids, or no prompt ids.
    """
    if len(trajectory.turns) > 1 or any(turn.speaker != "policy" for turn in trajectory.turns):
        raise DataError(
            f"task {trajectory.task.id!r}: prefixes are of solutions in one policy turn, this one has "
            f"{len(trajectory.turns)} turns; an environment cannot be set back to the middle of an episode"
        )
    if not trajectory.prompt_ids:
        raise DataError(f"the trajectory of task {trajectory.task.id!r} carries no prompt ids")
    root = Prefix(trajectory.task, trajectory.prompt_ids)
    if not trajectory.turns or not len(trajectory.turns[0]):
        if trajectory.turns and trajectory.turns[0].text:
            raise DataError(f"the solution of task {trajectory.task.id!r} has text but no token ids")
        return [root]
    turn = trajectory.turns[0]
    whole = not trajectory.stop.truncated
    out = [root]
    for span in step_spans(trajectory, segmenter):
        last = span.stop == len(turn)
        ends = turn.token_ends
        if ends is None and not last:
            raise DataError(f"the solution of task {trajectory.task.id!r} carries no token_ends to cut its text at")
        out.append(
            Prefix(
                trajectory.task,
                trajectory.prompt_ids,
                turn.token_ids[: span.stop],
                turn.text if last or ends is None else turn.text[: ends[span.stop - 1]],
                None if ends is None else ends[: span.stop],
                None if turn.logprobs is None else turn.logprobs[: span.stop],
                ended=last and whole,
                stop=(StopReason.EOS if whole else trajectory.stop) if last else StopReason.STOP_STRING,
            )
        )
    return out


class EngineSampler:
    """Goes on from prefixes on a sampling engine; ids are fed as they were sampled, never tokenised anew.

    Args:
        engine: of the policy that continues (a prover, where it is another than the solver).
        sampling: ``max_tokens`` counts the whole response, prefix included, so that a continuation ends where the
            solution itself would have been cut off. Its seed is replaced.
        step_stop: strings that end a step for :meth:`steps`.
        step_tokens: most tokens of one step; a longer one is kept as it stands.

    Attributes:
        tokens: tokens generated so far; what a comparison at equal cost counts.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling | None = None,
        *,
        step_stop: Sequence[str] = ("\n",),
        step_tokens: int | None = None,
    ) -> None:
        if not engine.trainable:
            raise ConfigError("going on from a prefix needs an engine that takes token ids (engine.trainable)")
        self.engine = engine
        self.sampling = sampling or Sampling(max_tokens=256)
        if self.sampling.stop:
            raise ConfigError("sampling.stop would end whole solutions early; give step_stop for steps")
        self.step_stop = tuple(step_stop)
        self.step_tokens = step_tokens
        self.tokens = 0

    def __call__(
        self, prefixes: Sequence[Prefix], counts: Sequence[int], seeds: Sequence[int]
    ) -> list[list[Trajectory]]:
        """Whole solutions: ``counts[i]`` trajectories that begin with ``prefixes[i]``.

        Each draws with a seed made of ``seeds[i]`` and its number alone, whatever else is in the call. An ended prefix
        (or one that has used up ``max_tokens``) gives itself.
        """
        made = self._run(prefixes, counts, seeds, self.sampling)
        return [[p.trajectory(usage) for p, usage in row] for row in made]

    def steps(self, prefixes: Sequence[Prefix], counts: Sequence[int], seeds: Sequence[int]) -> list[list[Prefix]]:
        """One more step each: ``counts[i]`` prefixes that extend ``prefixes[i]`` to the end of its next step."""
        sampling = replace(self.sampling, stop=self.step_stop)
        return [[p for p, _ in row] for row in self._run(prefixes, counts, seeds, sampling, self.step_tokens)]

    def root(self, task: Task) -> Prefix:
        """The empty prefix of a task, rendered as the engine's policy does."""
        return Prefix.root(self.engine.policy, task)  # type: ignore[attr-defined]

    def _run(
        self,
        prefixes: Sequence[Prefix],
        counts: Sequence[int],
        seeds: Sequence[int],
        sampling: Sampling,
        most: int | None = None,
    ) -> list[list[tuple[Prefix, Usage]]]:
        if not len(prefixes) == len(counts) == len(seeds):
            raise DataError(f"{len(prefixes)} prefixes, {len(counts)} counts and {len(seeds)} seeds; give one of each")
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self._all(prefixes, counts, seeds, sampling, most))
        raise ConfigError("prefixes are continued from plain code, not from inside a running event loop")

    async def _all(
        self,
        prefixes: Sequence[Prefix],
        counts: Sequence[int],
        seeds: Sequence[int],
        sampling: Sampling,
        most: int | None,
    ) -> list[list[tuple[Prefix, Usage]]]:
        call = object()
        rows = []
        for i, (prefix, count, seed) in enumerate(zip(prefixes, counts, seeds, strict=True)):
            room = min(sampling.max_tokens, self.engine.max_context - len(prefix.prompt_ids)) - len(prefix)
            if most is not None:
                room = min(room, most)
            if prefix.ended or room < 1:
                rows.append([_itself(prefix) for _ in range(count)])
                continue
            here = replace(sampling, max_tokens=room)
            rows.append([self._one(prefix, here, derive_seed(seed, k), (call, i)) for k in range(count)])
        done = await asyncio.gather(*(asyncio.gather(*row) for row in rows))
        return [list(row) for row in done]

    async def _one(self, prefix: Prefix, sampling: Sampling, seed: int, group: Any) -> tuple[Prefix, Usage]:
        stream = self.engine.start(prefix.task.prompt, (*prefix.prompt_ids, *prefix.ids), group=group)
        try:
            completion = await stream.generate(replace(sampling, seed=seed))
        finally:
            stream.close()
        self.tokens += len(completion.token_ids)
        return prefix.extended(completion), completion.usage


async def _itself(prefix: Prefix) -> tuple[Prefix, Usage]:
    return prefix, Usage()
