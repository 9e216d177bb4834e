"""Prompts and responses of different lengths, packed for one forward pass.

A row of a batch is a prompt followed by one or several responses to it. Each response sees the prompt
and itself (a tree) and its positions go on from the prompt's end, so every response is computed exactly
as if it stood alone, while the prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import ConfigError, DataError
from guerdon.policies.tree import Tree

__all__ = ["TokenBatch", "make_batches"]

Item = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """One forward pass over ``R`` rows of ``T`` positions that predicts ``N`` response tokens.

    Attributes:
        input_ids: ``[R, T]`` token ids, padded on the right.
        position_ids: ``[R, T]`` positions; they restart behind the prompt for every response.
        source: ``[N]`` flat index into ``R * T`` of the position whose hidden state predicts the token.
        targets: ``[N]`` the response token.
        trajectory: ``[N]`` index of the item it belongs to.
        position: ``[N]`` its position within that item's response.
        tree: which positions of a row are its prompt and its responses; ``None`` where every row holds one
            response and is plainly causal.
        context: tokens of the longest prompt with its response.
    """

    input_ids: Tensor
    position_ids: Tensor
    source: Tensor
    targets: Tensor
    trajectory: Tensor
    position: Tensor
    tree: Tree | None = None
    context: int = 0

    def __len__(self) -> int:
        """Number of predicted tokens."""
        return int(self.targets.shape[0])

    @property
    def attention_mask(self) -> Tensor | None:
        """``[R, 1, T, T]`` bool, True where a position may attend; ``None`` where every row is plainly causal.

        Right padding needs no mask: nothing attends to what follows it. The mask is made anew on each access.
        """
        if self.tree is None:
            return None
        return self.tree.mask(self.input_ids.shape[1]).to(self.input_ids.device)

    @property
    def cells(self) -> int:
        """Positions, padding included."""
        return self.input_ids.numel()

    def narrowed(self, wanted_N: Tensor) -> TokenBatch:
        """The same rows, predicting only the tokens where the mask ``[N]`` is true."""
        if bool(wanted_N.all()):
            return self
        return replace(
            self,
            source=self.source[wanted_N],
            targets=self.targets[wanted_N],
            trajectory=self.trajectory[wanted_N],
            position=self.position[wanted_N],
        )

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            source=self.source.to(device),
            targets=self.targets.to(device),
            trajectory=self.trajectory.to(device),
            position=self.position.to(device),
        )


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
        ConfigError: ``max_tokens`` below 1.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
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
    # Counting on through the padding lets a plainly causal row be seen as such, and keeps the fast kernel.
    positions = np.tile(np.arange(width), (len(rows), 1))
    responses, source, targets, trajectory, position = [], [], [], [], []
    context = 0
    for r, row in enumerate(rows):
        at = p = len(row.prompt)
        ids[r, :p] = row.prompt
        for k in row.members:
            response = np.asarray(items[k][1], dtype=np.int64)
            n = len(response)
            ids[r, at : at + n] = response
            positions[r, at : at + n] = np.arange(p, p + n)
            responses.append((r, at, n))
            # The first response token is predicted by the prompt's last position, whichever response it is.
            source.append(r * width + np.concatenate([[p - 1], np.arange(at, at + n - 1)]))
            targets.append(response)
            trajectory.append(np.full(n, k))
            position.append(np.arange(n))
            at += n
            context = max(context, p + n)
        if len(row.members) > 1:
            positions[r, at:] = 0
    tree = None
    if any(len(row.members) > 1 for row in rows):
        tree = Tree(np.array([len(row.prompt) for row in rows]), np.array(responses), width)

    def flat(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    return TokenBatch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        flat(source),
        flat(targets),
        flat(trajectory),
        flat(position),
        tree,
        context,
    )
