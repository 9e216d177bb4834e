"""Attention over rows that hold one prompt and several responses, at the cost of each response alone.

A dense tree mask works with any attention implementation, but its cost is the square of the whole row. Here
the tokens of all rows are computed without padding, and every response attends to its prompt and itself in a
block of its own, next to responses of similar length.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import EngineError
from guerdon.policies.direct import grouped_sdpa

__all__ = ["Tree", "tree_attention"]

_NAME = "guerdon_tree"
# A block may do a third more work than its segments need; a few segments stay together whatever they waste.
_SLACK = 1.33
_FEW = 8
_current = threading.local()


@dataclass(frozen=True)
class _Block:
    """Segments of similar length, padded on the right.

    Attributes:
        keys: ``[B, L]`` compact index of prefix and own tokens, in order.
        prefix: ``[B]`` tokens of the prefix.
        queries: ``[B, n]`` compact index; equal to ``keys`` where the block is plainly causal.
        causal: queries and keys are the same tokens, so that no mask is needed.
    """

    keys: np.ndarray
    prefix: np.ndarray
    queries: np.ndarray
    causal: bool


class Tree:
    """Where prompts and responses lie in rows ``[R, T]``.

    Args:
        prompts: ``[R]`` length of each row's prompt.
        responses: ``[S, 3]`` row, start and length of each response; within a row they follow one another.
        width: ``T``.
    """

    def __init__(self, prompts: np.ndarray, responses: np.ndarray, width: int) -> None:
        self.prompts, self.responses, self.width = prompts, responses, width
        self._moved: dict[torch.device, _Layout] = {}

    def mask(self, width: int) -> Tensor:
        """``[R, 1, T, T]`` bool: True where a position may attend. Padding attends to padding before it."""
        # Segment 0 is the prompt, 1, 2, ... the responses, -1 padding.
        segments = np.full((len(self.prompts), width), -1, dtype=np.int32)
        for r, p in enumerate(self.prompts):
            segments[r, :p] = 0
        for s, (r, at, n) in enumerate(self.responses):
            segments[r, at : at + n] = s + 1
        seg = torch.from_numpy(segments)
        same = seg[:, :, None] == seg[:, None, :]
        prompt = (seg == 0)[:, None, :] & (seg >= 0)[:, :, None]
        causal = torch.ones(width, width, dtype=torch.bool).tril_()
        return ((same | prompt) & causal)[:, None]

    def layout(self, device: torch.device) -> _Layout:
        """Index tables on ``device``."""
        if device not in self._moved:
            self._moved[device] = _Layout(self, device)
        return self._moved[device]

    @cached_property
    def lengths(self) -> np.ndarray:
        """``[R]`` tokens of each row."""
        total = self.prompts.astype(np.int64).copy()
        np.add.at(total, self.responses[:, 0], self.responses[:, 2])
        return total


class _Layout:
    """A tree's tokens without padding, and the blocks in which they attend.

    Attributes:
        tokens: ``[M]`` flat index into ``R * T`` of every token, row by row.
        compact: ``[R * T]`` its inverse; 0 at padding.
        calls: attention layers computed with it in the current pass.
    """

    def __init__(self, tree: Tree, device: torch.device) -> None:
        lengths, width = tree.lengths, tree.width
        starts = np.cumsum(lengths) - lengths
        row = np.repeat(np.arange(len(lengths)), lengths)
        tokens = row * width + np.arange(int(lengths.sum())) - starts[row]
        compact = np.zeros(len(lengths) * width, dtype=np.int64)
        compact[tokens] = np.arange(len(tokens))
        rows, at, n = tree.responses.T
        # A prompt is a segment without prefix, a response one whose prefix is the prompt.
        prefix_at = np.concatenate([starts, starts[rows]])
        prefix = np.concatenate([np.zeros_like(starts), tree.prompts[rows]])
        own_at = np.concatenate([starts, starts[rows] + at])
        own = np.concatenate([tree.prompts, n])
        slots = np.zeros(len(tokens), dtype=np.int64)
        blocks: list[_Block] = []
        base = 0
        for chosen, causal in _similar(prefix, own):
            block = _block(prefix_at[chosen], prefix[chosen], own_at[chosen], own[chosen], causal)
            wide = block.queries.shape[1]
            for b, k in enumerate(chosen):
                first = base + b * wide
                slots[own_at[k] : own_at[k] + own[k]] = np.arange(first, first + own[k])
            base += block.queries.size
            blocks.append(block)
        self.tokens = torch.from_numpy(tokens).to(device)
        self.compact = torch.from_numpy(compact).to(device)
        self.calls = 0
        self._slots = torch.from_numpy(slots).to(device)
        self._blocks = [
            (
                torch.from_numpy(b.queries).to(device),
                torch.from_numpy(b.keys).to(device),
                None if b.causal else torch.from_numpy(b.prefix).to(device),
            )
            for b in blocks
        ]
        self._equal = [bool((b.prefix == b.prefix[0]).all()) for b in blocks]
        self._masks: list[Tensor | None] = []

    def prepare(self, dtype: torch.dtype) -> None:
        """Make the blocks' masks; they serve all layers of one pass."""
        self.calls = 0
        self._masks = []
        for (queries, keys, prefix), equal in zip(self._blocks, self._equal, strict=True):
            if prefix is None:
                self._masks.append(None)
                continue
            n, width = queries.shape[1], keys.shape[1]
            p = (prefix[:1] if equal else prefix)[:, None, None, None]
            i = torch.arange(n, device=keys.device)[:, None]
            hidden = torch.arange(width, device=keys.device)[None, :] > p + i
            mask = torch.zeros(hidden.shape, dtype=dtype, device=keys.device)
            self._masks.append(mask.masked_fill_(hidden, torch.finfo(dtype).min))

    def finish(self) -> None:
        """Let the masks go."""
        self._masks = []

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None = None, dropout: float = 0.0
    ) -> Tensor:
        """Attention of all tokens: queries ``[M, H, D]``, keys and values ``[M, KV, D]`` in, ``[M, H * D]`` out."""
        self.calls += 1
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        flat = [x.reshape(len(x), -1) for x in (query, key, value)]
        out = []
        for (queries, keys, _), mask in zip(self._blocks, self._masks, strict=True):
            q, k, v = (
                x.index_select(0, index.reshape(-1)).view(*index.shape, -1, query.shape[-1]).transpose(1, 2)
                for x, index in zip(flat, (queries, keys, keys), strict=True)
            )
            done = grouped_sdpa(q, k, v, mask, causal=mask is None, scaling=scale, dropout=dropout)
            out.append(done.transpose(1, 2).reshape(queries.numel(), -1))
        return torch.cat(out).index_select(0, self._slots)


