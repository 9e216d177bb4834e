"""Log-probabilities of responses under a model and its reference, laid out flat, and one gradient step on them.

Layout: one entry per response token, responses one after the other, environment tokens included (``N`` below);
``B`` counts responses. Only masked tokens are computed, and everything is 0 off the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import DataError
from guerdon.types import Trajectory, action_mask, response_ids

if TYPE_CHECKING:
    from guerdon.policies import Policy, TokenBatch

__all__ = ["Loss", "Responses", "accumulate", "logprobs"]

Loss = Callable[[Tensor, Tensor], Tensor]
"""``(rewards_B, rows_n) -> scalar``: the part of a batch's loss that belongs to the given rows."""


@dataclass(frozen=True)
class Responses:
    """Prompts and responses as token ids.

    Args:
        items: [B] ``(prompt_ids, response_ids)``.
        mask: [N] bool, the tokens that count.
        offsets: [B+1] int64, where each response begins in the flat layout.
    """

    items: list[tuple[tuple[int, ...], tuple[int, ...]]]
    mask: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.items)

    @classmethod
    def of(cls, items: Sequence[tuple[Sequence[int], Sequence[int]]], masks: Sequence[Sequence[int]]) -> Responses:
        """From token ids and one 0/1 entry per response token."""
        lengths = [len(response) for _, response in items]
        flat = np.fromiter((bool(m) for mask in masks for m in mask), dtype=bool, count=sum(lengths))
        offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        return cls([(tuple(p), tuple(r)) for p, r in items], torch.from_numpy(flat), torch.from_numpy(offsets))

    @classmethod
    def from_trajectories(cls, trajectories: Sequence[Trajectory]) -> Responses:
        """The policy's tokens count, an environment's do not.

        Raises:
            DataError: a policy turn has text but no token ids, or a trajectory with tokens has no prompt ids.
        """
        items, masks = [], []
        for t in trajectories:
            if any(turn.speaker == "policy" and turn.text and not turn.token_ids for turn in t.turns):
                raise DataError(
                    f"a policy turn of task {t.task.id!r} carries no token ids; score text with prompts and responses, "
                    "or sample with an engine that records ids"
                )
            response = response_ids(t)
            if response and not t.prompt_ids:
                raise DataError(f"the trajectory of task {t.task.id!r} carries no prompt ids")
            items.append((t.prompt_ids, response))
            masks.append(action_mask(t))
        return cls.of(items, masks)

    @property
    def owner(self) -> Tensor:
        """[N] the response that each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self)), self.offsets.diff())

    @property
    def counts(self) -> Tensor:
        """[B] number of tokens that count."""
        return torch.bincount(self.owner[self.mask], minlength=len(self))

    def flat(self, rows: Tensor) -> Tensor:
        """Flat indices of the tokens of some rows, in the order of the rows."""
        starts, lengths = self.offsets[rows], self.offsets.diff()[rows]
        ends = lengths.cumsum(0)
        within = torch.arange(int(lengths.sum())) - torch.repeat_interleave(ends - lengths, lengths)
        return torch.repeat_interleave(starts, lengths) + within

    def select(self, rows: Tensor) -> Responses:
        """Some rows, in the order given."""
        lengths = self.offsets.diff()[rows]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        return Responses([self.items[int(b)] for b in rows], self.mask[self.flat(rows)], offsets)

    def split(self, values_N: Tensor) -> list[Tensor]:
        """One tensor per response."""
        return list(torch.split(values_N, self.offsets.diff().tolist()))


def logprobs(policy: Policy, responses: Responses, *, max_tokens: int) -> Tensor:
    """[N] log-probability of each token that counts, without gradient and without dropout; 0 elsewhere."""
    from guerdon.policies import token_logprobs

    policy.model.eval()
    out = torch.zeros(len(responses.mask), dtype=torch.float64 if policy.dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        for batch, flat in _parts(policy, responses, max_tokens):
            out[flat] = token_logprobs(policy, batch).logprobs.to(out.dtype).cpu()
    return out


def accumulate(
    policy: Policy,
    responses: Responses,
    reference_N: Tensor,
    beta: float,
    loss: Loss,
    *,
    separable: bool,
    max_tokens: int,
) -> tuple[float, Tensor]:
    """Add the gradient of a loss of response rewards, whatever number of forward passes the batch is cut into.

    Args:
        policy: the trained model; dropout is off, as it is when rewards are read.
        responses: the batch.
        reference_N: [N] log-probabilities under the reference; a constant.
        beta: factor of the reward.
        loss: of the rewards ``[B]`` and the rows that it shall count.
        separable: each row's share of the loss depends on its own reward alone. Otherwise a batch that is cut takes a
            second pass: rewards first, then the gradient through each part.
        max_tokens: positions of one forward pass.

    Returns:
        The loss, and [N] the log-ratio of each token before any update; 0 off the mask.
    """
    from guerdon.policies import token_logprobs

    policy.model.eval()
    owner = responses.owner
    ratio_N = torch.zeros_like(reference_N)
    parts = list(_parts(policy, responses, max_tokens))
    slope_B: Tensor | None = None
    total = 0.0
    if not separable and len(parts) > 1:
        ratio_N = torch.where(responses.mask, logprobs(policy, responses, max_tokens=max_tokens) - reference_N, 0.0)
        rewards_B = _rewards(ratio_N, owner, len(responses), beta).requires_grad_()
        value = loss(rewards_B, torch.arange(len(responses)))
        (slope_B,) = torch.autograd.grad(value, rewards_B)
        total = float(value.detach())
    for batch, flat in parts:
        chosen = token_logprobs(policy, batch).logprobs.to(reference_N.dtype)
        ratio = chosen - reference_N[flat].to(chosen.device)
        rewards_B = _rewards(ratio.cpu(), owner[flat], len(responses), beta)
        if slope_B is None:
            ratio_N[flat] = ratio.detach().cpu()
            value = loss(rewards_B, owner[flat].unique())
            total += float(value.detach())
        else:
            value = (rewards_B * slope_B).sum()
        value.backward()
    return total, ratio_N


def _rewards(ratio: Tensor, owner: Tensor, rows: int, beta: float) -> Tensor:
    return torch.zeros(rows, dtype=ratio.dtype, device=ratio.device).index_add(0, owner, beta * ratio)


def _parts(policy: Policy, responses: Responses, max_tokens: int) -> Iterator[tuple[TokenBatch, Tensor]]:
    """Packed batches reduced to the tokens that count, and where these lie in the flat layout."""
    from guerdon.policies import make_batches

    busy = [b for b, n in enumerate(responses.counts.tolist()) if n]
    if not busy:
        return
    items = [responses.items[b] for b in busy]
    starts = responses.offsets[torch.tensor(busy)]
    groups: dict[tuple[int, ...], int] = {}
    numbers = [groups.setdefault(prompt, len(groups)) for prompt, _ in items]
    # A shared row computes the prompt once, but attends densely over all its responses: worth it for long prompts.
    share = sum(len(p) for p, _ in items) > 2 * sum(len(r) for _, r in items)
    for batch in make_batches(items, groups=numbers if share else None, max_tokens=max_tokens, share_prompt=share):
        flat = starts[batch.trajectory] + batch.position
        wanted = responses.mask[flat]
        if bool(wanted.any()):
            yield batch.narrowed(wanted).to(policy.device), flat[wanted]
