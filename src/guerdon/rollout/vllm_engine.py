"""Sampling with vLLM in this process: the same protocol, for models and batches beyond what one Python loop serves.

vLLM keeps keys and values by prefix (automatic prefix caching), so each turn sends the whole context as token ids and
only what is new is computed.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from guerdon.errors import ConfigError, EngineError, MissingDependency
from guerdon.rollout.protocol import Completion, Sampling
from guerdon.rollout.text import TokenText
from guerdon.rollout.vllm_weights import EXTENSION
from guerdon.types import Message, StopReason, Usage

__all__ = ["VllmEngine", "VllmStream"]


class VllmEngine:
    """Engine over vLLM's asynchronous engine; see :class:`guerdon.rollout.protocol.Engine`.

    Args:
        model: hub id or folder.
        max_context: most tokens of prompt and response together; default the model's.
        tokenizer: Hugging Face tokenizer; default that of ``model``.
        engine: a ready ``AsyncLLM`` to use instead of making one. It must report processed log-probabilities.
        options: further fields of vLLM's ``AsyncEngineArgs`` (``tensor_parallel_size``, ``dtype``, ...).

    Raises:
        MissingDependency: vLLM is not installed.
        ConfigError: ``options`` ask for log-probabilities of another distribution than the sampled one.
    """

    trainable = True

    def __init__(
        self,
        model: str,
        *,
        max_context: int | None = None,
        tokenizer: Any = None,
        engine: Any = None,
        **options: Any,
    ) -> None:
        try:
            from vllm import AsyncEngineArgs, SamplingParams
            from vllm.sampling_params import RequestOutputKind
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise MissingDependency("VllmEngine needs vLLM: pip install 'guerdon[vllm]'") from error
        if options.setdefault("logprobs_mode", "processed_logprobs") != "processed_logprobs":
            raise ConfigError(
                f"logprobs_mode must be 'processed_logprobs' (those of the sampling distribution), "
                f"got {options['logprobs_mode']!r}"
            )
        options.setdefault("enable_prefix_caching", True)
        options.setdefault("worker_extension_cls", EXTENSION)
        if engine is None:
            arguments = AsyncEngineArgs(model=model, max_model_len=max_context, **options)
            engine = AsyncLLM.from_engine_args(arguments)
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model)
        self.engine = engine
        self.tokenizer = tokenizer
        self.max_context = int(max_context or engine.model_config.max_model_len)
        self._sampling_params = SamplingParams
        self._final_only = RequestOutputKind.FINAL_ONLY
        self._text = TokenText(tokenizer, self._decode)
        self._numbers = itertools.count()
        self._closed = False

    def start(self, messages: Sequence[Message], prompt_ids: Sequence[int], *, group: Hashable = None) -> VllmStream:
        """Open a stream; equal prompts share their computation through the prefix cache.

        Raises:
            EngineError: the prompt is empty or leaves no room for a token, or the engine is closed.
        """
        if self._closed:
            raise EngineError("the engine is closed; make a new one")
        if not prompt_ids:
            raise EngineError("prompt_ids is empty; a stream needs at least one token")
        if len(prompt_ids) >= self.max_context:
            raise EngineError(
                f"the prompt has {len(prompt_ids)} tokens and max_context is {self.max_context}; shorten the prompt"
            )
        return VllmStream(self, list(prompt_ids))

    async def reset(self) -> None:
        """Forget cached prefixes, as is due after a change of the weights."""
        await self.engine.reset_prefix_cache()

    async def update_weights(self, policy: Any) -> None:
        """Give vLLM's workers the policy's weights, adapters merged, and forget what was computed with the old ones.

        They go by files, which every worker must be able to read.

        Raises:
            EngineError: a worker took none.
        """
        with tempfile.TemporaryDirectory(prefix="guerdon-weights-") as folder:
            policy.merged().model.save_pretrained(folder)
            counts = await self.engine.collective_rpc("take_weights", args=(folder,))
        if not counts or not all(counts):
            raise EngineError(
                f"vLLM's workers took {list(counts or ())} tensors of the new weights; "
                "their disk must hold the folder of temporary files"
            )
        await self.reset()

    async def aclose(self) -> None:
        """Shut vLLM down. Idempotent."""
        if not self._closed:
            self._closed = True
            self.engine.shutdown()

    async def sample(self, ids: Sequence[int], sampling: Sampling, limit: int) -> Completion:
        """One completion of a context."""
        parameters = self._sampling_params(
            max_tokens=limit,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            stop=list(sampling.stop) or None,
            # One request is one turn, and each needs its own numbers.
            seed=None if sampling.seed is None else (sampling.seed + len(ids)) & 0x7FFFFFFFFFFFFFFF,
            logprobs=0,
            skip_special_tokens=False,
            include_stop_str_in_output=True,
            output_kind=self._final_only,
        )
        name = f"guerdon-{next(self._numbers)}"
        started = time.perf_counter()
        last = None
        # Leaving the generator early (cancellation) aborts the request.
        async for output in self.engine.generate({"prompt_token_ids": list(ids)}, parameters, name):
            last = output
        if last is None or not last.outputs:
            raise EngineError(f"vLLM returned no output for request {name}")
        out = last.outputs[0]
        if out.finish_reason == "abort":
            raise EngineError(f"vLLM aborted request {name}")
        tokens = tuple(int(t) for t in out.token_ids)
        stop = _stop_reason(out)
        text, ends = self._text.text_and_ends(tokens, final=int(stop is StopReason.EOS))
        return Completion(
            text=text,
            token_ids=tokens,
            logprobs=_logprobs(tokens, out.logprobs, name),
            stop=stop,
            usage=Usage(1, len(ids), len(tokens), seconds=time.perf_counter() - started),
            token_ends=ends,
        )

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


class VllmStream:
    """The token ids of one trajectory."""

    def __init__(self, engine: VllmEngine, ids: list[int]) -> None:
        self._engine = engine
        self._ids = ids
        self._closed = False

    @property
    def length(self) -> int:
        """Tokens in the context so far."""
        return len(self._ids)

    async def generate(self, sampling: Sampling) -> Completion:
        """Sample one policy turn and append it to the context.

        Raises:
            EngineError: the stream is closed, or vLLM gave no completion.
        """
        self._check()
        room = self._engine.max_context - len(self._ids)
        if room <= 0:
            return Completion("", (), (), StopReason.CONTEXT)
        limit = min(sampling.max_tokens, room)
        completion = await self._engine.sample(self._ids, sampling, limit)
        self._ids.extend(completion.token_ids)
        if completion.stop is StopReason.LENGTH and limit < sampling.max_tokens:
            return Completion(
                completion.text,
                completion.token_ids,
                completion.logprobs,
                StopReason.CONTEXT,
                completion.usage,
                completion.token_ends,
            )
        return completion

    def extend(self, token_ids: Sequence[int], text: str = "") -> None:
        """Append environment tokens.

        Raises:
            EngineError: the stream is closed.
        """
        self._check()
        self._ids.extend(int(i) for i in token_ids)

    def close(self) -> None:
        """vLLM evicts what is not used. Idempotent."""
        self._closed = True

    def _check(self) -> None:
        if self._closed:
            raise EngineError("this stream is closed; open a new one with engine.start()")


def _stop_reason(out: Any) -> StopReason:
    if out.finish_reason == "length":
        return StopReason.LENGTH
    return StopReason.STOP_STRING if isinstance(out.stop_reason, str) else StopReason.EOS


def _logprobs(tokens: Sequence[int], entries: Sequence[Mapping[int, Any]] | None, name: str) -> tuple[float, ...]:
    if entries is None or len(entries) != len(tokens):
        raise EngineError(f"vLLM returned no log-probabilities for request {name}")
    return tuple(float(entry[token].logprob) for token, entry in zip(tokens, entries, strict=True))
