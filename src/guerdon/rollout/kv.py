"""Keys and values of many sequences, one slot each, that a Hugging Face model reads and writes in place.

There are two banks of slots, each with two tensors ``[slots, heads, capacity, head_dim]`` per layer: one with what is
a sequence's own, one with prefixes that several sequences share (the prompt of a group). Before a forward pass the
caller announces what it is for (:meth:`SlotCache.fresh`, :meth:`~SlotCache.continued`, :meth:`~SlotCache.decode`);
the model then calls ``update`` layer by layer as with any cache.

Sampling reads every stored key and value once per token, and that traffic is what it costs on a CPU. So
:func:`shared_prefix_attention` reads a shared prefix once for all rows of its group, and rows in use are contiguous,
so that a decode step reads views and never gathers a copy. Models whose trunk is written out
(:mod:`guerdon.policies.direct`) call :meth:`SlotCache.direct` instead of transformers' hooks.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from guerdon.errors import EngineError
from guerdon.policies.direct import grouped_sdpa

__all__ = ["ATTENTION", "Bank", "RowGroups", "SlotCache", "attending"]

ATTENTION = "guerdon_slots"
_ROUND = 32
_current = threading.local()


class Bank:
    """Keys and values of all layers for a number of slots; grows geometrically with what is really used.

    What a slot holds beyond its sequence's length is unspecified but finite; a mask must hide it.

    Args:
        max_slots: most slots.
        max_tokens: most tokens of one slot.
    """

    def __init__(self, max_slots: int, max_tokens: int) -> None:
        self.max_slots = max_slots
        self.max_tokens = max_tokens
        self.slots = 0
        self.capacity = 0
        self.layers: list[list[torch.Tensor]] = []

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values; the default before there are any."""
        return self.layers[0][0].dtype if self.layers else torch.get_default_dtype()

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer)

    def reserve(self, slots: int, tokens: int) -> None:
        """Make room for ``slots`` sequences of ``tokens`` tokens, keeping what is stored."""
        if slots <= self.slots and tokens <= self.capacity:
            return
        if slots > self.slots:
            self.slots = min(self.max_slots, max(slots, math.ceil(self.slots * 1.5)))
        if tokens > self.capacity:
            tokens = max(tokens, math.ceil(self.capacity * 1.25))
            self.capacity = min(self.max_tokens, -(-tokens // _ROUND) * _ROUND)
        for layer in self.layers:
            for kind, old in enumerate(layer):
                layer[kind] = self._zeros(old)
                layer[kind][: old.shape[0], :, : old.shape[2]] = old

    def layer(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values of a layer, made on first use in the shape and type of what the model computes."""
        while index >= len(self.layers):
            self.layers.append([self._zeros(keys), self._zeros(values)])
        return self.layers[index]

    def exchange(self, a: Sequence[int], b: Sequence[int], tokens: int) -> None:
        """Swap the first ``tokens`` tokens of the slots ``a[i]`` and ``b[i]``; no slot may occur twice."""
        source, target = [*a, *b], [*b, *a]
        for layer in self.layers:
            for store in layer:
                store[target, :, :tokens] = store[source, :, :tokens]

    def clear(self, slot: int) -> None:
        """Forget what a slot holds; needed where it may hold values that are not finite."""
        for layer in self.layers:
            for store in layer:
                store[slot] = 0

    def release(self) -> None:
        """Give all memory back."""
        self.layers = []
        self.slots = self.capacity = 0

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        shape = (self.slots, like.shape[1], self.capacity, like.shape[3])
        if like.device.type != "cpu" or math.prod(shape) == 0:
            return torch.zeros(shape, dtype=like.dtype, device=like.device)
        # Pages of a calloc'ed array take no memory until they are written, so room to grow costs nothing.
        raw = np.zeros(math.prod(shape) * like.element_size(), dtype=np.uint8)
        return torch.from_numpy(raw).view(like.dtype).view(shape)


@dataclass(frozen=True, slots=True)
class _Pass:
    """What the announced forward pass writes and reads."""

    kind: str
    bank: Bank
    slot: torch.Tensor
    position: torch.Tensor
    size: int = 0
    row: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    rows: slice | torch.Tensor | None = None
    width: int = 0
    prefix: torch.Tensor | None = None
    prefix_width: int = 0
    groups: int = 0
    members: torch.Tensor | None = None
    place: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    cells: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Which sampling rows begin with which shared prefix; the same for every step until rows come or go.

    Args:
        count: prefixes.
        width: tokens of the longest.
        members: [count * M] the row at each place of each prefix; 0 at empty places.
        place: [B] the place of each row.
        mask: [B, width] to be added to scores: -inf beyond the row's own prefix.
    """

    count: int
    width: int
    members: torch.Tensor
    place: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, prefixes: np.ndarray, tokens: np.ndarray, device: torch.device, dtype: torch.dtype) -> RowGroups:
        """Build from the slot of each row's prefix and its length (0 where it has none), both [B]."""
        count, members, place = _tables(prefixes, device)
        width = int(tokens.max())
        hidden = torch.from_numpy(np.arange(width) >= tokens[:, None]).to(device)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
        return cls(count, width, members, place, mask)


class SlotCache(Cache):
    """The cache of one model: own tokens and shared prefixes.

    Args:
        max_slots: most sequences.
        max_tokens: most tokens of one sequence.

    Attributes:
        own: the sequences' own tokens.
        shared: prefixes.
    """

    def __init__(self, max_slots: int, max_tokens: int) -> None:
        super().__init__(layers=[])
        self.own = Bank(max_slots, max_tokens)
        self.shared = Bank(1 << 30, max_tokens)
        self._pass: _Pass | None = None

    def fresh(self, bank: Bank, slots: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        """Announce a pass of the first ``lengths[i]`` tokens (right-padded) of ``slots[i]``."""
        slot, position, row, offset = _targets(slots, [0] * len(slots), lengths, device)
        self._pass = _Pass("fresh", bank, slot, position, len(slots), row, offset)

    def continued(
        self,
        bank: Bank,
        slots: Sequence[int],
        starts: Sequence[int],
        lengths: Sequence[int],
        device: torch.device,
        prefixes: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Announce a pass of ``lengths[i]`` tokens (right-padded) of ``slots[i]`` behind ``starts[i]`` stored ones.

        Args:
            bank: where they are stored.
            slots: which slots, [B].
            starts: tokens stored there, [B].
            lengths: new tokens, [B].
            device: where the model is.
            prefixes: for each sequence the slot and length of its shared prefix (length 0: none).
        """
        width = max(s + n for s, n in zip(starts, lengths, strict=True))
        prefix, prefix_width = None, 0
        queries = torch.arange(max(lengths), device=device)
        position = torch.tensor(starts, device=device)[:, None] + queries
        mask = torch.arange(width, device=device) <= position[..., None]
        if prefixes is not None and any(n for _, n in prefixes):
            prefix_width = max(n for _, n in prefixes)
            prefix = torch.tensor([s for s, _ in prefixes], device=device)
            seen = torch.arange(prefix_width, device=device) < torch.tensor([[n] for _, n in prefixes], device=device)
            mask = torch.cat([seen[:, None].expand(-1, len(queries), -1), mask], dim=-1)
        rows: slice | torch.Tensor = torch.tensor(slots, device=device)
        if list(slots) == list(range(slots[0], slots[0] + len(slots))):
            rows = slice(slots[0], slots[0] + len(slots))
        slot, position, row, offset = _targets(slots, starts, lengths, device)
        self._pass = _Pass(
            "continued", bank, slot, position, len(slots), row, offset, rows, width, prefix, prefix_width,
            mask=mask[:, None],
        )  # fmt: skip

    def decode(self, positions: torch.Tensor, width: int, groups: RowGroups | None = None) -> int:
        """Announce a pass of one token for each of the leading own slots.

        Args:
            positions: [B] where each token is stored in its own slot.
            width: own tokens that are read; more than every position.
            groups: the rows' shared prefixes, None where no row has one.

        Returns:
            own tokens that will be read, at least ``width``.
        """
        n, device = len(positions), positions.device
        if 2 * width > self.own.capacity:
            # What lies behind each row is masked anyway, and memory without gaps is read several times faster.
            width = max(width, self.own.capacity)
        hidden = torch.arange(width, device=device) > positions[:, None]
        # Added to the scores: that is several times faster than filling by a mask in every layer.
        mask = torch.zeros(hidden.shape, device=device, dtype=self.own.dtype).masked_fill_(hidden, -torch.inf)
        slot = torch.arange(n, device=device)
        cells = None
        if self.own.layers:
            heads = self.own.layers[0][0].shape[1]
            row = slot[:, None] * heads + torch.arange(heads, device=device)
            cells = (row * self.own.capacity + positions[:, None]).view(-1)
        if groups is None:
            self._pass = _Pass(
                "decode", self.own, slot, positions, n, rows=slice(0, n), width=width, mask=mask[:, None], cells=cells
            )
            return width
        mask = torch.cat([groups.mask, mask], dim=-1)
        self._pass = _Pass(
            "decode", self.own, slot, positions, n, rows=slice(0, n), width=width, prefix_width=groups.width,
            groups=groups.count, members=groups.members, place=groups.place, mask=mask[:, None], cells=cells,
        )  # fmt: skip
        return width

    def copy_prefix(self, prefix: int, slots: Sequence[int], tokens: int) -> None:
        """Copy a shared prefix to the beginning of own slots (for models whose attention is their own)."""
        for own, shared in zip(self.own.layers, self.shared.layers, strict=True):
            for target, source in zip(own, shared, strict=True):
                target[list(slots), :, :tokens] = source[prefix : prefix + 1, :, :tokens]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one layer's new keys and values and return what the announced rows attend to."""
        p = self._pass
        assert p is not None
        stores = p.bank.layer(layer_idx, key_states, value_states)
        self.own.layer(layer_idx, key_states, value_states)
        new = (key_states, value_states)
        for store, states in zip(stores, new, strict=True):
            if p.row is None:
                store[p.slot, :, p.position] = states[:, :, 0]
            else:
                store[p.slot, :, p.position] = states[p.row, :, p.offset]
        if p.kind == "fresh" or (p.kind == "decode" and p.members is not None):
            return new
        out = []
        for kind, store in enumerate(stores):
            keys = store[p.rows, :, : p.width]
            if p.prefix is not None:
                before = self.shared.layers[layer_idx][kind][p.prefix, :, : p.prefix_width]
                keys = torch.cat([before, keys], dim=2)
            out.append(keys)
        return out[0], out[1]

    def direct(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Store a layer's new keys and values and attend to what the announced rows see.

        Args:
            layer: which layer.
            query: [M, H, D], the tokens of all rows one after the other, padding included.
            key, value: [M, KV, D].
            scaling: factor on the scores.

        Returns:
            [M, H * D].
        """
        p = self._pass
        assert p is not None
        if p.kind != "decode":
            heads = [x.view(p.size, -1, *x.shape[1:]).transpose(1, 2) for x in (query, key, value)]
            seen = self.update(heads[1], heads[2], layer)
            out = grouped_sdpa(heads[0], *seen, p.mask, causal=p.kind == "fresh", scaling=scaling)
            return out.transpose(1, 2).reshape(len(query), -1)
        n, heads_q, dim = query.shape
        if p.cells is None or layer >= len(self.own.layers):
            self.update(key[:, :, None], value[:, :, None], layer)
        else:
            for store, new in zip(self.own.layers[layer], (key, value), strict=True):
                store.view(-1, dim).index_copy_(0, p.cells, new.reshape(-1, dim))
        if p.members is not None:
            return self.attend(layer, query[:, :, None], scaling).view(n, -1)
        keys, values = (t[:n, :, : p.width].flatten(0, 1) for t in self.own.layers[layer])
        scores = torch.bmm((query * scaling).view(len(keys), -1, dim), keys.transpose(1, 2))
        assert p.mask is not None
        scores.view(n, heads_q, -1).add_(p.mask)
        return torch.bmm(scores.softmax(-1), values).view(n, -1)

    def attend(self, layer: int, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention of one query per row over its group's prefix and its own tokens.

        Args:
            layer: which layer.
            query: [B, H, 1, D].
            scaling: factor on the scores.

        Returns:
            [B, 1, H, D].
        """
        p = self._pass
        assert p is not None and p.mask is not None and p.members is not None and p.place is not None
        n, heads, _, dim = query.shape
        own_k, own_v = (t[:n, :, : p.width].flatten(0, 1) for t in self.own.layers[layer])
        shared_k, shared_v = (t[: p.groups, :, : p.prefix_width].flatten(0, 1) for t in self.shared.layers[layer])
        kv = len(own_k) // n
        scaled = (query * scaling).view(n, heads, dim)
        own_scores = torch.bmm(scaled.view(n * kv, -1, dim), own_k.transpose(1, 2)).view(n, heads, -1)
        shared_scores = _ungroup(torch.bmm(_group(scaled, p, kv), shared_k.transpose(1, 2)), p, kv)
        scores = torch.cat([shared_scores, own_scores], dim=-1).add_(p.mask)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        before, after = weights.split([p.prefix_width, p.width], dim=-1)
        out = torch.bmm(after.reshape(n * kv, heads // kv, p.width), own_v).view(n, heads, -1)
        out = out + _ungroup(torch.bmm(_group(before, p, kv), shared_v), p, kv)
        return out[:, None]

    def release(self) -> None:
        """Give all memory back."""
        self.own.release()
        self.shared.release()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions and masks are the caller's."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """0: masks made by the model are for passes that attend to new tokens alone."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Size and offset of a mask made by the model; see :meth:`get_query_offset`."""
        return query_length, 0


@contextmanager
def attending(cache: SlotCache) -> Iterator[None]:
    """Make ``cache`` the one that :func:`shared_prefix_attention` reads in this thread."""
    _current.cache = cache
    try:
        yield
    finally:
        _current.cache = None


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers' registry: decode steps read the slots, other passes go to SDPA.

    Raises:
        EngineError: the model wants something that this attention does not have.
    """
    for extra in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(extra) is not None:
            raise EngineError(f"this model's attention uses {extra}; make the engine with attention='model'")
    cache: SlotCache | None = getattr(_current, "cache", None)
    p = cache._pass if cache is not None else None
    if cache is not None and p is not None and p.kind == "decode" and p.members is not None:
        return cache.attend(module.layer_idx, query, scaling or query.shape[-1] ** -0.5), None  # type: ignore[arg-type]
    mask = attention_mask
    if p is not None and p.mask is not None:
        mask = p.mask if p.mask.dim() == 4 else p.mask[:, None]
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


AttentionInterface.register(ATTENTION, shared_prefix_attention)


def _targets(
    slots: Sequence[int], starts: Sequence[int], lengths: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every new token its slot, its position there, and its row and offset in the padded batch."""
    row = np.repeat(np.arange(len(slots)), lengths)
    offset = np.concatenate([np.arange(n) for n in lengths])
    slot, position = np.asarray(slots)[row], np.asarray(starts)[row] + offset
    slot_t, position_t, row_t, offset_t = (torch.from_numpy(a).to(device) for a in (slot, position, row, offset))
    return slot_t, position_t, row_t, offset_t


def _tables(groups: np.ndarray, device: torch.device) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Index tables between rows and (prefix, member) places.

    Args:
        groups: [B] prefix of each row.
        device: of the result.

    Returns:
        number of prefixes G, the row at each place [G * M] (0 at empty places), the place of each row [B].
    """
    count = int(groups.max()) + 1
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups, minlength=count)
    member = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    most = int(sizes.max())
    place = np.empty(len(groups), np.int64)
    place[order] = groups[order] * most + member
    members = np.zeros(count * most, np.int64)
    members[place] = np.arange(len(groups))
    return count, torch.from_numpy(members).to(device), torch.from_numpy(place).to(device)


def _group(rows: torch.Tensor, p: _Pass, kv: int) -> torch.Tensor:
    """[B, H, X] by row -> [G * KV, M * H / KV, X] by prefix and key head."""
    assert p.members is not None
    heads, size = rows.shape[1:]
    by_group = rows.index_select(0, p.members).view(p.groups, -1, kv, heads // kv, size)
    return by_group.transpose(1, 2).reshape(p.groups * kv, -1, size)


def _ungroup(grouped: torch.Tensor, p: _Pass, kv: int) -> torch.Tensor:
    """[G * KV, M * H / KV, X] by prefix and key head -> [B, H, X] by row."""
    assert p.members is not None and p.place is not None
    size = grouped.shape[-1]
    by_group = grouped.view(p.groups, kv, len(p.members) // p.groups, -1, size)
    return by_group.transpose(1, 2).reshape(len(p.members), -1, size).index_select(0, p.place)
