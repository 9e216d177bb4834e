"""A language model as a judge: a template in, a parsed verdict out; batched, cached, retried, every failure counted.

:class:`Judge` is for any template and any verdict (a score, a preference, a list of criteria).
:class:`JudgeRewardModel` makes a reward of a judge that says one number about a question and a response. How a prompt
becomes a reply is a function: of a list of prompts or of one, blocking or a coroutine; :func:`engine_generate` makes one
of a sampling engine, in this process or over HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from guerdon.errors import BudgetExceeded, ConfigError, MissingDependency, RewardError
from guerdon.rewards.awaiting import wait
from guerdon.rewards.base import OnError, Reward
from guerdon.rewards.grammar import blocks
from guerdon.types import Score, Trajectory, policy_text

__all__ = [
    "THINKING_RUBRIC",
    "Judge",
    "JudgeRewardModel",
    "Verdict",
    "engine_generate",
    "fill",
    "parse_unit_score",
    "reasoning_of",
]

THINKING_RUBRIC = """You grade how somebody reasoned about a question. Grade the reasoning alone: whether its conclusion is \
the expected answer is checked elsewhere.

Look at five things:
1. Logic: does each step follow from what stands before it?
2. Correctness: are the facts, the calculations and the methods right?
3. Mistakes: are mistakes noticed and mended, or carried on?
4. Language: is it one language, clear and consistent?
5. Economy: is it free of repetition and of steps that lead nowhere?

Be strict: reasoning that hides a serious fault gets a low score however well it reads.

Question:
{question}

Reasoning:
{response}

Reply with a score from 0.0 (worthless) to 1.0 (flawless) in steps of 0.1 and nothing else, as <answer>score</answer>."""
"""The criteria of the paper's thinking reward, in words of our own."""

_BOXED = re.compile(r"\\boxed\s*\{\s*([01](?:\.\d+)?)\s*\}")
_TAGGED = re.compile(r"<answer>\s*(-?\d{1,9}(?:\.\d{1,30})?|\.\d{1,30})\s*</answer>", re.IGNORECASE)
_ALONE = re.compile(r"(?<![\w.,/-])[01](?:\.\d+)?(?![\w%/]|[.,]\d)")
_POINT = re.compile(r"(?<![\w.])\.\d+")

_FATAL = (ConfigError, MissingDependency, BudgetExceeded)


def parse_unit_score(text: str, *, strict: bool = False) -> float | None:
    """The score in a judge's reply, in [0, 1], or None where there is none.

    Read in this order: a boxed 0 or 1 with decimals; a number in an ``<answer>`` tag; the first free-standing 0 or 1
    with decimals; the first ``.d``. What lies outside [0, 1] is clipped.

    Args:
        text: the reply; "3/10", "80%" and "10" are no free-standing scores.
        strict: read the first two forms only.

    Source: the order of the released code of Fan et al. 2025 (arXiv 2505.17018), which gives 0 where it finds nothing.
    """
    for pattern in (_BOXED, _TAGGED) if strict else (_BOXED, _TAGGED, _ALONE, _POINT):
        match = pattern.search(text)
        if match is not None:
            return min(1.0, max(0.0, float(match.group(match.lastindex or 0))))
    return None


def reasoning_of(text: str) -> str:
    """What a judge of the reasoning reads: the ``<think>`` blocks, or else everything but the ``<answer>`` blocks."""
    thoughts = [b.content for b in blocks(text, ["think"])]
    if thoughts:
        return "\n".join(thoughts).strip()
    for block in reversed(blocks(text, ["answer"])):
        text = text[: block.start] + text[block.stop :]
    return text.strip()


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Put fields into ``{name}`` places in one pass: braces inside a field, and all other braces, stay as they are."""
    pattern = "|".join(re.escape(name) for name in fields)
    return re.sub(rf"\{{({pattern})\}}", lambda m: fields[m.group(1)], template) if fields else template


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge said about one item.

    Args:
        value: what the parser made of the reply; None where there is no verdict.
        reply: the judge's words, or None.
        error: why there is no verdict.
        cached: the judge was not asked again.
    """

    value: Any
    reply: str | None = None
    error: str | None = None
    cached: bool = False


