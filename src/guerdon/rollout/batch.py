"""Continuous batching: which stream sits in which slot, what is prefilled, and one decode step for all that sample.

Everything here runs in the engine's worker thread. Slots ``0 .. active`` hold the streams that are sampling; behind
them lie streams that wait for their environment (their keys and values stay), and free slots. When a stream starts
or stops sampling its slot is exchanged with one at the border, so a decode step always reads contiguous rows.

A stream's last token is never part of its prefill: it goes through the next decode step, which samples from it.
So the prompt of a group is computed and stored once, without that token, for all streams of the group.
"""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from guerdon.errors import ConfigError, EngineError
from guerdon.policies.direct import DirectTrunk, direct_trunk, is_plain
from guerdon.policies.memory import return_freed
from guerdon.policies.products import PackedWeight, pack
from guerdon.rollout.kv import ATTENTION, RowGroups, SlotCache, attending
from guerdon.rollout.protocol import Sampling
from guerdon.rollout.sampler import BLOCK, Uniforms, sample
from guerdon.rollout.text import StopSet, TokenText
from guerdon.types import StopReason

__all__ = ["Batch", "Context", "Job", "Masks", "Prefix", "Stats", "base_model"]

_SAMPLE_ELEMENTS = 1 << 24
# Parameters, and steps to come, from which sampling gains more by packed weights than packing them costs.
_WORTH_PACKING = 1 << 23
_LONG = 32
# A prefix of so few tokens is copied to its rows: reading it again costs less than looking after who shares it.
_SHORT = 32


@dataclass(eq=False)
class Prefix:
    """Tokens that the streams of a group begin with; computed and stored once.

    ``key`` and ``users`` belong to the engine, ``slot`` (in the shared bank) and ``cached`` to the batch.
    """

    key: Hashable
    ids: Sequence[int]
    users: int = 0
    slot: int = -1
    cached: int = 0
    used: bool = False

    @property
    def ready(self) -> bool:
        return self.cached == len(self.ids)


@dataclass(eq=False)
class Context:
    """One stream as the batch sees it.

    ``cached`` tokens have keys and values: the first ``base`` of them in the group's prefix, the others in ``slot``.
    """

    ids: list[int]
    prefix: Prefix | None = None
    uniforms: Uniforms | None = None
    slot: int = -1
    cached: int = 0
    base: int = 0
    job: Job | None = None
    closed: bool = False

    @property
    def missing(self) -> int:
        """Tokens to compute before the last one."""
        return len(self.ids) - 1 - self.cached

    def lose(self) -> None:
        """Forget what was computed."""
        self.slot, self.cached, self.base = -1, 0, 0


