"""Micro-batches of response tokens that know where each token lies in the step's flat streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from guerdon.policies import Policy, TokenBatch

__all__ = ["Microbatch", "attention_share", "microbatches", "rows_to_share"]


@dataclass(frozen=True, slots=True)
class Microbatch:
    """What one forward pass computes.

    Args:
        batch: packed rows, reduced to the response tokens that are needed.
        flat: [n] for each of these tokens its index among all response tokens of the items, in order.
    """

    batch: TokenBatch
    flat: Tensor


def microbatches(
    items: Sequence[tuple[Sequence[int], Sequence[int]]],
    keep: np.ndarray,
    *,
    groups: Sequence[int] | None,
    max_tokens: int,
    share_prompt: bool,
    device: torch.device,
    pad_id: int = 0,
    attention: float = 0.0,
) -> list[Microbatch]:
    """Pack items into micro-batches and keep the response tokens that some loss term reads.

    Tokens left out (environment tokens) are context for the others, but get no prediction: no vocabulary
    work and, by construction, no gradient.

    Args:
        items: ``(prompt_ids, response_ids)`` per trajectory.
        keep: [N] bool over all response tokens, concatenated in the order of ``items``.
        groups: items of one group and equal prompt share it.
        max_tokens: tokens (padding included) per micro-batch.
        share_prompt: put responses to one prompt into one row, as many as save work.
        device: where the tensors go.
        pad_id: fills rows.
        attention: see :func:`attention_share`; 0 puts a whole group into one row.
    """
    from guerdon.policies import make_batches

    if share_prompt and groups is not None and attention > 0:
        groups = rows_to_share(items, groups, attention)

    offsets = torch.from_numpy(np.cumsum([0, *(len(response) for _, response in items)]))
    keep_N = torch.from_numpy(np.ascontiguousarray(keep))
    out: list[Microbatch] = []
    for batch in make_batches(items, groups=groups, max_tokens=max_tokens, share_prompt=share_prompt, pad_id=pad_id):
        flat = offsets[batch.trajectory] + batch.position
        wanted = keep_N[flat]
        if bool(wanted.any()):
            out.append(Microbatch(batch.narrowed(wanted).to(device), flat[wanted]))
    return out


def attention_share(policy: Policy) -> float:
    """Work of attending to one position, in units of the work of all that is done once per token.

    For a transformer of width ``d`` with ``p`` parameters a layer: ``4 d`` against ``2 p`` operations.
    """
    config = policy.model.config
    width, layers = getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)
    if not width or not layers:
        return 0.0
    total = sum(
        p.numel() for n, p in policy.model.named_parameters() if p.ndim > 1 and "embed" not in n and "lm_head" not in n
    )
    return 2.0 * width * layers / max(total, 1)


def rows_to_share(
    items: Sequence[tuple[Sequence[int], Sequence[int]]], groups: Sequence[int], attention: float
) -> list[int]:
    """Row number per item: how many responses to a prompt go into one row so that the least work is done.

    A shared row computes the prompt once, but its tree mask makes attention dense over the whole row:
    ``L + attention * L ** 2`` for ``L`` tokens, against ``L + attention * L ** 2 / 2`` for a causal row of its
    own. Long prompts and wide models favour sharing, short prompts and narrow ones do not.
    """
    members: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for k, (prompt, _) in enumerate(items):
        members.setdefault((groups[k], tuple(prompt)), []).append(k)
    rows = [0] * len(items)
    row = 0
    for (_, prompt), chosen in members.items():
        # Responses of similar length share a row, so that rows come out equally long and pad little.
        chosen = sorted(chosen, key=lambda k: -len(items[k][1]))
        n = len(chosen)
        mean = sum(len(items[k][1]) for k in chosen) / n

        def work(size: int, prompt_length: int = len(prompt), mean: float = mean, n: int = n) -> float:
            length = prompt_length + size * mean
            return n / size * (length + attention * length * length * (1.0 if size > 1 else 0.5))

        # Halving is search enough: the work is convex in the size but for the step at one.
        sizes = [n]
        while sizes[-1] > 1:
            sizes.append(-(-sizes[-1] // 2))
        size = min(sizes, key=work)
        for start in range(0, n, size):
            for k in chosen[start : start + size]:
                rows[k] = row
            row += 1
    return rows