class Judge:
    """Asks a language model about items, and parses what it says.

    Args:
        generate: prompts to replies. With ``batched`` it gets a list and returns as many replies (where it returns a
            single string for a list, it is taken as one for single prompts from then on); without, it gets one prompt.
            It may be a coroutine function: then up to ``concurrency`` calls run at once. A plain function is called
            from one thread, one call after the other.
        template: text with ``{name}`` places, see :func:`fill`.
        parse: a reply to a verdict; None means unreadable.
        batched: see ``generate``.
        batch_size: prompts per call.
        concurrency: calls at once.
        retries: further attempts after a call failed (raised, timed out, returned another number of replies).
            Unreadable replies are not asked for again: at temperature 0 they would come again.
        wait: seconds before the first further attempt, twice that before the second, and so on.
        timeout: seconds that one call may take.
        cache: how many verdicts are remembered, by prompt; equal prompts of one batch are asked once in any case. 0
            for a judge that samples.

    Attributes:
        counts: ``asked``, ``cached``, ``calls``, ``retries``.
        failures: items without a verdict by reason: ``unreadable``, ``exception``, ``timeout``, ``replies``.
    """

    def __init__(
        self,
        generate: Callable[..., Any],
        template: str,
        parse: Callable[[str], Any],
        *,
        batched: bool = True,
        batch_size: int = 64,
        concurrency: int = 16,
        retries: int = 10,
        wait: float = 0.1,
        timeout: float | None = None,
        cache: int = 100_000,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("concurrency", concurrency, 1),
                                   ("retries", retries, 0), ("wait", wait, 0), ("cache", cache, 0)):  # fmt: skip
            if not value >= least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if timeout is not None and not timeout > 0:
            raise ConfigError(f"timeout must be a positive number of seconds, got {timeout}")
        for what, function in (("generate", generate), ("parse", parse)):
            if not callable(function):
                raise ConfigError(f"{what} must be a function, got {type(function).__name__}")
        self.template = template
        self._generate, self._parse = generate, parse
        self._coroutine = inspect.iscoroutinefunction(generate) or inspect.iscoroutinefunction(
            getattr(generate, "__call__", None)  # noqa: B004  an object whose __call__ is one
        )
        self._batched, self._batch_size, self._concurrency = batched, batch_size, concurrency
        self._retries, self._wait, self._timeout = retries, wait, timeout
        self._size = cache
        self._cache: OrderedDict[bytes, tuple[Any, str]] = OrderedDict()
        self.counts: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()

    def __call__(self, items: Sequence[Mapping[str, str]]) -> list[Verdict]:
        """Ask about items, each a mapping from the template's names to texts; in order.

        Inside a coroutine, await :meth:`ask` instead.

        Raises:
            ConfigError: an item lacks a name that the template has.
        """
        return wait(partial(self.ask, items))

    async def ask(self, items: Sequence[Mapping[str, str]]) -> list[Verdict]:
        """See :meth:`__call__`."""
        prompts = [self._prompt(item) for item in items]
        keys = [hashlib.blake2b(p.encode("utf-8", "surrogatepass"), digest_size=16).digest() for p in prompts]
        self.counts["asked"] += len(prompts)
        found: dict[bytes, Verdict] = {}
        waiting: dict[bytes, str] = {}
        for key, prompt in zip(keys, prompts, strict=True):
            if key in self._cache:
                self._cache.move_to_end(key)
                value, reply = self._cache[key]
                found[key] = Verdict(value, reply, cached=True)
                self.counts["cached"] += 1
            else:
                waiting[key] = prompt
        gate = asyncio.Semaphore(self._concurrency if self._coroutine else 1)
        texts = list(waiting.values())
        size = self._batch_size if self._batched else 1
        parts = [texts[k : k + size] for k in range(0, len(texts), size)]
        answered = await asyncio.gather(*(self._some(part, gate) for part in parts))
        for key, verdict in zip(waiting, (v for part in answered for v in part), strict=True):
            found[key] = verdict
            if verdict.error is None and self._size:
                self._cache[key] = (verdict.value, verdict.reply or "")
                while len(self._cache) > self._size:
                    self._cache.popitem(last=False)
        return [found[key] for key in keys]

    def _prompt(self, item: Mapping[str, str]) -> str:
        prompt = fill(self.template, item)
        lacking = [name for name in re.findall(r"\{([a-z_]+)\}", self.template) if name not in item]
        if lacking:
            raise ConfigError(f"the template asks for {lacking[0]!r}; the item has {', '.join(item) or 'nothing'}")
        return prompt

    async def _some(self, prompts: list[str], gate: asyncio.Semaphore) -> list[Verdict]:
        """Verdicts on one call's prompts."""
        replies: list[Any] = []
        reason, text = "", ""
        for attempt in range(self._retries + 1):
            if attempt:
                self.counts["retries"] += 1
                await asyncio.sleep(self._wait * attempt)
            try:
                async with gate:
                    replies = await asyncio.wait_for(self._replies(prompts), self._timeout)
                break
            except _FATAL:
                raise
            except TimeoutError:
                reason, text = "timeout", "the judge timed out"
            except Exception as error:  # noqa: BLE001  a server may fail in any way; it is counted and named
                reason = "replies" if isinstance(error, _Miscounted) else "exception"
                text = f"the judge failed: {type(error).__name__}: {error}"
        else:
            self.failures[reason] += len(prompts)
            return [Verdict(None, error=text) for _ in prompts]
        return [self._read(reply) for reply in replies]

    async def _replies(self, prompts: list[str]) -> list[Any]:
        if self._batched:
            raw = await self._call(prompts)
            if not isinstance(raw, str):
                replies = list(raw)
                if len(replies) != len(prompts):
                    raise _Miscounted(f"{len(replies)} replies to {len(prompts)} prompts")
                return replies
            self._batched = False
        return [await self._call(prompt) for prompt in prompts]

    async def _call(self, argument: Any) -> Any:
        self.counts["calls"] += 1
        if self._coroutine:
            return await self._generate(argument)
        made = await asyncio.to_thread(self._generate, argument)
        return await made if inspect.isawaitable(made) else made

    def _read(self, reply: Any) -> Verdict:
        value = self._parse(reply) if isinstance(reply, str) else None
        if value is None:
            self.failures["unreadable"] += 1
            shown = repr(reply if not isinstance(reply, str) or len(reply) <= 80 else reply[:77] + "...")
            return Verdict(None, reply if isinstance(reply, str) else None, f"unreadable reply {shown}")
        return Verdict(value, reply)


