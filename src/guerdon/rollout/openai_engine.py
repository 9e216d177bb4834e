"""Sampling from any OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, hosted services).

Three ways to continue a transcript, by what the endpoint can do:

* ``api="chat"``: the messages, then everything said so far as the beginning of an assistant message that the server
  is asked to go on with (``continuation``; endpoints differ in how they want to be asked).
* ``api="completions"``: the rendered prompt and the transcript as one text.
* ``api="completions", trainable=True``: the same as token ids, with sampled ids and log-probabilities sent back
  (vLLM's ``return_token_ids``; start the server with ``--logprobs-mode processed_logprobs`` so that they are those of
  the sampling distribution). Only this can be trained on.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from guerdon.errors import ConfigError, EngineError
from guerdon.rollout.protocol import Completion, Sampling
from guerdon.types import Message, StopReason, Usage

if TYPE_CHECKING:
    import aiohttp

__all__ = ["OpenAIEngine", "OpenAIStream"]

_CHARACTERS_PER_TOKEN = 4
_CONTINUE: Mapping[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}


class OpenAIEngine:
    """Engine over an HTTP endpoint; see :class:`guerdon.rollout.protocol.Engine`.

    Args:
        base_url: up to and including ``/v1``.
        model: name that the endpoint serves.
        api: ``"chat"`` or ``"completions"``; the latter needs ``tokenizer``.
        tokenizer: Hugging Face tokenizer of the served model, with a chat template.
        trainable: exchange token ids and demand log-probabilities; needs ``tokenizer`` and ``api="completions"``.
        api_key: sent as a bearer token.
        api_key_env: environment variable to read it from instead.
        max_context: most tokens of prompt and response together.
        continuation: request fields that make a chat endpoint go on with the last assistant message. The default is
            vLLM's; ``{}`` for endpoints that refuse unknown fields.
        extra: further request fields.
        headers: further request headers.
        timeout_s: of one request.
        retries: further attempts after a failed connection, a 429 or a 5xx.

    Raises:
        ConfigError: settings that do not fit together.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api: Literal["chat", "completions"] = "chat",
        tokenizer: Any = None,
        trainable: bool = False,
        api_key: str | None = None,
        api_key_env: str | None = None,
        max_context: int = 32_768,
        continuation: Mapping[str, Any] = _CONTINUE,
        extra: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 300.0,
        retries: int = 2,
    ) -> None:
        if api not in ("chat", "completions"):
            raise ConfigError(f"api must be 'chat' or 'completions', got {api!r}")
        if api == "completions" and tokenizer is None:
            raise ConfigError("api='completions' needs tokenizer= to render prompts")
        if trainable and api != "completions":
            raise ConfigError("trainable=True exchanges token ids, which needs api='completions'")
        if not base_url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url must begin with http:// or https://, got {base_url!r}")
        if api_key_env is not None and (api_key := os.environ.get(api_key_env)) is None:
            raise ConfigError(f"the environment variable {api_key_env} (api_key_env) is not set")
        self.model = model
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.trainable = trainable
        self.api = api
        self.continuation = dict(continuation)
        self._url = f"{base_url.rstrip('/')}/{'chat/completions' if api == 'chat' else 'completions'}"
        self._headers = {**(headers or {})} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._extra = dict(extra or {})
        self._timeout_s = timeout_s
        self._retries = retries
        self._session: tuple[asyncio.AbstractEventLoop, aiohttp.ClientSession] | None = None
        self._jitter = random.Random()
        self._text: Any = None
        self._closed = False

    def start(
        self, messages: Sequence[Message], prompt_ids: Sequence[int] = (), *, group: Hashable = None
    ) -> OpenAIStream:
        """Open a stream. The server shares the computation of equal prompts, or does not.

        Raises:
            EngineError: the prompt leaves no room for a token, or the engine is closed.
        """
        if self._closed:
            raise EngineError("the engine is closed; make a new one")
        if len(prompt_ids) >= self.max_context:
            raise EngineError(
                f"the prompt has {len(prompt_ids)} tokens and max_context is {self.max_context}; shorten the prompt"
            )
        return OpenAIStream(self, tuple(messages), list(prompt_ids))

    async def aclose(self) -> None:
        """Close the connections. Idempotent."""
        self._closed = True
        if self._session is not None:
            session, self._session = self._session[1], None
            await session.close()

    def text_and_ends(self, ids: Sequence[int], final: int) -> tuple[str, tuple[int, ...]]:
        """Text of sampled ids and the end of each in it."""
        if self._text is None:
            from guerdon.rollout.text import TokenText

            self._text = TokenText(self.tokenizer, self.decode)
        text, ends = self._text.text_and_ends(ids, final)
        return text, ends

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens kept."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    async def request(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Post one request and return the reply's first choice with its ``usage``.

        Raises:
            EngineError: no usable reply after the last attempt.
        """
        import aiohttp

        body = {"model": self.model, **fields, **self._extra}
        failure = ""
        for attempt in range(self._retries + 1):
            wait = min(8.0, 0.5 * 2**attempt) * (0.5 + self._jitter.random())
            try:
                async with self._connection().post(self._url, json=body) as reply:
                    text = await reply.text()
                    if reply.status == 200:
                        return _first_choice(text, self._url)
                    failure = f"HTTP {reply.status}: {text[:200].strip()}"
                    if reply.status != 429 and reply.status < 500:
                        break
                    wait = _retry_after(reply.headers.get("Retry-After")) or wait
            except TimeoutError:
                failure = f"no reply within {self._timeout_s} s"
            except aiohttp.ClientError as error:
                failure = f"{type(error).__name__}: {error}"
            if attempt < self._retries:
                await asyncio.sleep(wait)
        raise EngineError(f"{self._url} gave no completion: {failure}")

    def _connection(self) -> aiohttp.ClientSession:
        import aiohttp

        loop = asyncio.get_running_loop()
        if self._session is None or self._session[0] is not loop or self._session[1].closed:
            timeout = aiohttp.ClientTimeout(total=self._timeout_s)
            session = aiohttp.ClientSession(
                headers=self._headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
            )
            self._session = (loop, session)
        return self._session[1]


class OpenAIStream:
    """A transcript that is sent whole with every request."""

    def __init__(self, engine: OpenAIEngine, messages: tuple[Message, ...], prompt_ids: list[int]) -> None:
        self._engine = engine
        self._messages = messages
        self._prompt_ids = prompt_ids
        self._ids = list(prompt_ids)
        self._transcript = ""
        self._length = len(prompt_ids)
        self._closed = False

    @property
    def length(self) -> int:
        """Tokens in the context: exact where ids are exchanged, else as the endpoint last counted them."""
        return len(self._ids) if self._engine.trainable else self._length

    async def generate(self, sampling: Sampling) -> Completion:
        """Sample one policy turn.

        Raises:
            EngineError: the stream is closed, or the endpoint gave no usable reply.
        """
        if self._closed:
            raise EngineError("this stream is closed; open a new one with engine.start()")
        room = self._engine.max_context - self.length
        if room <= 0:
            return Completion("", (), () if self._engine.trainable else None, StopReason.CONTEXT)
        limit = min(sampling.max_tokens, room)
        started = time.perf_counter()
        choice = await self._engine.request(self._fields(sampling, limit))
        seconds = time.perf_counter() - started
        completion = self._from_ids(choice, sampling) if self._engine.trainable else self._from_text(choice, sampling)
        counts = choice.get("usage") or {}
        used = Usage(
            calls=1,
            input_tokens=int(counts.get("prompt_tokens") or 0),
            output_tokens=int(counts.get("completion_tokens") or len(completion.token_ids)),
            seconds=seconds,
        )
        stop = completion.stop
        if stop is StopReason.LENGTH and limit < sampling.max_tokens:
            stop = StopReason.CONTEXT
        self._transcript += completion.text
        self._length = used.input_tokens + used.output_tokens or self._length + len(completion.text) // 4
        return Completion(completion.text, completion.token_ids, completion.logprobs, stop, used, completion.token_ends)

    def extend(self, token_ids: Sequence[int], text: str) -> None:
        """Append environment text (and its ids, where ids are exchanged).

        Raises:
            EngineError: the stream is closed.
        """
        if self._closed:
            raise EngineError("this stream is closed; open a new one with engine.start()")
        self._ids.extend(token_ids)
        self._transcript += text
        self._length += len(token_ids) or len(text) // _CHARACTERS_PER_TOKEN

    def close(self) -> None:
        """Nothing is held at the endpoint. Idempotent."""
        self._closed = True

    def _fields(self, sampling: Sampling, limit: int) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "max_tokens": limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.top_k:
            fields["top_k"] = sampling.top_k
        if sampling.stop:
            fields["stop"] = list(sampling.stop)
        if sampling.seed is not None:
            # One request is one turn: each needs its own numbers, and many servers take 31 bits.
            fields["seed"] = (sampling.seed + self.length) & 0x7FFFFFFF
        engine = self._engine
        if engine.trainable:
            return fields | {"prompt": self._ids, "return_token_ids": True, "logprobs": 1}
        if engine.api == "completions":
            return fields | {"prompt": engine.decode(self._prompt_ids) + self._transcript}
        messages = [dict(m) for m in self._messages]
        if not self._transcript:
            return fields | {"messages": messages}
        return fields | {
            "messages": [*messages, {"role": "assistant", "content": self._transcript}],
            **engine.continuation,
        }

    def _from_text(self, choice: Mapping[str, Any], sampling: Sampling) -> Completion:
        text = choice.get("text") if self._engine.api == "completions" else (choice.get("message") or {}).get("content")
        text = text or ""
        ends = [at + len(s) for s in sampling.stop if (at := text.find(s)) >= 0]
        if ends:
            return Completion(text[: min(ends)], (), None, StopReason.STOP_STRING)
        if choice.get("finish_reason") == "length":
            return Completion(text, (), None, StopReason.LENGTH)
        stopped_by = choice.get("stop_reason")
        if not isinstance(stopped_by, str) or stopped_by not in sampling.stop:
            stopped_by = _unclosed(text, sampling.stop)
        if stopped_by is not None:
            return Completion(text + stopped_by, (), None, StopReason.STOP_STRING)
        return Completion(text, (), None, StopReason.EOS)

    def _from_ids(self, choice: Mapping[str, Any], sampling: Sampling) -> Completion:
        ids = choice.get("token_ids")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        if ids is None or logprobs is None or len(ids) != len(logprobs):
            raise EngineError(
                "the endpoint returned no token_ids with log-probabilities; it needs vLLM's return_token_ids, "
                "or use trainable=False"
            )
        eos = choice.get("finish_reason") == "stop" and not isinstance(choice.get("stop_reason"), str)
        marked = bool(eos and ids and ids[-1] == self._engine.tokenizer.eos_token_id)
        text, ends = self._engine.text_and_ends(ids, int(marked))
        stop = StopReason.EOS if eos else StopReason.STOP_STRING
        if choice.get("finish_reason") == "length":
            stop = StopReason.LENGTH
        self._ids.extend(ids)
        return Completion(text, tuple(ids), tuple(float(x) for x in logprobs), stop, token_ends=ends)


def _unclosed(text: str, stops: Sequence[str]) -> str | None:
    """The closing tag among the stop strings whose opening tag was written last and is not closed.

    Most endpoints leave the stop string out of the text, and do not say whether one or the end of the message
    ended it. For paired tags the text itself tells.
    """
    found = []
    for stop in stops:
        match = re.fullmatch(r"</([^<>]+)>", stop.strip())
        if match and (at := text.rfind(f"<{match[1]}>")) >= 0 and text.find(stop.strip(), at) < 0:
            found.append((at, stop))
    return max(found)[1] if found else None


def _first_choice(text: str, url: str) -> dict[str, Any]:
    try:
        reply = json.loads(text)
        choice = reply["choices"][0]
        return {**choice, "usage": reply.get("usage")}
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise EngineError(f"{url} returned no choices: {text[:200].strip()!r}") from error


def _retry_after(value: str | None) -> float | None:
    try:
        return min(60.0, max(0.0, float(value))) if value is not None else None
    except ValueError:
        return None
