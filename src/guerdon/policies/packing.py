"""Prompts and responses of different lengths, packed for one forward pass.

A row of a batch is a prompt followed by one or several responses to it. Each response sees the prompt
and itself (a tree mask) and its positions go on from the prompt's end, so every response is computed
exactly as if it stood alone, while the prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import DataError

__all__ = ["TokenBatch", "make_batches"]

Item = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """One forward pass over ``R`` rows of ``T`` positions that predicts ``N`` response tokens.

    Attributes:
        input_ids: ``[R, T]`` token ids, padded on the right.
        position_ids: ``[R, T]`` positions; they restart behind the prompt for every response.
        attention_mask: ``[R, 1, T, T]`` bool, True where a position may attend; ``None`` where every row
            is plainly causal (right padding needs no mask, as nothing attends to what follows it).
        source: ``[N]`` flat index into ``R * T`` of the position whose hidden state predicts the token.
        targets: ``[N]`` the response token.
        trajectory: ``[N]`` index of the item it belongs to.
        position: ``[N]`` its position within that item's response.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    source: Tensor
    targets: Tensor
    trajectory: Tensor
    position: Tensor

    def __len__(self) -> int:
        """Number of predicted tokens."""
        return int(self.targets.shape[0])

    @property
    def cells(self) -> int:
        """Computed positions, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        moved = {
            name: value.to(device)
            for name in self.__dataclass_fields__
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class _Row:
    prompt: tuple[int, ...]
    members: tuple[int, ...]
    length: int


def make_batches(
    items: Sequence[Item],
    *,
    groups: Sequence[int] | None,
    max_tokens: int,
    share_prompt: bool = True,
    pad_id: int = 0,
) -> list[TokenBatch]:
    """Pack items into batches of at most ``max_tokens`` positions, padding included.

    Args:
        items: ``(prompt_ids, response_ids)`` per trajectory. A prompt holds at least one token; a response
            may be empty and then contributes nothing.
        groups: items with the same group number and the same prompt share a row; ``None``: no sharing.
        max_tokens: positions in one batch. A row that is longer by itself gets a batch of its own.
        share_prompt: False gives every item a row of its own.
        pad_id: fills rows on the right; its value never matters.

    Returns:
        Batches of rows of similar length, longest first. Every response token occurs exactly once.

    Raises:
        DataError: an empty prompt, or ``groups`` of another length.
    """
    if groups is not None and len(groups) != len(items):
        raise DataError(f"groups has {len(groups)} entries for {len(items)} items")
    for k, (prompt, _) in enumerate(items):
        if len(prompt) == 0:
            raise DataError(f"item {k} has an empty prompt: its first response token has nothing to be predicted from")
    rows = sorted(_rows(items, groups if share_prompt else None, max_tokens), key=lambda r: (-r.length, r.members))
    batches: list[list[_Row]] = []
    width = 0
    for row in rows:
        if not batches or (len(batches[-1]) + 1) * width > max_tokens:
            batches.append([])
            width = row.length
        batches[-1].append(row)
    return [_batch(chunk, items, pad_id) for chunk in batches]


def _rows(items: Sequence[Item], groups: Sequence[int] | None, max_tokens: int) -> list[_Row]:
    shared: dict[object, list[int]] = {}
    for k, (prompt, response) in enumerate(items):
        if len(response):
            key: object = k if groups is None else (groups[k], tuple(prompt))
            shared.setdefault(key, []).append(k)
    rows = []
    for members in shared.values():
        prompt = tuple(items[members[0]][0])
        current: list[int] = []
        length = len(prompt)
        for k in members:
            extra = len(items[k][1])
            if current and length + extra > max_tokens:
                rows.append(_Row(prompt, tuple(current), length))
                current, length = [], len(prompt)
            current.append(k)
            length += extra
        rows.append(_Row(prompt, tuple(current), length))
    return rows


def _batch(rows: Sequence[_Row], items: Sequence[Item], pad_id: int) -> TokenBatch:
    width = rows[0].length
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    # Segment 0 is the prompt, 1, 2, ... the responses, -1 padding.
    segments = np.full((len(rows), width), -1, dtype=np.int32)
    source, targets, trajectory, position = [], [], [], []
    for r, row in enumerate(rows):
        p = len(row.prompt)
        ids[r, :p] = row.prompt
        positions[r, :p] = np.arange(p)
        segments[r, :p] = 0
        at = p
        for s, k in enumerate(row.members):
            response = np.asarray(items[k][1], dtype=np.int64)
            n = len(response)
            ids[r, at : at + n] = response
            positions[r, at : at + n] = np.arange(p, p + n)
            segments[r, at : at + n] = s + 1
            # The first response token is predicted by the prompt's last position, whichever response it is.
            source.append(r * width + np.concatenate([[p - 1], np.arange(at, at + n - 1)]))
            targets.append(response)
            trajectory.append(np.full(n, k))
            position.append(np.arange(n))
            at += n
    mask = None
    if any(len(row.members) > 1 for row in rows):
        seg = torch.from_numpy(segments)
        same = seg[:, :, None] == seg[:, None, :]
        prompt = (seg == 0)[:, None, :]
        causal = torch.ones(width, width, dtype=torch.bool).tril_()
        # Padding positions attend to padding before and at themselves, so that no softmax is over nothing.
        mask = ((same | (prompt & (seg >= 0)[:, :, None])) & causal)[:, None]

    def flat(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)).long()

    return TokenBatch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        mask,
        flat(source),
        flat(targets),
        flat(trajectory),
        flat(position),
    )
