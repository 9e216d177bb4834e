"""What a thought is worth if it had to end here: the success of answers that are forced from its prefix.

The prover is the same language model, made to stop thinking and to answer at once. It must not think on: then its
success would be the prefix's value for the policy, not what is known by now.

Source: Qu et al. 2025, "Optimizing Test-Time Compute via Meta Reinforcement Fine-Tuning" (arXiv 2503.07572).
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from guerdon.credit.regret import progress_bonus
from guerdon.environments.continued import Cut
from guerdon.errors import ConfigError, DataError
from guerdon.rollout.loop import derive_seed
from guerdon.rollout.protocol import Completion, Engine, Sampling
from guerdon.search.prefix_values import Estimate, PrefixValues
from guerdon.types import Task

__all__ = ["CLOSE_SUFFIX", "FORCE_SUFFIX", "AnswerSampler", "MetaProver"]

FORCE_SUFFIX = (
    "\n\nMy time is up. The final answer has to be formed from what I have worked out so far.\n</think>\n\n"
    "**Explanation of the final answer**\n"
)
"""Ends a thought in the middle and begins the answer."""

CLOSE_SUFFIX = "\n</think>\n\n"
"""Ends a thought that was complete."""


@dataclass(frozen=True)
class _Context:
    """What an answer is sampled behind; equal contexts are one prefix."""

    key: Hashable
    text: Any
    prompt: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Context) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:  # seeds are derived from it
        return repr(self.key)


class MetaProver:
    """Monte Carlo success probability of forced answers.

    A prompt is text, token ids, or a :class:`~guerdon.types.Task`; a prefix (the thought so far) is text, token ids, or
    a :class:`~guerdon.environments.continued.Cut`. Text with text makes a text that answers are sampled behind;
    everything else makes token ids, for which ``policy`` renders and encodes.

    Args:
        sampler: ``(context, n)`` returning ``n`` answers, ``(context)`` returning one, or ``(contexts, counts, seeds)``
            returning a list for each context, such as :class:`AnswerSampler`. It must keep an answer from thinking on,
            by stop strings and a token limit.
        verify: ``(answer)`` or ``(prompt, answer)``: whether the answer is right (a bool or a share in [0, 1]). None,
            for an answer that cannot be parsed, counts as wrong.
        force_suffix: put behind an unfinished prefix.
        k: answers per prefix, the same for both ends of a difference; the variance is ``J (1 - J) / k`` each, so at
            least 4.
        close_suffix: put behind a prefix that is complete.
        empty: what stands for the empty thought before the suffix, where the model opens its thought itself.
        policy: has ``render`` and ``encode``; needed for token ids.
        common_random_numbers: the i-th answer of every prefix draws from the same stream (batched samplers), which
            makes differences steadier.
        budget, seed, on_error: see :class:`~guerdon.search.PrefixValues`.
        length: tokens of an answer, for the tokens axis of a regret; default: its token ids, or its words.

    Estimates are cached until :meth:`reset`, which belongs behind every change of the model's weights.

    Raises:
        ConfigError: k below 1, an empty suffix.
    """

    def __init__(
        self,
        sampler: Callable[..., Any],
        verify: Callable[..., Any],
        force_suffix: str = FORCE_SUFFIX,
        k: int = 8,
        *,
        close_suffix: str = CLOSE_SUFFIX,
        empty: str = "",
        policy: Any = None,
        common_random_numbers: bool = False,
        budget: int | None = None,
        seed: int = 0,
        on_error: Literal["raise", "wrong"] = "raise",
        length: Callable[[Any], int] | None = None,
    ) -> None:
        if k < 1:
            raise ConfigError(f"k must be at least 1 forced answer, got {k}")
        if not force_suffix:
            raise ConfigError("force_suffix is empty; without it the model would think on instead of answering")
        self.sampler, self.verify, self.k = sampler, verify, k
        self.force_suffix, self.close_suffix, self.empty = force_suffix, close_suffix, empty
        self.policy, self.common_random_numbers = policy, common_random_numbers
        self._options: dict[str, Any] = {"budget": budget, "on_error": on_error}
        self._seed, self._resets = seed, 0
        self._length = length or _length
        self._values = self._fresh()

    @property
    def rollouts(self) -> int:
        """Answers sampled since the last reset."""
        return self._values.rollouts

    def reset(self) -> None:
        """Forget all estimates: the model has changed. Later answers draw from other streams."""
        self._resets += 1
        self._values = self._fresh()

    def value(self, prompt: Any, prefix: Any = "", *, complete: bool = False) -> float:
        """Success probability of an answer forced behind ``prefix``; NaN where the budget is spent.

        Args:
            prompt, prefix: see the class.
            complete: the thought ended by itself, so that its tag is only closed (a Cut says so itself).
        """
        return self.estimate([(prompt, prefix)], complete=[complete])[0].value

    def values(self, pairs: Sequence[tuple[Any, Any]], *, complete: Sequence[bool] | None = None) -> Tensor:
        """``[P]`` float64 success probabilities, all sampled in one call."""
        return torch.tensor([e.value for e in self.estimate(pairs, complete=complete)], dtype=torch.float64)

    def estimate(self, pairs: Sequence[tuple[Any, Any]], *, complete: Sequence[bool] | None = None) -> list[Estimate]:
        """The same with counts and answers kept (``Estimate.samples``)."""
        flags = [False] * len(pairs) if complete is None else list(complete)
        if len(flags) != len(pairs):
            raise DataError(f"{len(flags)} flags for {len(pairs)} prefixes; give one for each")
        contexts = [self._context(prompt, prefix, c) for (prompt, prefix), c in zip(pairs, flags, strict=True)]
        return self._values.estimate(contexts)

    def progress(self, prompt: Any, prefixes: Sequence[Any], *, complete: bool = False) -> Tensor:
        """Progress of each episode, ``[k]``, of a trace whose prefixes (the empty one first) are given.

        Args:
            prompt: of all of them.
            prefixes: ``k + 1`` growing prefixes.
            complete: the last one ended by itself.
        """
        flags = [False] * (len(prefixes) - 1) + [complete] * bool(prefixes)
        return progress_bonus(self.values([(prompt, p) for p in prefixes], complete=flags))

    def answer_tokens(self, prompt: Any, prefix: Any = "", *, complete: bool = False) -> float:
        """Mean number of tokens of the forced answers of a prefix."""
        samples = self.estimate([(prompt, prefix)], complete=[complete])[0].samples
        if not samples:
            raise DataError("no answer of this prefix was sampled: the budget is spent")
        return sum(self._length(s) for s in samples) / len(samples)

    def _fresh(self) -> PrefixValues:
        seed = derive_seed(self._seed, self._resets)
        sampler = self._batch if _positional(self.sampler) >= 3 else self._single
        return PrefixValues(sampler, self._judge, n=self.k, keep_samples=True, seed=seed, **self._options)

    def _single(self, context: _Context, n: int) -> Any:
        if _accepts_count(self.sampler):
            return self.sampler(context.text, n)
        return [self.sampler(context.text) for _ in range(n)]

    def _batch(self, contexts: Sequence[_Context], counts: Sequence[int], seeds: Sequence[int]) -> Any:
        if self.common_random_numbers:
            seeds = [derive_seed(self._seed, self._resets)] * len(seeds)
        return self.sampler([c.text for c in contexts], counts, seeds)

    def _judge(self, context: _Context, answer: Any) -> Any:
        verdict = self.verify(context.prompt, answer) if _positional(self.verify) >= 2 else self.verify(answer)
        return 0.0 if verdict is None else verdict

    def _context(self, prompt: Any, prefix: Any, complete: bool) -> _Context:
        suffix = self.close_suffix if complete else self.force_suffix
        said: Any = prefix
        if isinstance(prefix, Cut):
            suffix = "" if prefix.forced else self.close_suffix if prefix.complete else self.force_suffix
            said = prefix.ids if prefix.ids or not isinstance(prompt, str) else prefix.text
        if isinstance(prompt, str) and isinstance(said, str):
            text = prompt + (said or self.empty) + suffix
            return _Context((prompt, text), text, prompt)
        if self.policy is None:
            raise ConfigError("token ids or tasks need policy=, whose tokenizer the suffix is encoded with")
        given = prompt.prompt if isinstance(prompt, Task) else prompt
        if isinstance(given, str):
            given = self.policy.encode(given)
        elif isinstance(prompt, Task):
            given = self.policy.render(given)
        said = self.policy.encode(said) if isinstance(said, str) else list(said)
        if not said and self.empty:
            said = self.policy.encode(self.empty)
        ids = (*given, *said, *(self.policy.encode(suffix) if suffix else ()))
        name = prompt.id if isinstance(prompt, Task) else ""
        return _Context((name, ids), ids, prompt)


class AnswerSampler:
    """Samples short answers behind contexts of token ids on an engine, all at once.

    Args:
        engine: of the policy; must take token ids.
        sampling: of answers. The paper has temperature 0.7 and top-p 0.95; ``max_tokens`` keeps an answer short, and
            ``stop`` (for example ``("<think>",)``) keeps it from thinking on. Its seed is replaced.

    Attributes:
        tokens: sampled so far.
    """

    def __init__(self, engine: Engine, sampling: Sampling | None = None) -> None:
        if not engine.trainable:
            raise ConfigError("forced answers need an engine that takes token ids (engine.trainable)")
        self.engine = engine
        self.sampling = sampling or Sampling(max_tokens=256, temperature=0.7, top_p=0.95, stop=("<think>",))
        self.tokens = 0

    def __call__(
        self, contexts: Sequence[Sequence[int]], counts: Sequence[int], seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """``counts[i]`` completions behind ``contexts[i]``; the j-th draws from ``seeds[i]`` and j alone."""
        made = asyncio.run(self._all(contexts, counts, seeds))
        self.tokens += sum(len(c.token_ids) for row in made for c in row)
        return made

    async def _all(
        self, contexts: Sequence[Sequence[int]], counts: Sequence[int], seeds: Sequence[int]
    ) -> list[list[Completion]]:
        call = object()
        rows = [
            [self._one(tuple(ids), derive_seed(seed, j), (call, i)) for j in range(count)]
            for i, (ids, count, seed) in enumerate(zip(contexts, counts, seeds, strict=True))
        ]
        done = await asyncio.gather(*(asyncio.gather(*row) for row in rows))
        return [list(row) for row in done]

    async def _one(self, ids: tuple[int, ...], seed: int, group: Hashable) -> Completion:
        stream = self.engine.start((), ids, group=group)
        try:
            return await stream.generate(replace(self.sampling, seed=seed))
        finally:
            stream.close()


def _length(answer: Any) -> int:
    ids = getattr(answer, "token_ids", None)
    return len(ids) if ids is not None else len(str(getattr(answer, "text", answer)).split())


def _positional(function: Callable[..., Any]) -> int:
    """Number of positional arguments without default that a callable wants."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters)


def _accepts_count(function: Callable[..., Any]) -> bool:
    """Whether a callable takes a second positional argument."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return True
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind is p.VAR_POSITIONAL for p in parameters) or sum(p.kind in kinds for p in parameters) >= 2