def _similar(prefix: np.ndarray, own: np.ndarray) -> Iterator[tuple[np.ndarray, bool]]:
    """Sort segments into blocks that pad little; each with whether it is plainly causal (has no prefix)."""
    causal = prefix == 0
    order = np.lexsort((prefix, own, causal))[::-1]
    start, work, most_p, most_n = 0, 0, 0, 0
    for i, k in enumerate(order):
        p, n = int(prefix[k]), int(own[k])
        high_p, high_n = max(most_p, p), max(most_n, n)
        padded = (i - start + 1) * high_n * (high_p + high_n)
        real = work + n * (p + n)
        if i > start and (causal[k] != causal[order[start]] or (i - start >= _FEW and padded > _SLACK * real)):
            yield order[start:i], bool(causal[order[start]])
            start, real, high_p, high_n = i, n * (p + n), p, n
        work, most_p, most_n = real, high_p, high_n
    yield order[start:], bool(causal[order[start]])


def _block(prefix_at: np.ndarray, prefix: np.ndarray, own_at: np.ndarray, own: np.ndarray, causal: bool) -> _Block:
    j = np.arange(int((prefix + own).max()))[None, :]
    p = prefix[:, None]
    keys = np.where(j < p, prefix_at[:, None] + j, own_at[:, None] + j - p)
    # What lies behind a segment is never attended to from within it; any token will do.
    keys = np.where(j < p + own[:, None], keys, own_at[:, None])
    if causal:
        return _Block(keys, prefix, keys, True)
    i = np.arange(int(own.max()))[None, :]
    queries = np.where(i < own[:, None], own_at[:, None] + i, own_at[:, None])
    return _Block(keys, prefix, queries, False)


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' registry; it serves passes inside :func:`attending` only.

    Raises:
        EngineError: outside such a pass, or the model wants something that this attention does not have.
    """
    layout: _Layout | None = getattr(_current, "layout", None)
    extra = next((k for k in ("softcap", "s_aux", "position_bias") if kwargs.get(k) is not None), None)
    if layout is None or extra is not None or query.shape[0] != 1 or query.shape[2] != len(layout.tokens):
        raise EngineError(f"tree attention cannot serve {type(module).__name__} ({extra or 'not a packed pass'})")
    flat = (x[0].transpose(0, 1) for x in (query, key, value))
    out = layout.attend(*flat, scaling=scaling, dropout=dropout)
    return out.view(1, len(out), query.shape[1], -1), None


@contextmanager
def attending(config: Any, layout: _Layout, dtype: torch.dtype) -> Iterator[None]:
    """Run a model with ``config`` on the tokens of ``layout``; everything is as before afterwards."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(_NAME, tree_attention)
    before = config._attn_implementation
    config._attn_implementation = _NAME
    _current.layout = layout
    layout.prepare(dtype)
    try:
        yield
    finally:
        layout.finish()
        _current.layout = None
        config._attn_implementation = before