@dataclass(eq=False)
class Job:
    """One completion being sampled."""

    context: Context
    sampling: Sampling
    loop: Any
    future: Any
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop: StopReason | None = None
    error: EngineError | None = None
    started: float = 0.0


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens of one stream, or of one prefix, to be computed: ``need`` of ``ids`` from ``start`` on."""

    owner: Context | Prefix
    slot: int
    start: int
    ids: Sequence[int]
    prefix: tuple[int, int]
    need: int

    @property
    def fresh(self) -> bool:
        """Nothing lies before these tokens."""
        return self.start == 0 and self.prefix[1] == 0


@dataclass(slots=True)
class _Rows:
    """The sampling rows, as every decode step reads them until rows come or go.

    Attributes:
        values: views of the row arrays.
        index: [B] 0, 1, 2, ...
        groups: shared prefixes; None where no row has one.
        temperature: [B]; None where all are 1.
        top_k, top_p: [B]; None where no row asks for it.
    """

    values: dict[str, np.ndarray]
    index: np.ndarray
    groups: RowGroups | None
    temperature: torch.Tensor | None
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None


@dataclass(slots=True)
class Stats:
    """What an engine has computed since it was made.

    Attributes:
        prefill_tokens: tokens sent through the model before sampling: prompts, observations, and contexts that had
            to be computed anew. The last token before a completion is not among them.
        shared_tokens: tokens of prompts that another stream of the group had computed already.
        decode_tokens: tokens sampled.
        decode_steps: forward passes that sampled.
        largest_batch: most rows of one decode step.
    """

    prefill_tokens: int = 0
    shared_tokens: int = 0
    decode_tokens: int = 0
    decode_steps: int = 0
    largest_batch: int = 0


class Batch:
    """The slots of one model.

    Args:
        model: causal language model of transformers (or a PEFT wrapper).
        text: the tokenizer's pieces.
        eos: ids that end a completion.
        max_slots: most streams with keys and values at once.
        max_context: most tokens of one stream.
        prefill_tokens: most (padded) tokens of one prefill pass.
        own_attention: use the model's attention function instead of the one that reads a shared prefix once.

    Attributes:
        finished: completions that have ended since the list was last emptied.
    """

    def __init__(
        self,
        model: Any,
        text: TokenText,
        eos: Iterable[int],
        *,
        max_slots: int,
        max_context: int,
        prefill_tokens: int = 4096,
        own_attention: bool = False,
    ) -> None:
        self.model = model
        self.text = text
        self.stats = Stats()
        self.max_context = max_context
        self.prefill_tokens = prefill_tokens
        self.device = next(model.parameters()).device
        self._config = base_model(model).config.get_text_config()
        self._masks = Masks(self._config, max_context, next(model.parameters()).dtype)
        self._own_attention = own_attention or not self._masks.plain
        self._cache_argument = _cache_argument(model)
        self._eos = np.zeros(len(text.pieces), bool)
        self._eos[[i for i in eos if 0 <= i < len(text.pieces)]] = True
        self._stop_sets: dict[tuple[str, ...], int] = {}
        self._stops: list[StopSet] = []
        self._candidates = np.zeros((0, len(text.pieces)), bool)
        self.cache = SlotCache(max_slots, max_context)
        self.queue: deque[Job] = deque()
        self.finished: list[Job] = []
        self._filling: list[Job] = []
        self._jobs: dict[int, Job] = {}  # every completion that has not ended, wherever it is
        self.active = 0
        self._prefixes: list[Prefix] = []
        self._direct: DirectTrunk | None = None
        self._head = base_model(model).get_output_embeddings()
        self._packed_head: PackedWeight | None = None
        self._large = sum(p.numel() for p in model.parameters()) >= _WORTH_PACKING
        self._rows_now: _Rows | None = None
        self._allocate(0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Evaluation mode and the batch's attention; both are as before afterwards."""
        training = [m for m in self.model.modules() if m.training]
        if training:
            self.model.eval()
        implementation = self._config._attn_implementation
        if not self._own_attention:
            # Made anew each time: in between, weights may have been replaced, wrapped or hooked.
            before, self._direct = self._direct, direct_trunk(base_model(self.model), context=self.max_context)
            if before is not None and self._direct is not None:
                self._direct.take_over(before)
            if self._direct is None:
                self._config._attn_implementation = ATTENTION
        try:
            with attending(self.cache):
                yield
        finally:
            self._config._attn_implementation = implementation
            for module in training:
                module.training = True

    # -- slots ---------------------------------------------------------------------------------------------

    def _allocate(self, slots: int) -> None:
        """Row arrays for ``slots`` slots; what is there is kept."""
        old = len(self.owner) if hasattr(self, "owner") else 0
        self.owner: list[Context | None] = [*(self.owner if old else []), *[None] * (slots - old)]
        fields = {
            "feed": ((), np.int64), "cached": ((), np.int64), "count": ((), np.int64), "limit": ((), np.int64),
            "temperature": ((), np.float32), "top_p": ((), np.float32), "top_k": ((), np.int64),
            "base": ((), np.int64), "stops": ((), np.int64), "drawn": ((), np.int64),
            "uniforms": ((BLOCK,), np.float32), "tokens": ((64,), np.int64), "logprobs": ((64,), np.float32),
        }  # fmt: skip
        rows: dict[str, np.ndarray] = getattr(self, "_rows", {})
        self._rows: dict[str, np.ndarray] = {}
        for name, (shape, dtype) in fields.items():
            width = rows[name].shape[1:] if name in rows else shape
            self._rows[name] = np.zeros((slots, *width), dtype)
            if old:
                self._rows[name][:old] = rows[name]
        self._rows_now = None

    def _exchange(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Swap the contents of pairs of slots."""
        if not pairs:
            return
        a, b = [p[0] for p in pairs], [p[1] for p in pairs]
        stored = max((o.cached - o.base for s in (*a, *b) if (o := self.owner[s]) is not None), default=0)
        if stored > 0:
            # Rows may have been added while everything they hold so far lies in a shared prefix.
            self.cache.own.reserve(len(self.owner), stored)
            self.cache.own.exchange(a, b, stored)
        source, target = [*a, *b], [*b, *a]
        for values in self._rows.values():
            values[target] = values[source]
        for x, y in pairs:
            self.owner[x], self.owner[y] = self.owner[y], self.owner[x]
            for s in (x, y):
                if (owner := self.owner[s]) is not None:
                    owner.slot = s

    # -- what the engine calls -----------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self.queue or self._filling or self.active)

    def submit(self, job: Job) -> None:
        """Queue a completion."""
        job.context.job = job
        self._jobs[id(job)] = job
        self.queue.append(job)

    def close(self, context: Context) -> None:
        """Free a stream's slot; a completion that it is sampling ends as ABORTED."""
        context.closed = True
        if (job := context.job) is not None:
            if job in self.queue:
                self.queue.remove(job)
            elif job in self._filling:
                self._filling.remove(job)
            else:
                self._deactivate([context.slot])
            context.job = None
            self._jobs.pop(id(job), None)
            job.stop = StopReason.ABORTED
        if context.slot >= 0:
            self.owner[context.slot] = None
            context.lose()

    def rest(self) -> None:
        """Give back what only speeds sampling up; called when no stream is open."""
        held = self._packed_head is not None
        self._unpack()
        if held:
            return_freed()

    def drop(self, prefix: Prefix) -> None:
        """Free a prefix that no open stream begins with."""
        if prefix.slot < 0:
            return
        last = self._prefixes.pop()
        if last is not prefix:
            # The prefixes in use stay contiguous, so that a decode step reads them as a view.
            self.cache.shared.exchange([prefix.slot], [last.slot], last.cached)
            self._prefixes[prefix.slot] = last
            last.slot = prefix.slot
        prefix.slot, prefix.cached, prefix.used = -1, 0, False
        self._rows_now = None

    def forget(self) -> None:
        """Drop all keys and values; open streams are computed anew when they sample next."""
        for context in self.owner:
            if context is not None:
                context.lose()
        for prefix in self._prefixes:
            prefix.slot, prefix.cached, prefix.used = -1, 0, False
        self._prefixes = []
        self._rows_now = None
        self._unpack()
        self.queue.extendleft(reversed(self._filling))
        self._filling = []
        self.cache.release()
        self.active = 0
        self.owner, self._rows = [], {}
        self._allocate(0)

    def fail(self, error: EngineError) -> list[Job]:
        """Take all completions off the batch with an error, and drop all keys and values."""
        jobs = list(self._jobs.values())
        self._jobs.clear()
        self.queue.clear()
        self._filling = []
        for job in jobs:
            job.error = error
            job.context.job = None
        self.forget()
        return jobs

    def step(self) -> None:
        """Admit what is queued, prefill what needs it, and sample one token for every row that can."""
        self._admit()
        self._prefill()
        if self.active:
            self._decode()

    # -- prefill -------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let queued completions in, first those whose stream has a slot, then in order as slots are free."""
        if not self.queue:
            return
        free = [s for s, owner in enumerate(self.owner) if owner is None]
        waiting = sorted(self.queue, key=lambda job: job.context.slot < 0)
        self.queue.clear()
        for job in waiting:
            context = job.context
            if len(context.ids) >= self.max_context:
                self._finish(job, StopReason.CONTEXT)
            elif context.slot >= 0 or self._place(context, free):
                self._filling.append(job)
            else:
                self.queue.append(job)

    def _place(self, context: Context, free: list[int]) -> bool:
        if not free and (first := len(self.owner)) < self.cache.own.max_slots:
            self._allocate(min(self.cache.own.max_slots, max(8, first * 3 // 2)))
            free.extend(range(first, len(self.owner)))
        if free:
            slot = free.pop(0)
        elif not (self.active or self._filling) and (evicted := self._evict()) is not None:
            slot = evicted
        else:
            return False
        self.owner[slot] = context
        context.slot = slot
        return True

    def _evict(self) -> int | None:
        """Take the slot of a stream that waits for its environment, where nothing else could go on."""
        for slot, context in enumerate(self.owner):
            if context is not None and context.job is None:
                context.lose()
                self.owner[slot] = None
                return slot
        return None

    def _prefill(self) -> None:
        """Compute what lies between each stream's stored tokens and its last one, within the budget of one pass."""
        budget = self.prefill_tokens
        while self._filling:
            self._begin_with_prefixes()
            ready = sorted((j for j in self._filling if self._is_ready(j.context)), key=lambda j: j.context.slot)
            if ready:
                self._filling = [j for j in self._filling if not self._is_ready(j.context)]
                self._activate(ready)
            if not self._filling:
                return
            budget -= self._prefill_pass(max(budget, self.prefill_tokens // 4))
            if budget <= 0 and self.active:
                return

    def _is_ready(self, context: Context) -> bool:
        return context.missing == 0 and (context.prefix is None or context.cached > 0)

    def _begin_with_prefixes(self) -> None:
        """Let the streams whose prefix is computed go on behind it."""
        copies: dict[int, list[int]] = {}
        for c in (job.context for job in self._filling):
            if c.prefix is None or c.cached > 0 or not c.prefix.ready:
                continue
            c.cached = len(c.prefix.ids)
            self.stats.shared_tokens += c.cached if c.prefix.used else 0
            c.prefix.used = True
            if self._own_attention or c.cached <= _SHORT:
                copies.setdefault(c.prefix.slot, []).append(c.slot)
            else:
                c.base = c.cached
        for prefix, slots in copies.items():
            tokens = len(self._prefixes[prefix].ids)
            self.cache.own.reserve(len(self.owner), tokens)
            self.cache.copy_prefix(prefix, slots, tokens)

    def _prefill_pass(self, budget: int) -> int:
        """One forward pass over prefixes, else over streams, of similar length; returns its padded size."""
        contexts = [job.context for job in self._filling]
        wanted = {c.prefix: None for c in contexts if c.prefix is not None and c.cached == 0 and not c.prefix.ready}
        for prefix in wanted:
            if prefix.slot < 0:
                prefix.slot = len(self._prefixes)
                self._prefixes.append(prefix)
        bank = self.cache.shared if wanted else self.cache.own
        items = [_Piece(p, p.slot, p.cached, p.ids, (0, 0), len(p.ids) - p.cached) for p in wanted]
        if not wanted:
            items = [
                _Piece(
                    c, c.slot, c.cached - c.base, c.ids[c.base :], (c.prefix.slot if c.prefix else 0, c.base), c.missing
                )
                for c in contexts
                if c.missing > 0
            ]
        items = sorted((i for i in items if i.fresh == items[0].fresh), key=lambda i: i.need)
        chunk: list[_Piece] = []
        for item in items:
            need = min(item.need, budget)
            if chunk and need * (len(chunk) + 1) > budget:
                break
            chunk.append(replace(item, need=need))
        chunk.sort(key=lambda i: i.slot)
        slots, starts, lengths = [i.slot for i in chunk], [i.start for i in chunk], [i.need for i in chunk]
        width, longest = max(i.start + i.need for i in chunk), max(lengths)
        bank.reserve(len(self._prefixes) if wanted else len(self.owner), width)
        ids = np.zeros((len(chunk), longest), np.int64)
        for row, item in enumerate(chunk):
            ids[row, : item.need] = item.ids[item.start : item.start + item.need]
        firsts = torch.tensor([i.start + i.prefix[1] for i in chunk], device=self.device)
        positions = firsts[:, None] + torch.arange(longest, device=self.device)
        mask = None
        if chunk[0].fresh:
            self.cache.fresh(bank, slots, lengths, self.device)
        else:
            self.cache.continued(bank, slots, starts, lengths, self.device, [i.prefix for i in chunk])
            if self._own_attention:
                mask = self._masks(positions, width)
        self._forward(torch.from_numpy(ids).to(self.device), positions, mask, logits=False)
        for item in chunk:
            item.owner.cached += item.need
        self.stats.prefill_tokens += sum(lengths)
        return longest * len(chunk)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, mask: Any, *, logits: bool = True) -> torch.Tensor:
        """Compute tokens [B, Q]; logits [B, V] of the last ones where they are wanted."""
        trunk = self._direct
        if trunk is not None:
            trunk.tabulate(int(positions.max()) + 1, self.max_context)
            states = trunk(
                ids.reshape(-1),
                positions.reshape(-1),
                lambda layer, q, k, v: self.cache.direct(layer, q, k, v, trunk.scaling),
            )
            last = states.view(*ids.shape, -1)[:, -1]
            return (self._packed_head or self._head)(last) if logits else last
        out = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: self.cache},
        )
        return out.logits[:, -1]

    # -- decoding ------------------------------------------------------------------------------------------

    def _activate(self, jobs: Sequence[Job]) -> None:
        """Move streams to the border of the sampling rows and set up their rows."""
        n, new = self.active, self.active + len(jobs)
        slots = {j.context.slot for j in jobs}
        outside = sorted(s for s in slots if s >= new)
        inside = [s for s in range(n, new) if s not in slots]
        self._exchange(list(zip(outside, inside, strict=True)))
        self.active = new
        self._rows_now = None
        rows = self._rows
        for job in jobs:
            c, s = job.context, job.sampling
            slot = c.slot
            rows["feed"][slot] = c.ids[-1]
            rows["cached"][slot] = c.cached
            rows["base"][slot] = c.base
            rows["count"][slot] = 0
            rows["limit"][slot] = min(s.max_tokens, self.max_context - len(c.ids))
            rows["temperature"][slot] = s.temperature
            rows["top_p"][slot] = s.top_p
            rows["top_k"][slot] = s.top_k
            rows["stops"][slot] = self._stop_set(s.stop)
            assert c.uniforms is not None
            rows["uniforms"][slot] = c.uniforms.block
            rows["drawn"][slot] = c.uniforms.used

    def _deactivate(self, slots: Sequence[int]) -> None:
        """Move rows that stop sampling behind the border."""
        leaving = set(slots)
        for s in leaving:
            context = self.owner[s]
            assert context is not None and context.uniforms is not None
            context.uniforms.used = int(self._rows["drawn"][s])
            context.cached = int(self._rows["cached"][s])
        rest = self.active - len(leaving)
        for s in range(self.active):
            if (owner := self.owner[s]) is not None:
                owner.cached = int(self._rows["cached"][s])
        holes = sorted(s for s in leaving if s < rest)
        movers = [s for s in range(rest, self.active) if s not in leaving]
        self.active = rest
        self._rows_now = None
        self._exchange(list(zip(holes, movers, strict=True)))

    def _stop_set(self, strings: tuple[str, ...]) -> int:
        if strings not in self._stop_sets:
            self._stop_sets[strings] = len(self._stops)
            self._stops.append(StopSet(strings, self.text))
            self._candidates = np.stack([s.candidate for s in self._stops])
        return self._stop_sets[strings]

    def _decode(self) -> None:
        now = self._rows_now or self._look_at_rows()
        n, rows = self.active, now.values
        stored = rows["cached"] - rows["base"]
        width = int(stored.max()) + 1
        self.cache.own.reserve(len(self.owner), width)
        feed = torch.from_numpy(rows["feed"]).to(self.device)
        positions = torch.from_numpy(rows["cached"]).to(self.device)
        width = self.cache.decode(torch.from_numpy(stored).to(self.device), width, now.groups)
        mask = self._masks(positions[:, None], width) if self._own_attention else None
        logits = self._forward(feed[:, None], positions[:, None], mask)
        tokens, logprobs = self._sample(logits, now)
        self.stats.decode_steps += 1
        self.stats.decode_tokens += n
        self.stats.largest_batch = max(self.stats.largest_batch, n)

        count = rows["count"]
        if int(count.max()) >= self._rows["tokens"].shape[1]:
            for name in ("tokens", "logprobs"):
                old = self._rows[name]
                self._rows[name] = np.concatenate([old, np.zeros_like(old)], axis=1)
                rows[name] = self._rows[name][:n]
        rows["tokens"][now.index, count] = tokens
        rows["logprobs"][now.index, count] = logprobs
        rows["feed"][:] = tokens
        rows["cached"] += 1
        count += 1
        rows["drawn"] += 1
        ended = self._eos[tokens] | (count >= rows["limit"]) | ~np.isfinite(logprobs)
        check = self._candidates[rows["stops"], tokens]
        finished = [s for s in np.flatnonzero(ended | check).tolist() if self._end_of(s, bool(check[s]))]
        if finished:
            self._retire(finished)

    def _look_at_rows(self) -> _Rows:
        """What stays the same for every step until rows come or go."""
        rows = {name: values[: self.active] for name, values in self._rows.items()}
        if self._large and self._direct is not None and int(rows["limit"].max()) >= _LONG:
            self._pack(self._direct)
        groups = None
        if rows["base"].any():
            slots = [c.prefix.slot if c is not None and c.prefix is not None else 0 for c in self.owner[: self.active]]
            groups = RowGroups.of(np.array(slots), rows["base"], self.device, self.cache.own.dtype)

        def setting(name: str, used: bool) -> torch.Tensor | None:
            return torch.from_numpy(rows[name].copy()).to(self.device) if used else None

        self._rows_now = _Rows(
            rows,
            np.arange(self.active),
            groups,
            setting("temperature", bool((rows["temperature"] != 1).any())),
            setting("top_k", bool(rows["top_k"].any())),
            setting("top_p", bool((rows["top_p"] < 1).any())),
        )
        return self._rows_now

    def _pack(self, trunk: DirectTrunk) -> None:
        """Copy the weights into a layout that is fast for few rows, until they change or no stream is open."""
        trunk.pack()
        if self._packed_head is None and is_plain(self._head):
            self._packed_head = pack(self._head.weight, self._head.bias)

    def _unpack(self) -> None:
        self._packed_head = None
        if self._direct is not None:
            self._direct.unpack()

    def _sample(self, logits: torch.Tensor, now: _Rows) -> tuple[np.ndarray, np.ndarray]:
        rows = now.values
        for s in np.flatnonzero(rows["drawn"] == BLOCK):
            context = self.owner[s]
            assert context is not None and context.uniforms is not None
            rows["uniforms"][s] = context.uniforms.refill()
            rows["drawn"][s] = 0
        drawn = torch.from_numpy(rows["uniforms"][now.index, rows["drawn"]]).to(self.device)
        arguments = (logits, drawn, now.temperature, now.top_k, now.top_p)
        at_once = max(1, _SAMPLE_ELEMENTS // logits.shape[-1])
        if len(logits) <= at_once:
            tokens, logprobs = sample(*arguments)
        else:
            parts = [
                sample(*(None if a is None else a[i : i + at_once] for a in arguments))  # type: ignore[arg-type]
                for i in range(0, len(logits), at_once)
            ]
            tokens, logprobs = (torch.cat([p[k] for p in parts]) for k in (0, 1))
        return tokens.cpu().numpy(), logprobs.cpu().numpy()

    def _end_of(self, slot: int, check: bool) -> bool:
        """Decide whether a row ends here, and record why on its job."""
        context = self.owner[slot]
        assert context is not None and context.job is not None
        job, count = context.job, int(self._rows["count"][slot])
        token = int(self._rows["feed"][slot])
        if not math.isfinite(self._rows["logprobs"][slot, count - 1]):
            job.error = EngineError(
                f"the model's logits are not finite after {len(context.ids) + count - 1} tokens; its weights diverged"
            )
            return True
        if self._eos[token]:
            job.stop = StopReason.EOS
        elif check and self._stops[self._rows["stops"][slot]].completed(self._rows["tokens"][slot, :count].tolist()):
            job.stop = StopReason.STOP_STRING
        elif count >= self._rows["limit"][slot]:
            full = len(context.ids) + count >= self.max_context and count < job.sampling.max_tokens
            job.stop = StopReason.CONTEXT if full else StopReason.LENGTH
        return job.stop is not None

    def _retire(self, slots: Sequence[int]) -> None:
        done = []
        for slot in slots:
            context = self.owner[slot]
            assert context is not None and context.job is not None
            count = int(self._rows["count"][slot])
            job = context.job
            job.tokens = self._rows["tokens"][slot, :count].tolist()
            job.logprobs = self._rows["logprobs"][slot, :count].tolist()
            done.append(job)
        self._deactivate(slots)
        for job in done:
            context = job.context
            if job.error is not None:
                self.cache.own.clear(context.slot)
                self.owner[context.slot] = None
                context.lose()
            else:
                context.ids.extend(job.tokens)
            self._finish(job, job.stop)

    def _finish(self, job: Job, stop: StopReason | None) -> None:
        job.stop = stop
        job.context.job = None
        self._jobs.pop(id(job), None)
        self.finished.append(job)


class Masks:
    """Attention masks for passes that read stored keys, in the form that the model's own attention wants.

    Args:
        config: of the model's text part.
        max_context: most tokens of one stream.
        dtype: of the model.

    Attributes:
        plain: the model attends to everything before a token, through transformers' attention registry.
    """

    def __init__(self, config: Any, max_context: int, dtype: torch.dtype) -> None:
        kinds = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "sliding_window", None)
        if not kinds <= {"full_attention", "sliding_attention"}:
            raise ConfigError(
                f"TransformersEngine cannot cache layers of type {sorted(kinds)}; use VllmEngine or an endpoint"
            )
        implementation = getattr(config, "_attn_implementation", "sdpa")
        if implementation not in ("sdpa", "eager"):
            raise ConfigError(
                f"TransformersEngine needs attn_implementation 'sdpa' or 'eager', the model has {implementation!r}"
            )
        # A window as wide as the context hides nothing.
        self._window = window if window is not None and window < max_context else None
        self._by_kind = self._window is not None and "sliding_attention" in kinds
        if kinds and "sliding_attention" not in kinds:
            self._window = None
        self._additive = dtype if implementation == "eager" else None
        self.plain = self._window is None and implementation == "sdpa"

    def __call__(self, positions: torch.Tensor, width: int) -> Any:
        """Mask [B, 1, Q, width]: a query at ``positions[b, q]`` sees the stored tokens up to itself."""
        keys = torch.arange(width, device=positions.device)
        seen = (keys <= positions[..., None])[:, None]
        if self._window is None:
            return self._form(seen)
        near = seen & (keys > positions[..., None] - self._window)[:, None]
        if self._by_kind:
            return {"full_attention": self._form(seen), "sliding_attention": self._form(near)}
        return self._form(near)

    def _form(self, mask: torch.Tensor) -> torch.Tensor:
        if self._additive is None:
            return mask
        return torch.zeros(mask.shape, dtype=self._additive, device=mask.device).masked_fill_(
            ~mask, torch.finfo(self._additive).min
        )


def base_model(model: Any) -> Any:
    """The transformers model inside adapters, if there are any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _cache_argument(model: Any) -> str:
    """How this version of transformers calls the argument that carries the cache."""
    return "cache" if "cache" in inspect.signature(base_model(model).forward).parameters else "past_key_values"
