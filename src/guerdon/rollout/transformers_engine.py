"""Sampling in this process from a Hugging Face causal language model, many streams at once.

One worker thread computes; the event loop stays free, so tool and pool calls progress while tokens are sampled.
Streams that wait for their environment keep their keys and values and take no part in decoding.

How a batch is composed is reproducible as far as it can be: before the worker goes on, the event loop gets a few
turns to run what the last results have set in motion. Environments that do not really wait (no network, no timer)
therefore give the same batches, and the same floating-point results, in every run. With ``lockstep=True`` that holds
for all environments, at the price of waiting for the slowest of each round.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from guerdon.errors import ConfigError, EngineError
from guerdon.rollout.batch import Batch, Context, Job, Prefix, Stats
from guerdon.rollout.protocol import Completion, Sampling
from guerdon.rollout.sampler import Uniforms
from guerdon.rollout.text import TokenText
from guerdon.types import Message, StopReason, Usage

__all__ = ["TransformersEngine", "TransformersStream"]

# Turns of the event loop that a result gets to become the next request (tasks, futures and gathers in between).
_SETTLE_TURNS = 16
# Seconds after which the worker looks again whether a loop that it waits for still runs.
_POLL = 0.05


class TransformersEngine:
    """Engine over a policy in this process; see :class:`guerdon.rollout.protocol.Engine`.

    Args:
        policy: what is sampled from: ``model``, ``tokenizer``, ``decode`` and ``max_context`` are used.
        max_slots: most streams whose keys and values are kept at once; further streams wait for a free slot.
        seed: of streams whose :class:`Sampling` has no seed of its own.
        max_context: most tokens of prompt and response together; default the policy's.
        prefill_tokens: most tokens of one prefill pass; smaller values delay running streams less.
        attention: ``"shared"`` reads the prompt of a group once for all its rows; ``"model"`` uses the model's own
            attention function on a copy for each row (which models with sliding windows get anyway).
        lockstep: start a round only when every open stream wants to sample, and deliver its completions together.

    Weights may change between completions. What was computed with the old ones is dropped by :meth:`reset`, or by
    itself when the change is seen (in-place updates by an optimiser are).

    Raises:
        ConfigError: a setting is out of range, or the model's attention cannot be cached here.
    """

    trainable = True

    def __init__(
        self,
        policy: Any,
        *,
        max_slots: int = 256,
        seed: int = 0,
        max_context: int | None = None,
        prefill_tokens: int = 4096,
        lockstep: bool = False,
        attention: Literal["shared", "model"] = "shared",
    ) -> None:
        if max_slots < 1:
            raise ConfigError(f"max_slots must be at least 1, got {max_slots}")
        if prefill_tokens < 1:
            raise ConfigError(f"prefill_tokens must be at least 1, got {prefill_tokens}")
        if attention not in ("shared", "model"):
            raise ConfigError(f"attention must be 'shared' or 'model', got {attention!r}")
        self.policy = policy
        self.tokenizer = policy.tokenizer
        self.max_context = min(policy.max_context, max_context or policy.max_context)
        self.lockstep = lockstep
        model = policy.model
        vocabulary = model.get_output_embeddings().weight.shape[0]
        self._batch = Batch(
            model,
            TokenText(self.tokenizer, policy.decode, vocabulary),
            eos_ids(model, self.tokenizer),
            max_slots=max_slots,
            max_context=self.max_context,
            prefill_tokens=prefill_tokens,
            own_attention=attention == "model",
        )
        self._weights = list(model.parameters())
        self._version = self._weights_version()
        self._seeds = np.random.default_rng(seed)
        self._guard = torch.no_grad if _recomputes_rope(model) else torch.inference_mode
        self._lock = threading.Condition()
        self._inbox: list[tuple[str, Any]] = []
        self._gates: dict[asyncio.AbstractEventLoop, _Gate] = {}
        self._prefixes: dict[Hashable, Prefix] = {}
        self._open = 0
        self._in_flight = 0
        self._thread: threading.Thread | None = None
        self._closed = False
        self._dead: BaseException | None = None

    @property
    def stats(self) -> Stats:
        """Counts of what was computed since the engine was made."""
        return self._batch.stats

    @property
    def cache_bytes(self) -> int:
        """Bytes reserved for keys and values."""
        return self._batch.cache.own.nbytes + self._batch.cache.shared.nbytes

    def start(
        self, messages: Sequence[Message], prompt_ids: Sequence[int], *, group: Hashable = None
    ) -> TransformersStream:
        """Open a stream on a rendered prompt.

        Raises:
            EngineError: the prompt is empty or leaves no room for a token, or the engine is closed.
        """
        self._check_alive()
        ids = [int(i) for i in prompt_ids]
        if not ids:
            raise EngineError("prompt_ids is empty; a stream needs at least one token")
        if len(ids) >= self.max_context:
            raise EngineError(
                f"the prompt has {len(ids)} tokens and max_context is {self.max_context}; "
                "shorten the prompt or use a policy with a longer context"
            )
        prefix = None
        with self._lock:
            if group is not None and len(ids) > 1:
                key = (group, tuple(ids))
                prefix = self._prefixes.setdefault(key, Prefix(key, ids[:-1]))
                prefix.users += 1
            self._open += 1
            seed = int(self._seeds.integers(1 << 63))
        return TransformersStream(self, Context(ids, prefix), seed)

    def reset(self) -> None:
        """Drop all keys and values, as is due after a change of the weights; open streams are computed anew.

        Raises:
            EngineError: completions are being sampled.
        """
        self._check_alive()
        done = threading.Event()
        with self._lock:
            if self._in_flight:
                raise EngineError(f"reset() while {self._in_flight} completions are being sampled; await them first")
            if self._thread is None:
                self._batch.forget()
                return
            self._post("reset", done)
        done.wait()

    async def aclose(self) -> None:
        """End the worker and free the cache; completions in flight fail with EngineError. Idempotent."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            await asyncio.to_thread(self._thread.join)
        self._batch.cache.release()

    # -- event loop side -----------------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineError(f"the engine's worker has died ({self._dead!r}); make a new engine") from self._dead
        if self._closed:
            raise EngineError("the engine is closed; make a new one")

    def _post(self, kind: str, what: Any) -> None:
        """Hand something to the worker; the lock is held."""
        self._inbox.append((kind, what))
        self._lock.notify_all()

    def _submit(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            self._in_flight += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="guerdon-sampling", daemon=True)
                self._thread.start()
            gate = self._gates.get(loop)
            if gate is None:
                self._gates = {k: g for k, g in self._gates.items() if not k.is_closed()}
                gate = self._gates[loop] = _Gate(loop)
        gate.staged.append(job)
        self._settle(gate)

    def _settle(self, gate: _Gate, turns: int = _SETTLE_TURNS) -> None:
        """Pass the requests of the event loop's present burst to the worker together, once the burst is over."""
        if gate.settling:
            gate.again = True
            return
        gate.settling = True
        gate.loop.call_soon(self._turn, gate, turns)

    def _turn(self, gate: _Gate, turns: int) -> None:
        if gate.again:
            gate.again, turns = False, _SETTLE_TURNS
        if turns > 0:
            gate.loop.call_soon(self._turn, gate, turns - 1)
            return
        with self._lock:
            gate.settling = False
            if self.lockstep and self._in_flight < self._open:
                return
            for job in gate.staged:
                self._post("job", job)
            gate.staged.clear()
            self._lock.notify_all()

    def _release(self, context: Context) -> None:
        prefix = context.prefix
        with self._lock:
            self._open -= 1
            unused = False
            if prefix is not None:
                prefix.users -= 1
                unused = prefix.users == 0
            if unused and prefix is not None:
                del self._prefixes[prefix.key]
            if self._closed or self._dead is not None or self._thread is None:
                return
            self._post("close", context)
            if unused:
                self._post("drop", prefix)
            if self._open == 0:
                self._post("rest", None)
            waiting = [gate for gate in self._gates.values() if gate.staged and not gate.loop.is_closed()]
        if self.lockstep:
            for gate in waiting:
                gate.loop.call_soon_threadsafe(self._settle, gate)

    def _deliver(self, gate: _Gate, jobs: list[tuple[Job, Completion | EngineError]]) -> None:
        for job, result in jobs:
            future = job.future
            if future.done():
                continue
            if isinstance(result, EngineError):
                future.set_exception(result)
            else:
                future.set_result(result)
        self._settle(gate)
        with self._lock:
            gate.pending -= 1

    # -- worker side ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            with self._guard():
                while self._wait():
                    self._take()
                    # Closed streams come in while a trainer may be using the model: it is borrowed only to sample.
                    if self._batch.busy:
                        with self._batch.running():
                            self._run()
                    self._hand_over()
        except BaseException as error:  # noqa: BLE001 - whatever ended the thread must reach those who wait on it
            self._dead = error
        finally:
            cause = self._dead
            reason = "the engine was closed" if cause is None else f"the engine's worker died: {cause!r}"
            failure = EngineError(reason)
            failure.__cause__ = cause
            with self._lock:
                jobs = [what for kind, what in self._inbox if kind == "job"]
                for kind, what in self._inbox:
                    if kind == "reset":
                        what.set()
                self._inbox.clear()
            for job in [*jobs, *self._batch.fail(failure)]:
                job.error = failure
                self._batch.finished.append(job)
            self._hand_over()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when the engine is closed."""
        with self._lock:
            while not self._closed:
                # Only a loop that runs can settle; one that stopped in the middle of it must not hold up the others.
                unsettled = any(g.loop.is_running() for g in self._gates.values() if g.settling or g.pending)
                # A reset blocks the loop that asks for it, so it cannot wait for that loop.
                if any(kind == "reset" for kind, _ in self._inbox):
                    break
                if not unsettled and (self._inbox or self._batch.busy):
                    break
                self._lock.wait(_POLL if unsettled else None)
            return not self._closed

    def _take(self) -> None:
        """Carry out what the event loops have asked for."""
        with self._lock:
            inbox, self._inbox = self._inbox, []
        for kind, what in inbox:
            if kind == "job":
                if what.context.closed:
                    what.stop = StopReason.ABORTED
                    self._batch.finished.append(what)
                else:
                    self._batch.submit(what)
            elif kind == "close":
                job = what.job
                self._batch.close(what)
                if job is not None:
                    self._batch.finished.append(job)
            elif kind == "drop":
                self._batch.drop(what)
            elif kind == "rest":
                self._batch.rest()
            else:
                self._batch.forget()
                what.set()

    def _run(self) -> None:
        """Compute until a completion is finished or the event loops want something."""
        self._take()
        if self._batch.busy and not self._batch.active and (version := self._weights_version()) != self._version:
            self._version = version
            self._batch.forget()
        try:
            while self._batch.busy and not self._closed and (self.lockstep or not self._batch.finished):
                self._batch.step()
                if self._inbox:
                    self._take()
        except Exception as error:  # noqa: BLE001 - a model is a stranger's code; all who wait get its error
            failure = EngineError(f"sampling failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._batch.finished += self._batch.fail(failure)

    def _hand_over(self) -> None:
        """Give finished completions to the event loops that wait for them."""
        done, self._batch.finished = self._batch.finished, []
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, Completion | EngineError]]] = {}
        for job in done:
            by_loop.setdefault(job.loop, []).append((job, job.error or self._completion(job)))
        with self._lock:
            self._in_flight -= len(done)
        for loop, jobs in by_loop.items():
            with self._lock:
                gate = self._gates[loop]
                gate.pending += 1
            try:
                loop.call_soon_threadsafe(self._deliver, gate, jobs)
            except RuntimeError:  # that event loop is closed: nobody waits there any more
                with self._lock:
                    gate.pending -= 1

    def _completion(self, job: Job) -> Completion:
        assert job.stop is not None
        text, ends = self._batch.text.text_and_ends(job.tokens, final=int(job.stop is StopReason.EOS))
        return Completion(
            text=text,
            token_ids=tuple(job.tokens),
            logprobs=tuple(job.logprobs),
            stop=job.stop,
            usage=Usage(
                calls=1,
                input_tokens=len(job.context.ids) - len(job.tokens),
                output_tokens=len(job.tokens),
                seconds=time.perf_counter() - job.started,
            ),
            token_ends=ends,
        )

    def _weights_version(self) -> int:
        return sum(p._version for p in self._weights)


class TransformersStream:
    """A live context of a :class:`TransformersEngine`."""

    def __init__(self, engine: TransformersEngine, context: Context, seed: int) -> None:
        self._engine = engine
        self._context = context
        self._seed = seed
        self._sampling = False

    @property
    def length(self) -> int:
        """Tokens in the context so far."""
        return len(self._context.ids)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The whole context: prompt, completions and what was put between them."""
        return tuple(self._context.ids)

    async def generate(self, sampling: Sampling) -> Completion:
        """Sample one policy turn and append it to the context.

        A stream draws from one sequence of random numbers, begun anew when ``sampling.seed`` changes. When the
        call is cancelled the stream is closed.

        Raises:
            EngineError: the stream is closed or already sampling, or the model failed.
        """
        self._check()
        context = self._context
        seed = self._seed if sampling.seed is None else sampling.seed
        if context.uniforms is None or context.uniforms.seed != seed:
            context.uniforms = Uniforms(seed)
        loop = asyncio.get_running_loop()
        job = Job(context, sampling, loop, loop.create_future(), started=time.perf_counter())
        self._sampling = True
        try:
            self._engine._submit(job, loop)
            return await job.future
        except asyncio.CancelledError:
            self._sampling = False
            self.close()
            raise
        finally:
            self._sampling = False

    def extend(self, token_ids: Sequence[int], text: str = "") -> None:
        """Append environment tokens; they are computed with the next generation.

        Raises:
            EngineError: the stream is closed or sampling.
        """
        self._check()
        self._context.ids.extend(int(i) for i in token_ids)

    def close(self) -> None:
        """Give back the slot. Idempotent."""
        if not self._context.closed:
            self._context.closed = True
            self._engine._release(self._context)

    def _check(self) -> None:
        self._engine._check_alive()
        if self._context.closed:
            raise EngineError("this stream is closed; open a new one with engine.start()")
        if self._sampling:
            raise EngineError("this stream is already sampling; await its completion first")


class _Gate:
    """Requests of one event loop that wait for its present burst of activity to end."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.staged: list[Job] = []
        self.settling = False
        self.again = False
        self.pending = 0


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends a message: the tokenizer's, and those of the model's generation settings."""
    found: list[int] = []
    for value in (
        getattr(tokenizer, "eos_token_id", None),
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
    ):
        found += value if isinstance(value, list) else [] if value is None else [value]
    return sorted({int(i) for i in found})


def _recomputes_rope(model: Any) -> bool:
    """Whether the model rewrites its rotary buffers in forward passes; under inference mode that would spoil them."""
    config = model.config.get_text_config()
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return any(kind in str(settings) for kind in ("dynamic", "longrope"))