class _Miscounted(RewardError):
    """Another number of replies than of prompts."""


class JudgeRewardModel(Reward):
    """A judge's score of a question and a response as a reward in [0, 1].

    Args:
        generate_fn: see :class:`Judge`; use temperature 0.
        template: with places ``{question}`` and ``{response}``.
        parser: a reply to a score, or None.
        read: what of a response the judge sees. The default is :func:`reasoning_of`, for a judge of reasoning: shown the
            answer too, it would grade that. Where nothing is left to read the score is 0 and nobody is asked.
        missing: what a failed judgement is worth to ``model(questions, responses)``; 0 as published, counted.
        options: further arguments of :class:`Judge`.

    ``model(questions, responses)`` gives ``[B]`` float64. On trajectories a failed judgement is an invalid score, with
    which ``on_error`` deals. :attr:`judge` counts calls and failures.
    """

    range = (0.0, 1.0)
    gives = frozenset({"outcome"})

    def __init__(
        self,
        generate_fn: Callable[..., Any],
        template: str = THINKING_RUBRIC,
        parser: Callable[[str], float | None] = parse_unit_score,
        *,
        read: Callable[[str], str] = reasoning_of,
        missing: float = 0.0,
        name: str | None = None,
        on_error: OnError = "raise",
        **options: Any,
    ) -> None:
        super().__init__(name=name or "judge", on_error=on_error)
        if "{response}" not in template:
            raise ConfigError("the template must have a place {response} (and usually {question})")
        self.judge = Judge(generate_fn, template, parser, **options)
        self._read, self.missing = read, missing

    def __call__(self, trajectories: Sequence[Any], responses: Sequence[str] | None = None, **options: Any) -> Any:
        """Scores of trajectories; or, as ``model(questions, responses)``, ``[B]`` float64."""
        if responses is None:
            return super().__call__(trajectories, **options)
        if len(trajectories) != len(responses):
            raise ValueError(f"{len(responses)} responses to {len(trajectories)} questions")
        verdicts = wait(partial(self._verdicts, list(trajectories), list(responses)))
        return np.array([self.missing if v.error else v.value for v in verdicts], dtype=np.float64)

    async def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Judge a batch at once."""
        verdicts = await self._verdicts([t.task.question for t in trajectories], [policy_text(t) for t in trajectories])
        return [
            Score.invalid(f"judge {self.name!r} has no verdict on task {t.task.id!r}: {v.error}")
            if v.error
            else Score(float(v.value))
            for t, v in zip(trajectories, verdicts, strict=True)
        ]

    async def _verdicts(self, questions: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        texts = [self._read(response) for response in responses]
        items = [{"question": q, "response": t} for q, t in zip(questions, texts, strict=True) if t.strip()]
        asked = iter(await self.judge.ask(items))
        return [next(asked) if text.strip() else Verdict(0.0) for text in texts]


def engine_generate(
    engine: Any, *, system: str | None = None, max_tokens: int = 64, temperature: float = 0.0
) -> Callable[[str], Any]:
    """A coroutine function from one prompt to one reply; give it with ``batched=False``.

    Args:
        engine: of :mod:`guerdon.rollout`: a policy in this process, or an OpenAI-compatible endpoint.
        system: system message.
        max_tokens, temperature: of the reply.
    """
    from guerdon.rollout import Sampling

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
    head = () if system is None else ({"role": "system", "content": system},)

    async def generate(prompt: str) -> str:
        messages = (*head, {"role": "user", "content": prompt})
        policy = getattr(engine, "policy", None)
        stream = engine.start(messages, policy.render(messages) if policy is not None else ())
        try:
            return str((await stream.generate(sampling)).text)
        finally:
            stream.close()

    return generate
